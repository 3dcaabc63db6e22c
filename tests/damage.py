"""Workdirs with checkpoints of random states, and damage to them."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from esvit_jax import checkpoint, config_file, recipe
from esvit_jax.config import ConfigDict, resolve
from esvit_jax.state import TrainState, create_state, init_params


def random_state(config: ConfigDict, seed: int) -> TrainState:
    """A state of the config's shapes, without compiling anything; `seed` is its step."""
    built = recipe.build(config, resolve(config, num_images=6000, num_devices=4))

    def create():
        params = init_params(built.model, jax.random.key(0))
        return create_state(built.model, built.optimizer, params)

    r = np.random.default_rng(seed)
    shapes = jax.eval_shape(create)
    state = jax.tree.map(lambda x: jnp.asarray(r.normal(size=x.shape), x.dtype), shapes)
    return state.replace(step=jnp.asarray(seed, jnp.int32))


def save_states(workdir: Path, config: ConfigDict, steps: range) -> dict[int, TrainState]:
    """Writes a workdir with a checkpoint at each step, and returns what they hold."""
    config_file.write_config(workdir, config, {})
    states = {step: random_state(config, step) for step in steps}
    checkpoints = checkpoint.Checkpoints(str(workdir))
    for step, state in states.items():
        checkpoints.save(step, state, force=True)
    checkpoints.close()
    return states


def flip_bit(file: Path, bit: int) -> None:
    """Of all bits of the file, counted from its beginning and around."""
    content = bytearray(file.read_bytes())
    bit %= 8 * len(content)
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def largest(folder: Path) -> Path:
    """The largest file below a folder: of a checkpoint, one of arrays."""
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def _empty(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


def _truncate(step: Path) -> None:
    file = largest(step / "model" / "ocdbt.process_0" / "d")
    file.write_bytes(file.read_bytes()[:-10])


def _flip(step: Path) -> None:
    flip_bit(largest(step / "training" / "ocdbt.process_0" / "d"), 4003)


# What can happen to the folder of a checkpoint, and what is said of it.
DAMAGE = {
    "a bit of an array flipped": (_flip, "has changed: its checksum is another"),
    "a file cut off": (_truncate, r"/d/\S+ has [\d,]+ bytes, not [\d,]+"),
    "a file removed": (
        lambda step: largest(step / "model" / "d").unlink(),
        r"model/d/\S+ is missing",
    ),
    "model removed": (lambda step: shutil.rmtree(step / "model"), "model is missing"),
    "training removed": (lambda step: shutil.rmtree(step / "training"), "training is missing"),
    "emptied": (_empty, "it is empty"),
    "checksums cut off": (
        lambda step: (step / "checksums.json").write_text('{"model/_METADATA": [3'),
        r"checksums\.json cannot be read",
    ),
    "checksums emptied": (
        lambda step: (step / "checksums.json").write_text("{}"),
        r"checksums\.json cannot be read",
    ),
}
