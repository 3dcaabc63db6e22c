"""`esvit plan`, without compiling: its flags, its JSON, its table, its errors."""

import dataclasses
import json

import pytest
from test_search import made_up_plan

from esvit_jax.commands import plan as command
from esvit_jax.errors import UserError
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
    assert fields == {"num_images": 1_281_167, "quick": False, "batch_per_chip": 8}
    expected = made_up_plan(8, peak=2**23, memory=2**24, remat="dots")
    assert json.loads(capsys.readouterr().out) == dataclasses.asdict(expected)


@reads_a_file
def test_table(calls, capsys):
    command.main([*CONFIG, "--topology=v5e:2x4"])
    printed = capsys.readouterr().out
    for words in ("memory, MiB", "16.0", "NO", "dots, 1"):
        assert words in printed


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
    ],
)
def test_errors_name_the_flag(flag, message):
    with pytest.raises(UserError, match=f"^{message}"):
        command.main([*CONFIG, "--topology=cpu", flag])


def test_errors_of_the_library_name_its_arguments(tiny_config):
    with pytest.raises(UserError, match="^batch_per_chip = 0: it must be at least 1"):
        plan(tiny_config, "cpu", batch_per_chip=0)
