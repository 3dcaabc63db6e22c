"""Names of another library: beginnings and parts of names that differ, products that are split."""

import re
from typing import NamedTuple

import numpy as np

from esvit_jax.interop.names.published import Tensors

QKV = ("query", "key", "value")


class Spelling(NamedTuple):
    """How a library spells the names of a family, whose qkv it may hold as query, key and value.

    Attributes:
      starts: beginnings of published names, and the library's in their place; the first that fits.
      parts: the same for what may stand anywhere in a name.
      trio: what stands for ".attn.qkv." in a name, with {} for query, key or value; "" where
        there is none.
    """

    starts: dict[str, str]
    parts: dict[str, str]
    trio: str = ""

    def to_names(self, tensors: Tensors) -> Tensors:
        """Tensors by published names -> by the library's."""
        renamed = {}
        for name, tensor in tensors.items():
            name = _rename(name, self.starts, self.parts)
            if ".attn.qkv." in name:
                for part, piece in zip(QKV, np.split(tensor, 3), strict=True):
                    renamed[name.replace(".attn.qkv.", self.trio.format(part))] = piece
            else:
                renamed[name] = tensor
        return renamed

    def from_names(self, tensors: Tensors) -> Tensors:
        """The inverse of `to_names`; a query without its key and value stays as it is."""
        starts, parts = (
            {new: old for old, new in table.items()} for table in (self.starts, self.parts)
        )
        pattern = re.escape(self.trio).replace(r"\{\}", f"({'|'.join(QKV)})")
        renamed = {}
        for name, tensor in tensors.items():
            trio = [re.sub(pattern, self.trio.format(part), name) for part in QKV]
            if self.trio and trio[0] != trio[1] and all(part in tensors for part in trio):
                if name != trio[0]:
                    continue  # joined to its query
                tensor = np.concatenate([tensors[part] for part in trio])
                name = name.replace(self.trio.format("query"), ".attn.qkv.")
            renamed[_rename(name, starts, parts)] = tensor
        return renamed


def _rename(name: str, starts: dict[str, str], parts: dict[str, str]) -> str:
    for old, new in starts.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    for old, new in parts.items():
        if old in name:
            return name.replace(old, new)
    return name
