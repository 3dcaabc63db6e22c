"""k-NN and the fast linear probe while a run trains: evaluations of view features."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import PyTree

from esvit_jax.config import ConfigDict, RunNumbers
from esvit_jax.data.sources import Source, open_source
from esvit_jax.errors import UserError, renamed
from esvit_jax.evaluate.blocks import ArrayBlocks
from esvit_jax.evaluate.fast import fast_probe
from esvit_jax.evaluate.features import FeatureExtractor, check_split, raw_pixels, view_features
from esvit_jax.evaluate.knn import knn_accuracy
from esvit_jax.evaluate.result import RAW_PIXELS, TEACHER, Result
from esvit_jax.models import create_model

# Features f32[n, d] and labels int32[n] of a split.
Split = tuple[np.ndarray, np.ndarray]


class Measure(NamedTuple):
    """One evaluation of features.

    Attributes:
      evaluation: name of its results.
      words: what it is called in an error.
      every: name of the field that says after how many steps; 0 there means never.
      values: (config, train split, test split, number of classes) -> values of a `Result`.
    """

    evaluation: str
    words: str
    every: str
    values: Callable[[ConfigDict, Split, Split, int], Mapping[str, float]]


def _knn(config: ConfigDict, train: Split, test: Split, num_classes: int) -> Mapping[str, float]:
    with renamed(ks="config.evaluate.k"):
        return knn_accuracy(*train, *test, ks=config.evaluate.k, num_classes=num_classes)


def _probe(_: ConfigDict, train: Split, test: Split, num_classes: int) -> Mapping[str, float]:
    return fast_probe(ArrayBlocks(*train), ArrayBlocks(*test), num_classes).values


MEASURES = (
    Measure("knn", "k-NN", "knn_every_steps", _knn),
    Measure("linear_fast", "a linear probe", "linear_every_steps", _probe),
)


def feature_evaluator(
    config: ConfigDict, train_source: Source, numbers: RunNumbers
) -> "FeatureEvaluator | None":
    """The evaluator of all `MEASURES` that a config asks for, if it asks for any."""
    asked = [measure for measure in MEASURES if config[measure.every]]
    return FeatureEvaluator(config, train_source, numbers, asked) if asked else None


class FeatureEvaluator:
    """Evaluates the test split by the train split; what is due together shares the features.

    Args:
      config: of the run.
      train_source: its images.
      numbers: of the run.
      measures: each is due every so many steps and after the last one.

    Raises:
      UserError: a split cannot be opened, or has no labels.
    """

    def __init__(
        self,
        config: ConfigDict,
        train_source: Source,
        numbers: RunNumbers,
        measures: Sequence[Measure],
    ):
        self._config, self._total_steps, self._measures = config, numbers.total_steps, measures
        with renamed(
            name="config.data.name", split="config.data.test_split",
            data_dir="config.data.data_dir",
        ):  # fmt: skip
            test_source = open_source(
                config.data.name, config.data.test_split, config.data.data_dir or None
            )
        first = measures[0]
        for source in (train_source, test_source):
            if not source.num_classes:
                raise UserError(
                    f"{first.words} needs labels, and {source.name} {source.split} has none; set "
                    "it to 0",
                    argument=f"config.{first.every}", value=config[first.every],
                )  # fmt: skip
        self._sources = train_source, test_source
        backbone = create_model(config).backbone
        self._extractor = FeatureExtractor(view_features(backbone, config), config, self._sources)

    def due(self, step: int) -> bool:
        return bool(self._due(step))

    def __call__(self, params: Mapping[str, PyTree], step: int) -> list[Result]:
        return self._results(self._extractor, params["backbone"], self._due(step), TEACHER, step)

    def baselines(self, params: Mapping[str, PyTree], step: int) -> list[Result]:
        """The images themselves as features, and the network as it is before training."""
        pixels = FeatureExtractor(raw_pixels(self._config), self._config, self._sources)
        untrained = self._extractor, params["backbone"], self._measures, TEACHER, step
        return [
            *self._results(pixels, {}, self._measures, RAW_PIXELS, None),
            *self._results(*untrained),
        ]

    def _due(self, step: int) -> list[Measure]:
        last = step == self._total_steps
        return [x for x in self._measures if last or step % self._config[x.every] == 0]

    def _results(
        self,
        extractor: FeatureExtractor,
        params: PyTree,
        measures: Sequence[Measure],
        subject: str,
        step: int | None,
    ) -> list[Result]:
        found: list[Split] = []
        for source in self._sources:
            features, labels = extractor.arrays(params, source)
            check_split(source, features, labels, measures[0].words)
            found.append((features, labels))
        train, test = found
        num_classes = self._sources[0].num_classes
        return [
            Result(x.evaluation, x.values(self._config, train, test, num_classes), subject, step)
            for x in measures
        ]
