"""Rules: what a field may hold, as a check, in words, and read from the text of a command line."""

import ast
import dataclasses
from collections.abc import Callable
from typing import TypeGuard

from esvit_jax.errors import UserError

Number = int | float


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a field may hold.

    Attributes:
      type: of the values; a float field takes whole numbers too.
      words: what is allowed, to stand after "it must be".
      holds: whether a value is allowed. It is asked about values of any type.
      optional: None is allowed as well.
    """

    type: type
    words: str
    holds: Callable[[object], bool]
    optional: bool = False

    def require(self, argument: str, value: object) -> None:
        """Refuses a value that is not allowed.

        Raises:
          UserError: names the argument, the value, and what is allowed.
        """
        if not (self.optional and value is None) and not self.holds(value):
            raise UserError(f"it must be {self.words}", argument=argument, value=value)

    def read(self, text: str) -> object:
        """The value that a text stands for, or the text itself if it stands for none."""
        if self.optional and text.lower() == "none":
            return None
        try:
            if self.type is bool:
                return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
            if self.type is tuple:
                value = ast.literal_eval(text)
                return tuple(value) if isinstance(value, (tuple, list)) else (value,)
            return self.type(text)
        except (ValueError, KeyError, SyntaxError, MemoryError, RecursionError):
            return text


def optional(rule: Rule) -> Rule:
    """The same, or None."""
    return dataclasses.replace(rule, words=f"{rule.words}, or None", optional=True)


def true_or_false() -> Rule:
    """A switch."""
    return Rule(bool, "True or False", lambda value: isinstance(value, bool))


def text() -> Rule:
    """Any text, also none."""
    return Rule(str, "text", lambda value: isinstance(value, str))


def one_of(*choices: str) -> Rule:
    """One of these texts."""
    words = f"{', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}"
    return Rule(str, words, lambda value: isinstance(value, str) and value in choices)


def whole(low: int, high: int) -> Rule:
    """A whole number, both ends allowed."""
    return Rule(
        int, f"a whole number from {low:,} to {high:,}", lambda value: _is_whole(value, low, high)
    )


def number(low: Number, high: Number, *, without: Number | None = None) -> Rule:
    """A number, both ends allowed but for the one that is `without`."""
    return Rule(
        float,
        f"a number {_between(low, high, without)}",
        lambda value: _is_number(value, low, high, without),
    )


def share() -> Rule:
    """A number from 0 to 1."""
    return number(0, 1)


def whole_numbers(low: int, high: int, *, least: int = 1) -> Rule:
    """At least so many whole numbers (1, or 0), each within both ends."""
    return Rule(
        tuple,
        f"{'one' if least else 'none'} or more whole numbers from {low:,} to {high:,}",
        lambda value: (
            isinstance(value, tuple)
            and len(value) >= least
            and all(_is_whole(item, low, high) for item in value)
        ),
    )


def three_numbers(low: Number, high: Number, *, without: Number | None = None) -> Rule:
    """Three numbers, each as in `number`."""
    return Rule(
        tuple,
        f"three numbers {_between(low, high, without)}",
        lambda value: _are_numbers(value, 3, low, high, without),
    )


def interval(low: Number, high: Number, *, without: Number | None = None) -> Rule:
    """Two numbers, each as in `number`, the second not less than the first."""

    def holds(value: object) -> bool:
        return _are_numbers(value, 2, low, high, without) and list(value) == sorted(value)

    return Rule(tuple, f"two numbers, rising, {_between(low, high, without)}", holds)


def whole_interval(low: int, high: int) -> Rule:
    """Two whole numbers within both ends, the second not less than the first."""
    both = whole_numbers(low, high)

    def holds(value: object) -> bool:
        return (
            isinstance(value, tuple) and both.holds(value) and list(value) == sorted(value)
            and len(value) == 2
        )  # fmt: skip

    return Rule(tuple, f"two whole numbers, rising, from {low:,} to {high:,}", holds)


def _between(low: Number, high: Number, without: Number | None) -> str:
    return f"from {low:,} to {high:,}" + ("" if without is None else f", but not {without:,}")


def _is_whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: object, low: Number, high: Number, without: Number | None) -> bool:
    # Comparisons with NaN are False.
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and low <= value <= high
        and value != without
    )


def _are_numbers(
    value: object, count: int, low: Number, high: Number, without: Number | None
) -> TypeGuard[tuple[Number, ...]]:
    return (
        isinstance(value, tuple)
        and len(value) == count
        and all(_is_number(item, low, high, without) for item in value)
    )
