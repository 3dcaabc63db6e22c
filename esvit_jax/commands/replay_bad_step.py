"""`esvit replay-bad-step`: where in a bad step the numbers begin that are not finite."""

import math
from typing import TYPE_CHECKING

from esvit_jax.commands.arguments import Parser, path, quiet_libraries
from esvit_jax.errors import renamed

if TYPE_CHECKING:
    from esvit_jax.analyze.replay import Replay

SHOWN_BEFORE = 5  # tensors before the first bad one


def main(argv: list[str]) -> None:
    """`esvit replay-bad-step`."""
    parser = Parser(
        "replay-bad-step",
        "Takes the step again, on the CPU, at which a run diverged, and shows where in it the "
        "numbers begin that are not finite.",
    )
    parser.add_argument("--workdir", required=True, type=path, help="of the run")
    arguments = parser.parse_args(argv)

    import jax

    jax.config.update("jax_platforms", "cpu")  # where the run is now, there may be no accelerator
    from esvit_jax.analyze.replay import replay

    quiet_libraries()
    with renamed(workdir="--workdir"):
        replayed = replay(arguments.workdir)
    print("\n".join(describe(replayed)))


def describe(replayed: "Replay") -> list[str]:
    """What was found, in lines."""
    step, loss, loss_then, seen = replayed
    lines = [f"step {step + 1}: the loss was {loss_then}, and is {loss} now"]
    first = replayed.first_bad
    if first is None:
        return [
            *lines,
            f"all {len(seen)} tensors of it are finite here: what was not depends on devices or "
            "on arithmetic that the CPU does not share (config.dtype)",
        ]
    lines.append("the last tensors before, with their largest magnitudes:")
    for tensor in seen[max(0, first - SHOWN_BEFORE) : first]:
        lines.append(f"  {tensor.name} {list(tensor.shape)}: {tensor.largest:.3g}")
    bad, count = seen[first], sum(bool(tensor.not_finite) for tensor in seen)
    lines.append(
        f"not finite from here on: {bad.name} {list(bad.shape)}, {bad.not_finite:,} of "
        f"{math.prod(bad.shape):,} numbers; {count} of {len(seen)} tensors are not finite"
    )
    return lines
