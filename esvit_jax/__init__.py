"""EsViT in JAX: self-supervised pretraining of multi-stage vision transformers.

    import esvit_jax

    config = esvit_jax.default_config()
    result = esvit_jax.train(config, "runs/first")
    backbone, variables, preprocess = esvit_jax.load("runs/first")

The names in `__all__` are public, and keep their meaning within a major version. Every module below
this one is private: read it, but expect it to change with any version.

A public function is imported when it is first called, so `import esvit_jax` is instant and does not
load jax.
"""

import importlib
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esvit_jax.analyze.looks import attention as attention
    from esvit_jax.analyze.looks import correspond as correspond
    from esvit_jax.analyze.report import report as report
    from esvit_jax.config import default_config as default_config
    from esvit_jax.config import load_config as load_config
    from esvit_jax.evaluate.embed import embed as embed
    from esvit_jax.evaluate.knn import knn_accuracy as knn_accuracy
    from esvit_jax.interop.convert import convert as convert
    from esvit_jax.interop.export import export as export
    from esvit_jax.interop.load import load as load
    from esvit_jax.loop import train as train
    from esvit_jax.losses import esvit_loss as esvit_loss
    from esvit_jax.models import create_backbone as create_backbone
    from esvit_jax.planning.plan import plan as plan

__version__ = "0.1.0"
__all__ = [
    "__version__", "attention", "convert", "correspond", "create_backbone", "default_config",
    "embed", "esvit_loss", "export", "knn_accuracy", "load", "load_config", "plan", "report",
    "train",
]  # fmt: skip


class _Public:
    """A function by its public name; its module is imported on the first call or look at it.

    `inspect`, `help` and notebooks follow `__wrapped__` to the signature and the source. With
    `__get__` it counts as a routine, whose signature `help` shows, as it does a function's.
    """

    def __init__(self, module: str, name: str):
        self._home = module
        self.__name__ = self.__qualname__ = name

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return getattr(importlib.import_module(self._home), self.__name__)

    @property
    def __doc__(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.__wrapped__.__doc__

    def __call__(self, *arguments: Any, **fields: Any) -> Any:
        return self.__wrapped__(*arguments, **fields)

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self if instance is None else MethodType(self, instance)

    def __reduce__(self) -> str:
        return self.__name__  # pickled by its name, like a function

    def __repr__(self) -> str:
        return f"<function {__name__}.{self.__name__}>"


if not TYPE_CHECKING:
    attention = _Public("esvit_jax.analyze.looks", "attention")
    convert = _Public("esvit_jax.interop.convert", "convert")
    correspond = _Public("esvit_jax.analyze.looks", "correspond")
    create_backbone = _Public("esvit_jax.models", "create_backbone")
    default_config = _Public("esvit_jax.config", "default_config")
    embed = _Public("esvit_jax.evaluate.embed", "embed")
    esvit_loss = _Public("esvit_jax.losses", "esvit_loss")
    export = _Public("esvit_jax.interop.export", "export")
    knn_accuracy = _Public("esvit_jax.evaluate.knn", "knn_accuracy")
    load = _Public("esvit_jax.interop.load", "load")
    load_config = _Public("esvit_jax.config", "load_config")
    plan = _Public("esvit_jax.planning.plan", "plan")
    report = _Public("esvit_jax.analyze.report", "report")
    train = _Public("esvit_jax.loop", "train")


def __dir__() -> list[str]:
    return __all__
