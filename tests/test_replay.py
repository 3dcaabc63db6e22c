"""A bad step taken again: where the numbers begin that are not finite."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest
from damage import random_state
from flax import traverse_util
from rich.console import Console

from esvit_jax.analyze.replay import replay
from esvit_jax.bad_step import TriedStep, stop_if_bad
from esvit_jax.commands.replay_bad_step import describe, main
from esvit_jax.errors import RunError, UserError
from esvit_jax.run import prepare

QUIET = Console(quiet=True)


def leave_bad_step(workdir, config, change=lambda params: params):
    """What the loop leaves of a bad step 5, whose student has changed params."""
    config.max_bad_steps = 2
    run = prepare(config, workdir, QUIET)
    state = random_state(config, 7)
    state = dataclasses.replace(state, params=change(state.params))
    batch = next(run.batches(5))
    scalars = {"loss": jnp.asarray(jnp.nan), "bad_steps": jnp.asarray(2)}
    with pytest.raises(RunError, match="bad_step"):
        tried = TriedStep(5, scalars, batch)
        stop_if_bad(config, run.workdir, run.checkpoints, state, tried, lambda line: None)


def changed(name, function):
    """Changes one tensor of params."""

    def change(params):
        flat = traverse_util.flatten_dict(params, sep="/")
        assert name in flat, sorted(flat)
        return traverse_util.unflatten_dict(flat | {name: function(flat[name])}, sep="/")

    return change


def test_the_first_tensor_is_named(tiny_config, tmp_path, capsys):
    """A finite weight, of the student alone, whose products are not."""
    name = "backbone/layers_0/blocks_0/attn/proj"
    change = changed(f"{name}/kernel", lambda x: x.at[:, 2].set(3e38))
    leave_bad_step(tmp_path, tiny_config, change)
    main([f"--workdir={tmp_path}"])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "step 6: the loss was nan, and is nan now"
    assert re.match(rf"not finite from here on: the student, global views: {name} \[", said[-1])
    assert all(line.startswith("  the student, global views: backbone/") for line in said[2:-1])


def test_a_sound_step_is_finite_from_its_views_to_its_gradients(tiny_config, tmp_path):
    leave_bad_step(tmp_path, tiny_config)
    sound = replay(tmp_path)
    assert sound.first_bad is None and np.isfinite(sound.loss) and sound.step == 5
    assert "tensors of it are finite here" in describe(sound)[-1]
    names = [tensor.name for tensor in sound.seen]
    kinds = ["the state:", "the views:", "the teacher,", "the student,", "the gradients:"]
    firsts = [next(i for i, name in enumerate(names) if name.startswith(k)) for k in kinds]
    assert firsts == sorted(firsts)


def test_what_cannot_be_replayed(tiny_config, tmp_path):
    with pytest.raises(UserError, match=r"^workdir = .*there is no bad_step in it: a run leaves"):
        replay(tmp_path)
    leave_bad_step(tmp_path, tiny_config)
    (tmp_path / "bad_step" / "batch.npz").write_bytes(b"PK\3\4cut")
    with pytest.raises(UserError, match=r"the bad step in .*/bad_step cannot be read: BadZipFile"):
        main([f"--workdir={tmp_path}"])
