"""Evaluations of a run while it trains: `evaluators` makes those that a config asks for.

A new one is a file with a class like `online_features.FeatureEvaluator`, and a line in `MAKERS`.
Its results are printed, written and drawn as all others are.
"""

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

from jaxtyping import PyTree

from esvit_jax.config import ConfigDict, RunNumbers
from esvit_jax.data.sources import Source
from esvit_jax.evaluate.online_features import feature_evaluator
from esvit_jax.evaluate.result import Result


@runtime_checkable
class Evaluator(Protocol):
    """What the loop asks after every step."""

    def due(self, step: int) -> bool:
        """Whether the teacher after so many steps is to be evaluated."""
        ...

    def __call__(self, params: Mapping[str, PyTree], step: int) -> list[Result]:
        """Evaluates a network by what is due.

        Args:
          params: {"backbone", …}, the teacher's.
          step: training steps behind it.
        """
        ...

    def baselines(self, params: Mapping[str, PyTree], step: int) -> list[Result]:
        """What to compare with, by all measures: measured once, before the first step.

        Args:
          params, step: of the network that training begins with.
        """
        ...


# (config, train split, numbers of the run) -> an evaluator; None where the config asks for none.
Maker = Callable[[ConfigDict, Source, RunNumbers], Evaluator | None]
MAKERS: tuple[Maker, ...] = (feature_evaluator,)


def evaluators(config: ConfigDict, train_source: Source, numbers: RunNumbers) -> list[Evaluator]:
    """The evaluations that a config asks for; opens their data, and computes nothing.

    Raises:
      UserError: an evaluation needs labels, and there are none; or its data cannot be opened.
    """
    made = [make(config, train_source, numbers) for make in MAKERS]
    return [evaluator for evaluator in made if evaluator is not None]
