"""Formats of exports: one file each, and one line here."""

from esvit_jax.interop.formats import esvit, huggingface, stablehlo, timm_file
from esvit_jax.interop.formats.base import Format

FORMATS: dict[str, Format] = {
    "huggingface": huggingface.FORMAT,
    "timm": timm_file.FORMAT,
    "esvit": esvit.FORMAT,
    "stablehlo": stablehlo.FORMAT,
}
