"""Configs: the table of fields, the numbers of a run that follow from them, and their files."""

from esvit_jax.config.fields import ConfigDict, default_config, flatten, unflatten
from esvit_jax.config.parse import config_arguments, load_config, parse_config
from esvit_jax.config.published import published_run
from esvit_jax.config.resolve import RunNumbers, check, differences, resolve

__all__ = [
    "ConfigDict", "RunNumbers", "check", "config_arguments", "default_config", "differences",
    "flatten", "load_config", "parse_config", "published_run", "resolve", "unflatten",
]  # fmt: skip
