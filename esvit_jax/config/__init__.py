"""Configs: the table of fields, the numbers of a run that follow from them, and their files."""

from esvit_jax.config.fields import (
    FREE_FIELDS,
    ConfigDict,
    RunNumbers,
    check,
    default_config,
    differences,
    flatten,
    parse_config,
    resolve,
    unflatten,
)

__all__ = [
    "FREE_FIELDS", "ConfigDict", "RunNumbers", "check", "default_config", "differences",
    "flatten", "parse_config", "resolve", "unflatten",
]  # fmt: skip
