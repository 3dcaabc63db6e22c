"""The page of the documentation that lists every field of a config."""

import itertools

from esvit_jax.config.fields import FIELDS

TITLES = {
    "": "The run",
    "backbone": "The backbone",
    "head": "The two heads",
    "views": "Views",
    "loss": "The losses",
    "optimizer": "The optimiser",
    "data": "Data",
    "evaluate": "Evaluation",
}
ABOUT = {
    "": "Fields marked ↻ may differ between two starts of the same run; all others make another "
    "run, for which a workdir with checkpoints is refused.",
    "backbone": "All but the name override the named backbone; None keeps its value.",
}


def reference() -> str:
    """Every field as Markdown: a table a section, made from `FIELDS`."""
    parts = []
    for section, names in itertools.groupby(FIELDS, lambda name: name.rpartition(".")[0]):
        lines = [f"## {TITLES[section]}"]
        if section:
            lines[0] += f": `config.{section}`"
        if section in ABOUT:
            lines += ["", ABOUT[section]]
        lines += ["", "| field | default | what it is | what it may be |", "|---|---|---|---|"]
        for name in names:
            field = FIELDS[name]
            cells = [
                f"`{name}`" + (" ↻" if field.free else ""),
                f"`{field.default!r}`",
                field.comment,
                field.rule.words,
            ]
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"
