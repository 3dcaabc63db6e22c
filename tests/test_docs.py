"""The README and the pages of the site name commands, flags and fields that exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from esvit_jax.__main__ import COMMANDS
from esvit_jax.config import default_config, flatten

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "launch" / "README.md", *(ROOT / "docs").rglob("*.md")])
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def code_of(text: str) -> list[str]:
    """Spans and blocks of code, a line each; a command that ends in a backslash goes on."""
    text = text.replace("\\\n", " ")
    spans = re.findall(r"`([^`\n]+)`", text)
    return spans + [line.strip() for line in text.splitlines() if line.startswith("    ")]


def test_fields_exist():
    fields = flatten(default_config())
    sections = {name.partition(".")[0] for name in fields if "." in name}
    named = set(re.findall(r"\bconfig\.([a-z_]+(?:\.[a-z_]+)?)", "\n".join(code_of(TEXT))))
    # Not fields: files of that name, and the room in the package.
    named -= {"json", "py", "md", "fields", "resolve", "parse", "rules"}
    assert "optimizer.learning_rate" in named
    assert sorted(name for name in named if name not in fields and name not in sections) == []


def test_files_exist():
    named = set(re.findall(r"\b(?:tests|esvit_jax|launch)/[\w/]*\w\.\w+", "\n".join(code_of(TEXT))))
    assert "esvit_jax/steps.py" in named
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


def test_commands_exist():
    named = set(re.findall(r"\besvit ([a-z][a-z-]*)\b", "\n".join(code_of(TEXT))))
    assert {"train", "plan"} <= named
    assert sorted(named - set(COMMANDS)) == []


@pytest.mark.parametrize(
    "command",
    [
        "train", "knn", "linear", "fewshot", "transfer", "dense", "finetune", "correspond",
        "attention", "neighbours", "map", "report", "embed", "convert", "export",
        "bench", "plan", "doctor",
    ],
)  # fmt: skip
def test_flags_exist(command: str):
    lines = [
        line for line in code_of(TEXT) if re.match(rf"(esvit|GLIBC\S+ esvit) {command}\b", line)
    ]
    flags = {flag for line in lines for flag in re.findall(r"--[a-z_]+", line)} - {"--config"}
    assert flags
    run = [sys.executable, "-m", "esvit_jax", command, "--help"]
    known = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert sorted(flag for flag in flags if flag not in known) == []


def test_links_of_the_readme_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert "docs/measurements.md" in targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_readme_has_the_command_that_ci_runs():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    first = next(line for line in lines if "pytest" in line)
    assert first == "    pip install '.[test]' && python -m pytest"
