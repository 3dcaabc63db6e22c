"""k-NN accuracy of a run while it trains."""

from typing import Any

from esvit_jax.config import ConfigDict
from esvit_jax.data.sources import open_source
from esvit_jax.errors import UserError
from esvit_jax.evaluate.features import FeatureExtractor, raw_pixels, view_features
from esvit_jax.evaluate.knn import knn_accuracy
from esvit_jax.models import create_model


class Evaluation:
    """k-NN on the test split, by features of the train split."""

    def __init__(self, config: ConfigDict, train_source: Any):
        self._config = config
        test_source = open_source(
            config.data.name, config.data.test_split, config.data.data_dir or None
        )
        for source in (train_source, test_source):
            if not source.num_classes:
                raise UserError(
                    f"config.knn_every_steps = {config.knn_every_steps}: k-NN needs labels, and "
                    f"{source.name} {source.split} has none; set it to 0"
                )
        self._sources = train_source, test_source
        backbone = create_model(config).backbone
        self._extractor = FeatureExtractor(view_features(backbone, config), config)

    def knn(self, params: Any) -> dict[str, float]:
        """{"knn/top1/10": percent, …} with the network's params (teacher or student)."""
        return self._accuracy(self._extractor, params["backbone"])

    def raw_pixels(self) -> dict[str, float]:
        """The same with the images themselves as features."""
        return self._accuracy(FeatureExtractor(raw_pixels(self._config), self._config), {})

    def _accuracy(self, extractor: FeatureExtractor, params: Any) -> dict[str, float]:
        train, test = (extractor.arrays(params, source) for source in self._sources)
        result = knn_accuracy(
            *train, *test, ks=self._config.evaluate.k, num_classes=self._sources[0].num_classes
        )
        return {f"knn/{name}": value for name, value in result.items()}


def in_words(accuracies: dict[str, float]) -> str:
    """Top-1 accuracies for each k, on one line."""
    return ", ".join(
        f"{value:.1f} % (k={name.rsplit('/', 1)[-1]})"
        for name, value in accuracies.items()
        if "top1" in name
    )
