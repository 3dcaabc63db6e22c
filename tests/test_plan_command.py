"""`esvit plan`, without compiling: its flags, its JSON, its table, its errors."""

import dataclasses
import io
import json
import re

import pytest
from rich.console import Console
from test_search import made_up_plan

from esvit_jax.commands import plan as command
from esvit_jax.errors import UserError
from esvit_jax.planning.breakdown import Costliest, Part
from esvit_jax.planning.measure import keep_program
from esvit_jax.planning.plan import plan

reads_a_file = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
CONFIG = ["--config=configs/quickstart.py", "--config.remat=dots"]


@pytest.fixture
def calls(monkeypatch):
    """What the command asked the library for; each plan fits up to 16 images."""
    calls = []

    def planned(config, topology, **fields):
        del fields["console"]
        calls.append((config, topology, fields))
        batch = fields["batch_per_chip"] or 64
        return made_up_plan(
            batch, peak=batch * 2**20, memory=16 * 2**20,
            remat=config.remat, accum_steps=config.accum_steps,
        )  # fmt: skip

    monkeypatch.setattr(command, "plan", planned)
    return calls


@reads_a_file
def test_json(calls, capsys):
    command.main([*CONFIG, "--topology=v5e:2x4", "--batch_per_chip=8", "--json"])
    ((config, topology, fields),) = calls
    assert config.remat == "dots" and topology == "v5e:2x4"
    assert fields == {
        "num_images": 1_281_167, "quick": False, "batch_per_chip": 8, "top": 0, "dump_hlo": None
    }  # fmt: skip
    expected = made_up_plan(8, peak=2**23, memory=2**24, remat="dots")
    assert json.loads(capsys.readouterr().out) == expected.as_json()


@reads_a_file
def test_table(calls, capsys):
    command.main([*CONFIG, "--topology=v5e:2x4"])
    printed = capsys.readouterr().out
    for words in ("memory, MiB", "16.0", "NO", "pmap, dots, 1"):
        assert words in printed


def rendered(tables):
    console = Console(width=120, record=True, file=io.StringIO())
    for table in tables:
        console.print(table)
    return console.export_text()


def test_a_quick_plan_is_of_memory_only():
    quick = dataclasses.replace(made_up_plan(8, peak=1, memory=2), quick=True)
    text = rendered(command.tables(quick, with_breakdown=True))
    assert "Memory only" in text and "peak, MiB" in text
    assert "floor" not in text and "estimated" not in text


def test_the_breakdown_has_a_row_of_sums():
    plan = dataclasses.replace(
        made_up_plan(8, peak=1, memory=2),
        estimated_cycles=4_000_000, estimated_seconds=0.01, estimated_images_per_second=3200.0,
        estimated_hours=1.0, estimated_mfu=0.077,
        collective_bytes=5 * 10**8, collective_seconds=0.0025,
        breakdown=[Part("MLPs", 1_000_000, 10**9), Part("other", 3_000_000, 3 * 10**9)],
        costliest=[Costliest(3_000_000, 2, 10**6, "fusion.7", "fusion", "f32[8]{0}", "jit(f)/mul")],
    )  # fmt: skip
    text = rendered(command.tables(plan, with_breakdown=True))
    rows = [re.sub(r"[│ ]+", " ", line).strip() for line in text.splitlines()]
    for row in (
        "MLPs 1.0 25.0 1.00 25.0",
        "all 4.0 100.0 4.00 100.0",
        "3.00 2 1.0 fusion.7 f32[8]{0} jit(f)/mul",
        "estimated share of the peak, % 7.7",
        "estimated images/s, all chips 3,200",
        "over the links, GB a step 0.500",
        "that the links take, ms 2.50",
    ):
        assert row in rows
    assert "MLPs" not in rendered(command.tables(plan, with_breakdown=False))


def test_hlo_needs_no_config(tmp_path):
    pytest.importorskip("libtpu")
    plan = made_up_plan(8, peak=1, memory=2)
    program = (
        "HloModule m\n\nENTRY %main (x: f32[]) -> f32[] {\n  ROOT %x = f32[] parameter(0)\n}\n"
    )
    path = tmp_path / "step.hlo"
    keep_program(str(path), program, plan, {"batch_size": 8, "total_steps": 1})
    with pytest.raises(UserError, match="^--top=-1: it must be at least 0"):
        command.main([f"--hlo={path}", "--top=-1"])
    with pytest.raises(UserError, match="^--hlo=/nowhere: there is no program"):
        command.main(["--hlo=/nowhere"])


@reads_a_file
def test_search(calls, capsys):
    command.main([*CONFIG, "--topology=v5e:2x4", "--batch_per_chip=8", "--search", "--json"])
    printed = capsys.readouterr()
    found = json.loads(printed.out)["search"]
    assert [row["remat"] for row in found] == ["none", "dots", "block"]
    assert [row["largest"]["per_chip_batch"] for row in found] == [16, 16, 16]
    assert "16 images a chip, remat=none, accum_steps=1: 0.02 of 0.02 GiB, fits" in printed.err
    assert len(calls) == len({(c.remat, c.accum_steps, f["batch_per_chip"]) for c, _, f in calls})


@reads_a_file
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--topology=v9:2x2", "--topology=v9:2x2: no such topology"),
        ("--batch_per_chip=0", "--batch_per_chip=0: it must be at least 1"),
        ("--num_images=0", "--num_images=0: it must be at least 1"),
        ("--top=-1", "--top=-1: it must be at least 0"),
        ("--dump_hlo=/nowhere/x", "--dump_hlo=/nowhere/x: its folder does not exist"),
    ],
)
def test_errors_name_the_flag(flag, message):
    with pytest.raises(UserError, match=f"^{message}"):
        command.main([*CONFIG, "--topology=cpu", flag])


def test_errors_of_the_library_name_its_arguments(tiny_config):
    with pytest.raises(UserError, match="^batch_per_chip = 0: it must be at least 1"):
        plan(tiny_config, "cpu", batch_per_chip=0)
