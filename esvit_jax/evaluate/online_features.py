"""k-NN and the fast linear probe while a run trains: evaluations of view features."""

from collections.abc import Callable, Mapping

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


class FeatureEvaluator:
    """Evaluates the test split by the train split, every so many steps and after the last one.

    Args:
      config: of the run.
      train_source: its images.
      numbers: of the run.
      evaluation: name of the results.
      words: what it is called in an error.
      every: name of the field that says after how many steps; 0 there means never.
      measure: (train split, test split, number of classes) -> values of a `Result`.

    Raises:
      UserError: a split cannot be opened, or has no labels.
    """

    def __init__(
        self,
        config: ConfigDict,
        train_source: Source,
        numbers: RunNumbers,
        *,
        evaluation: str,
        words: str,
        every: str,
        measure: Callable[[Split, Split, int], Mapping[str, float]],
    ):
        self._config, self._total_steps = config, numbers.total_steps
        self._evaluation, self._words, self._measure = evaluation, words, measure
        self._every: int = config[every]
        with renamed(
            name="config.data.name", split="config.data.test_split",
            data_dir="config.data.data_dir",
        ):  # fmt: skip
            test_source = open_source(
                config.data.name, config.data.test_split, config.data.data_dir or None
            )
        for source in (train_source, test_source):
            if not source.num_classes:
                raise UserError(
                    f"{words} needs labels, and {source.name} {source.split} has none; set it to 0",
                    argument=f"config.{every}", value=self._every,
                )  # fmt: skip
        self._sources = train_source, test_source
        backbone = create_model(config).backbone
        self._extractor = FeatureExtractor(view_features(backbone, config), config, self._sources)

    def due(self, step: int) -> bool:
        return step % self._every == 0 or step == self._total_steps

    def __call__(self, params: Mapping[str, PyTree], step: int) -> Result:
        return self._result(self._extractor, params["backbone"], TEACHER, step)

    def baselines(self) -> list[Result]:
        """The images themselves as features."""
        pixels = FeatureExtractor(raw_pixels(self._config), self._config, self._sources)
        return [self._result(pixels, {}, RAW_PIXELS, None)]

    def _result(
        self, extractor: FeatureExtractor, params: PyTree, subject: str, step: int | None
    ) -> Result:
        found: list[Split] = []
        for source in self._sources:
            features, labels = extractor.arrays(params, source)
            check_split(source, features, labels, self._words)
            found.append((features, labels))
        train, test = found
        values = self._measure(train, test, self._sources[0].num_classes)
        return Result(self._evaluation, values, subject, step)


def knn_evaluator(
    config: ConfigDict, train_source: Source, numbers: RunNumbers
) -> FeatureEvaluator | None:
    """The k-NN that `config.knn_every_steps` asks for, if it does."""
    if not config.knn_every_steps:
        return None

    def measure(train: Split, test: Split, num_classes: int) -> Mapping[str, float]:
        with renamed(ks="config.evaluate.k"):
            return knn_accuracy(*train, *test, ks=config.evaluate.k, num_classes=num_classes)

    return FeatureEvaluator(
        config, train_source, numbers,
        evaluation="knn", words="k-NN", every="knn_every_steps", measure=measure,
    )  # fmt: skip


def linear_evaluator(
    config: ConfigDict, train_source: Source, numbers: RunNumbers
) -> FeatureEvaluator | None:
    """The fast linear probe that `config.linear_every_steps` asks for, if it does."""
    if not config.linear_every_steps:
        return None

    def measure(train: Split, test: Split, num_classes: int) -> Mapping[str, float]:
        return fast_probe(ArrayBlocks(*train), ArrayBlocks(*test), num_classes).values

    return FeatureEvaluator(
        config, train_source, numbers,
        evaluation="linear_fast", words="a linear probe", every="linear_every_steps",
        measure=measure,
    )  # fmt: skip
