"""Pages of the site that are made from something else: the README, the table of fields."""

from pathlib import Path
from typing import Any

from esvit_jax.config.reference import reference

ROOT = Path(__file__).parent.parent
# Pages of the site for files outside docs/.
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "launch/README.md": "guide/launching.md",
}


def on_page_markdown(markdown: str, **context: Any) -> str:
    """Fills the markers of a page; called by mkdocs for each."""
    for name in ("README.md", *PAGES):
        markdown = markdown.replace(f"<!-- {name} -->", _file_outside(name))
    return markdown.replace("<!-- config reference -->", reference())


def _file_outside(name: str) -> str:
    """Its text, with links as they are from inside docs/."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
    for file, page in PAGES.items():
        text = text.replace(f"]({file}", f"]({page}")
    return text
