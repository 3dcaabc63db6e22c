"""k-NN while a run trains."""

from collections.abc import Mapping

from jaxtyping import PyTree

from esvit_jax.config import ConfigDict, RunNumbers
from esvit_jax.data.sources import Source, open_source
from esvit_jax.errors import UserError, renamed
from esvit_jax.evaluate.features import FeatureExtractor, check_split, raw_pixels, view_features
from esvit_jax.evaluate.knn import knn_accuracy
from esvit_jax.evaluate.result import RAW_PIXELS, TEACHER, Result
from esvit_jax.models import create_model


class KnnEvaluator:
    """k-NN on the test split, by features of the train split.

    It is due every `config.knn_every_steps` and after the last step.
    """

    def __init__(self, config: ConfigDict, train_source: Source, numbers: RunNumbers):
        self._config, self._total_steps = config, numbers.total_steps
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
                    f"k-NN needs labels, and {source.name} {source.split} has none; set it to 0",
                    argument="config.knn_every_steps", value=config.knn_every_steps,
                )  # fmt: skip
        self._sources = train_source, test_source
        backbone = create_model(config).backbone
        self._extractor = FeatureExtractor(view_features(backbone, config), config, self._sources)

    @classmethod
    def of_config(
        cls, config: ConfigDict, train_source: Source, numbers: RunNumbers
    ) -> "KnnEvaluator | None":
        """The evaluator that `config.knn_every_steps` asks for, if it does."""
        return cls(config, train_source, numbers) if config.knn_every_steps else None

    def due(self, step: int) -> bool:
        return step % self._config.knn_every_steps == 0 or step == self._total_steps

    def __call__(self, params: Mapping[str, PyTree], step: int) -> Result:
        return self._result(self._extractor, params["backbone"], TEACHER, step)

    def baselines(self) -> list[Result]:
        """The images themselves as features."""
        pixels = FeatureExtractor(raw_pixels(self._config), self._config, self._sources)
        return [self._result(pixels, {}, RAW_PIXELS, None)]

    def _result(
        self, extractor: FeatureExtractor, params: PyTree, subject: str, step: int | None
    ) -> Result:
        found = []
        for source in self._sources:
            features, labels = extractor.arrays(params, source)
            check_split(source, features, labels, "k-NN")
            found.append((features, labels))
        train, test = found
        with renamed(ks="config.evaluate.k"):
            values = knn_accuracy(
                *train, *test, ks=self._config.evaluate.k, num_classes=self._sources[0].num_classes
            )
        return Result("knn", values, subject, step)
