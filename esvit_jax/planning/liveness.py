"""How much memory a traced function holds at most, without compiling it.

The equations are gone through in order, and each result takes its place from there to its last
use. Like a compiler, this leaves out what fuses: an elementwise result that only elementwise
operations and reductions read is computed where it is read, and what it is computed from lives
until then instead.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from esvit_jax.planning.flops import array_of, inner_jaxprs

LOOPS = {"scan", "while", "cond"}
RENAMING = {
    "reshape", "squeeze", "expand_dims", "copy", "copy_p", "stop_gradient", "optimization_barrier",
    "sharding_constraint",
}  # fmt: skip
# Results of these are not fused into what reads them. Reductions, though, fuse what they read.
REDUCTIONS = {
    "reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "argmax", "argmin",
}  # fmt: skip
STANDALONE = {
    "dot_general", "conv_general_dilated", "sort", "top_k", "gather", "concatenate", "cumsum",
    "cummax", "scatter", "scatter-add", "scatter_add", "dynamic_update_slice", "reduce_window",
    "psum", "psum2", "pmean", "all_gather", "all_to_all", "ppermute", "random_bits", "threefry2x32",
    "pallas_call",
}  # fmt: skip
COSTLY = {"exp", "exp2", "log", "log1p", "expm1", "tanh", "logistic", "erf", "pow", "rsqrt",
          "sqrt", "sin", "cos", "cbrt", "random_bits"}  # fmt: skip


class Value(NamedTuple):
    """What an equation reads or returns; arguments and results have numbers of their own."""

    number: int
    bytes: int


class Operation(NamedTuple):
    """An equation once calls are opened.

    Attributes:
      name: of the primitive.
      reads, writes: its operands and results.
      inner: bytes that it holds meanwhile, beside those (a loop).
    """

    name: str
    reads: tuple[Value, ...]
    writes: tuple[Value, ...]
    inner: int

    @property
    def fuses_operands(self) -> bool:
        """Whether it can compute what it reads on the way."""
        return self.name not in STANDALONE and self.name not in LOOPS

    @property
    def is_fused(self) -> bool:
        """Whether its result can be computed where it is read."""
        return self.fuses_operands and self.name not in REDUCTIONS


def peak_bytes(jaxpr: Jaxpr, *, in_place: int = 0, merging: bool = False) -> int:
    """Most bytes held at a time beside the arguments.

    Args:
      jaxpr: of the traced function.
      in_place: how many of the first results take the place of arguments.
      merging: compute equal things once, also what is written to be computed again.
    """
    return _Program(jaxpr, in_place, merging).peak()


class _Program:
    """The operations of a function in order, without those that no result needs."""

    def __init__(self, jaxpr: Jaxpr, in_place: int, merging: bool):
        self._numbers: dict[Var, Value] = {}
        self._count = 0
        self._merging = merging
        self._known: dict[str, tuple[Value, ...]] = {}  # what equal equations return
        for var in (*jaxpr.constvars, *jaxpr.invars):
            self._define(var)
        self._arguments = set(range(self._count))
        operations = list(self._opened(jaxpr))
        results = [self._value(var) for var in jaxpr.outvars]
        self._free_results = {x.number for x in results[:in_place]}
        self._results = {x.number for x in results}
        self._operations = self._needed(operations)

    def _define(self, var: Var) -> Value:
        array = array_of(var)
        size = math.prod(array.shape) * getattr(array.dtype, "itemsize", 4)
        self._numbers[var] = value = Value(self._count, size)
        self._count += 1
        return value

    def _value(self, atom: Var | Literal) -> Value:
        if isinstance(atom, Literal):
            return Value(-1, 0)
        return self._numbers[atom]

    def _opened(self, jaxpr: Jaxpr) -> Iterator[Operation]:
        """Operations, with calls replaced by what they call."""
        for equation in jaxpr.eqns:
            inner = list(inner_jaxprs(equation.params))
            name = equation.primitive.name
            if inner and name not in LOOPS and len(inner[0].invars) == len(equation.invars):
                for var in inner[0].constvars:
                    self._arguments.add(self._define(var).number)
                for var, atom in zip(inner[0].invars, equation.invars, strict=True):
                    self._numbers[var] = self._value(atom)
                yield from self._opened(inner[0])
                for var, atom in zip(equation.outvars, inner[0].outvars, strict=True):
                    self._numbers[var] = self._value(atom)
                continue
            reads = tuple(self._value(x) for x in equation.invars)
            if name in RENAMING and len(reads) == len(equation.outvars):
                for var, value in zip(equation.outvars, reads, strict=True):
                    self._numbers[var] = value
                continue
            if self._merging and not inner:
                key = self._description(equation)
                if key in self._known:
                    self._numbers |= zip(equation.outvars, self._known[key], strict=True)
                    continue
                self._known[key] = tuple(self._define(var) for var in equation.outvars)
                writes = self._known[key]
            else:
                writes = tuple(self._define(var) for var in equation.outvars)
            held = max((self._held_by_loop(equation, part) for part in inner), default=0)
            yield Operation(name, tuple(x for x in reads if x.number >= 0), writes, held)

    def _description(self, equation: JaxprEqn) -> str:
        """Equal for equations that compute the same."""
        operands = [
            repr(x.val) if isinstance(x, Literal) else self._numbers[x].number
            for x in equation.invars
        ]
        return f"{equation.primitive.name} {operands} {equation.params}"

    def _held_by_loop(self, equation: JaxprEqn, body: Jaxpr) -> int:
        """Bytes that a loop's body holds: of a scan also the slices that one turn reads."""
        inner = peak_bytes(body, merging=self._merging)
        if equation.primitive.name != "scan":
            return inner
        pairs = zip(equation.invars, body.invars, strict=True)
        slices = (array_of(y) for x, y in pairs if array_of(x).shape != array_of(y).shape)
        return inner + sum(x.size * getattr(x.dtype, "itemsize", 4) for x in slices)

    def _needed(self, operations: list[Operation]) -> list[Operation]:
        wanted, needed = set(self._results), []
        for operation in reversed(operations):
            if any(x.number in wanted for x in operation.writes):
                wanted.update(x.number for x in operation.reads)
                needed.append(operation)
        return needed[::-1]

    def _stored(self) -> set[int]:
        """Numbers of the values that have a place in memory."""
        readers: dict[int, list[Operation]] = {}
        for operation in self._operations:
            for number in {x.number for x in operation.reads}:
                readers.setdefault(number, []).append(operation)
        stored = set(self._results)
        for operation in self._operations:
            for x in operation.writes:
                users = readers.get(x.number, [])
                costly = operation.name in COSTLY and len(users) > 1
                if not operation.is_fused or costly or any(not y.fuses_operands for y in users):
                    stored.add(x.number)
        return stored

    def peak(self) -> int:
        """See `peak_bytes`."""
        stored = self._stored()
        sources: dict[int, dict[int, int]] = {}  # value: stored values it is computed from, bytes
        reads: list[dict[int, int]] = []  # the same for each operation
        last: dict[int, int] = {}  # operation that reads a stored value last
        for i, operation in enumerate(self._operations):
            needs: dict[int, int] = {}
            for x in operation.reads:
                needs |= sources.get(x.number, {})
            reads.append(needs)
            for x in operation.writes:
                own = {x.number: x.bytes}
                sources[x.number] = own if x.number in stored else needs
                if x.number in stored:
                    last |= dict.fromkeys([*needs, x.number], i)
        held, highest = 0, 0
        for i, operation in enumerate(self._operations):
            new = {
                x.number: x.bytes for x in operation.writes
                if x.number in stored and x.number not in self._free_results
            }  # fmt: skip
            if not new:
                continue
            dying = sum(
                size for number, size in reads[i].items()
                if last[number] == i and number not in self._results
            )  # fmt: skip
            reused = min(dying, sum(new.values())) if operation.name not in STANDALONE else 0
            held += sum(new.values()) - reused
            highest = max(highest, held + operation.inner)
            held -= dying - reused
            held -= sum(
                size for number, size in new.items()
                if last[number] == i and number not in self._results
            )  # fmt: skip
        return highest
