"""Damaged checkpoints: found, named, and the one before them used, or all refused."""

import logging
import re
import shutil

import jax
import numpy as np
import pytest
from damage import DAMAGE, flip_bit, save_states
from etils import epath

from esvit_jax import checksums, whole
from esvit_jax.checkpoint import ITEMS, Checkpoints, load_model
from esvit_jax.errors import UserError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with checkpoints 1, 2 and 3, and the states in them."""
    import tiny

    workdir = tmp_path_factory.mktemp("saved") / "run"
    return workdir, save_states(workdir, tiny.tiny_config(), range(1, 4))


@pytest.fixture
def workdir(saved, tmp_path):
    """A copy, to be damaged."""
    return shutil.copytree(saved[0], tmp_path / "run")


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def committed(workdir):
    return whole.committed_steps(epath.Path(workdir) / "checkpoints")


def newest(workdir):
    return whole.newest(epath.Path(workdir) / "checkpoints", ITEMS, strict=False)


def refusal(function, *arguments, **fields) -> str:
    with pytest.raises(UserError) as error:
        function(*arguments, **fields)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_whole_checkpoints_are_used_without_a_word(saved, workdir, caplog):
    assert committed(workdir) == [1, 2, 3]
    with caplog.at_level(logging.WARNING):
        checkpoints = Checkpoints(str(workdir), strict=True)
        assert_same(checkpoints.restore(saved[1][1]), saved[1][3])
        checkpoints.close()
        assert_same(load_model(workdir, strict=True).teacher, saved[1][3].teacher)
    assert [r for r in caplog.records if "esvit_jax" in r.pathname] == []


def test_any_flipped_bit_is_found(workdir):
    """128 of them, in every file that holds something of the items."""
    step = workdir / "checkpoints" / "3"
    files = sorted(f for item in ITEMS for f in (step / item).rglob("*") if f.is_file())
    assert len(files) > 10
    r = np.random.default_rng(0)
    for k in range(max(128, len(files))):
        file = files[k % len(files)]
        bit = int(r.integers(8 * file.stat().st_size))
        flip_bit(file, bit)
        assert newest(workdir) == 2, file
        flip_bit(file, bit)
        assert newest(workdir) == 3
    for bit in r.integers(0, 1 << 30, 32):
        flip_bit(step / checksums.FILE, int(bit))
        assert newest(workdir) in (2, 3)  # 3 where nothing but white space has changed
        flip_bit(step / checksums.FILE, int(bit))


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "commit_success.txt"])
def test_a_bit_of_what_orbax_writes_last_changes_no_value(saved, workdir, name):
    file = workdir / "checkpoints" / "3" / name
    for bit in np.random.default_rng(1).integers(0, 8 * file.stat().st_size, 4):
        flip_bit(file, int(bit))
        assert_same(load_model(workdir).student, saved[1][3].params)
        flip_bit(file, int(bit))


@pytest.mark.parametrize("how", DAMAGE)
def test_training_goes_on_from_the_one_before(saved, workdir, how, caplog):
    do, what = DAMAGE[how]
    do(workdir / "checkpoints" / "3")
    files = sorted(workdir.rglob("*"))
    assert re.search(
        rf"checkpoint 3 in {workdir}/checkpoints is damaged \(.*{what}\); checkpoint 2 would do",
        refusal(Checkpoints, str(workdir), strict=True),
    )
    assert sorted(workdir.rglob("*")) == files

    with caplog.at_level(logging.WARNING):
        checkpoints = Checkpoints(str(workdir))
    said = [r.getMessage() for r in caplog.records if r.pathname.endswith("whole.py")]
    assert len(said) == 1 and said[0].endswith("; checkpoint 2 is used")
    assert re.search(rf"checkpoint 3 in {workdir}/checkpoints is damaged \(.*{what}\)", said[0])
    assert checkpoints.latest_step() == 2
    assert_same(checkpoints.restore(saved[1][1]), saved[1][2])
    checkpoints.save(3, saved[1][3], force=True)
    checkpoints.close()
    assert (workdir / "checkpoints" / "3.damaged").is_dir()
    assert newest(workdir) == 3
    assert_same(load_model(workdir).student, saved[1][3].params)


@pytest.mark.parametrize("how", DAMAGE)
def test_a_network_is_read_from_the_one_before(saved, workdir, how):
    """Unless it is whole: an evaluation reads nothing of "training"."""
    DAMAGE[how][0](workdir / "checkpoints" / "3")
    files = sorted(workdir.rglob("*"))
    whole_network = how in ("a bit of an array flipped", "training removed")
    loaded = load_model(workdir)
    assert loaded.step == (3 if whole_network else 2)
    assert_same(loaded.teacher, saved[1][loaded.step].teacher)
    if not whole_network:
        assert "checkpoint 2 would do" in refusal(load_model, workdir, strict=True)
        assert "checkpoint 3 in" in refusal(load_model, workdir, 3)
    assert sorted(workdir.rglob("*")) == files


def test_a_stray_folder_is_no_checkpoint(saved, workdir):
    (workdir / "checkpoints" / "99").mkdir()
    assert load_model(workdir).step == 3
    assert "checkpoint 99" in refusal(load_model, workdir, strict=True)
    checkpoints = Checkpoints(str(workdir))
    assert checkpoints.latest_step() == 3
    assert_same(checkpoints.restore(saved[1][1]), saved[1][3])
    checkpoints.close()


def test_all_damaged_is_refused_in_one_line(workdir):
    for step in (1, 2, 3):
        DAMAGE["a file cut off"][0](workdir / "checkpoints" / str(step))
    for function in (Checkpoints, load_model):
        message = refusal(function, str(workdir))
        assert all(f"checkpoint {step} in" in message for step in (1, 2, 3))
        assert message.endswith("there is no other")
    assert committed(workdir) == [1, 2, 3]


def test_without_checksums_a_checkpoint_is_used_and_that_is_said(saved, workdir, caplog):
    """As earlier versions wrote them."""
    (workdir / "checkpoints" / "3" / checksums.FILE).unlink()
    with caplog.at_level(logging.WARNING):
        assert_same(load_model(workdir, strict=True).teacher, saved[1][3].teacher)
    (said,) = [r.getMessage() for r in caplog.records if r.pathname.endswith("whole.py")]
    assert said.startswith(f"checkpoint 3 in {workdir}/checkpoints has no checksums")
