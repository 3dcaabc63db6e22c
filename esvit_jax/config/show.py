"""Configs for reading: in a terminal, and in a notebook."""

import html
from typing import NamedTuple

import ml_collections

from esvit_jax.config.fields import FIELDS, field_values


class Row(NamedTuple):
    """A field of a config: its dotted name, its value, and what the table says of it."""

    name: str
    value: object
    default: object
    comment: str

    @property
    def changed(self) -> bool:
        """Whether the value is not the default."""
        return self.value != self.default


def rows(config: ml_collections.ConfigDict) -> list[Row]:
    """All fields of a config, in the table's order."""
    values = field_values(config)
    return [Row(name, values[name], field.default, field.comment) for name, field in FIELDS.items()]


def as_text(config: ml_collections.ConfigDict, section: str = "") -> str:
    """A line a field, sections indented; also of a section, or of a config that is not whole."""

    def place(name: str) -> int:
        """The line of the table where this field, or the first of this section, stands."""
        name = f"{section}.{name}".lstrip(".")
        lines = (i for i, x in enumerate(FIELDS) if x == name or x.startswith(f"{name}."))
        return next(lines, len(FIELDS))

    lines = []
    for name in sorted(config, key=place):
        value = config[name]
        if isinstance(value, ml_collections.ConfigDict):
            lines += [f"{name}:", *(f"  {line}" for line in as_text(value, name).splitlines())]
        else:
            lines.append(f"{name}: {value!r}")
    return "\n".join(lines)


def as_html(config: ml_collections.ConfigDict) -> str:
    """A table of a whole config, in bold what is not the default; of anything else, its text."""
    if field_values(config).keys() != FIELDS.keys():
        return f"<pre>{html.escape(as_text(config))}</pre>"
    lines = ["<table><tr><th>field</th><th>value</th><th>default</th><th></th></tr>"]
    for row in rows(config):
        value = html.escape(repr(row.value))
        cells = [
            row.name,
            f"<b>{value}</b>" if row.changed else value,
            html.escape(repr(row.default)) if row.changed else "",
            html.escape(row.comment),
        ]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "\n".join([*lines, "</table>"])
