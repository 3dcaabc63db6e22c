"""Machines by name: what is refused, and what libtpu is told."""

import pytest

from esvit_jax.errors import UserError
from esvit_jax.planning import topology as module
from esvit_jax.planning.chips import CHIPS
from esvit_jax.planning.topology import Topology, parse_topology


def test_a_name_is_a_generation_and_a_shape():
    assert parse_topology("cpu") == Topology("cpu")
    pytest.importorskip("libtpu")
    topology = parse_topology("v4:2x2x4")
    assert (topology.chip, topology.shape) == (CHIPS["v4"], (2, 2, 4))
    assert topology.chips == 16 and topology.memory == 32 * 2**30


@pytest.mark.parametrize("name", ["v9:2x2", "v5e", "v5e:", "v5e:0x4", "tpu", "v4:2x2x1x1", ""])
def test_unknown_topology(name):
    message = rf"topology = '{name}': no such topology; known are cpu and v2, .*v7x"
    with pytest.raises(UserError, match=message):
        parse_topology(name)


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'topology = .*pip install "esvit_jax\[tpu\]"'):
        parse_topology("v5e:2x4")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("v5e:2x4", "v5litepod-8"), ("v4:2x2x1", "v4-8"), ("v5p:4x8x8", "v5p-512"),
     ("v6e:16x16", "v6e-256")],
)  # fmt: skip
def test_environment(name, expected):
    generation, _, shape = name.partition(":")
    sizes = tuple(int(size) for size in shape.split("x"))
    environment = Topology(name, CHIPS[generation], sizes).environment()
    assert environment["TPU_ACCELERATOR_TYPE"] == expected
    assert environment["JAX_PLATFORMS"] == "cpu"
    assert environment["JAX_ENABLE_COMPILATION_CACHE"] == "false"
    assert Topology("cpu").environment() == {"JAX_PLATFORMS": "cpu"}


def test_chips():
    assert list(CHIPS) == ["v2", "v3", "v4", "v5e", "v5p", "v6e", "v7x"]
    for chip in CHIPS.values():
        assert 2**34 <= chip.memory <= 2**38 and 5e11 < chip.bandwidth < 1e13
        assert 40 < chip.peak_flops / chip.bandwidth < 600
