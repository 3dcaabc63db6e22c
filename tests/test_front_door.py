"""`import esvit_jax`: what is public, that it costs nothing, and that it looks like functions."""

import ast
import functools
import inspect
import io
import json
import pickle
import pydoc
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from test_losses import centers, loss_of, network

import esvit_jax

PACKAGE = Path(esvit_jax.__file__).parent
FUNCTIONS = [name for name in esvit_jax.__all__ if name != "__version__"]


def python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_public_names():
    assert set(FUNCTIONS) == {
        "train", "default_config", "load_config", "load", "create_backbone", "embed",
        "knn_accuracy", "convert", "export", "plan", "esvit_loss", "report", "attention",
        "correspond",
    }  # fmt: skip
    assert sorted(dir(esvit_jax)) == sorted(esvit_jax.__all__)
    with pytest.raises(AttributeError):
        getattr(esvit_jax, "no_such_name")  # noqa: B009


def test_importing_and_naming_takes_neither_time_nor_libraries():
    code = (
        "import sys, json, esvit_jax as e; "
        f"names = [getattr(e, name) for name in {FUNCTIONS}]; [repr(name) for name in names]; "
        "print(json.dumps(sorted(sys.modules)))"
    )
    started = time.monotonic()
    modules = set(json.loads(python(code)))
    # 0.03 s on an idle machine; importing jax alone takes more than a second on one.
    assert time.monotonic() - started < 5
    heavy = {"jax", "jaxlib", "flax", "numpy", "tensorflow", "tensorflow_datasets", "rich", "absl"}
    assert not modules & heavy
    ours = {name for name in modules if name.startswith("esvit_jax.")}
    assert not ours


def test_a_config_needs_no_jax():
    code = "import sys, esvit_jax; print(esvit_jax.default_config().seed, 'jax' in sys.modules)"
    assert python(code).split() == ["0", "False"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_looks_like_the_function(name):
    public = getattr(esvit_jax, name)
    function = public.__wrapped__
    assert inspect.isfunction(inspect.unwrap(function))
    assert callable(public) and public.__name__ == public.__qualname__ == name
    assert inspect.signature(public) == inspect.signature(function)
    assert public.__doc__ == function.__doc__ and len(public.__doc__ or "") > 50
    shown = io.StringIO()
    pydoc.Helper(output=shown).help(public)
    assert shown.getvalue().splitlines()[2].startswith(f"{name}(")
    assert repr(public) == f"<function esvit_jax.{name}>"
    assert pickle.loads(pickle.dumps(public)) is public


def test_type_checkers_see_the_same_functions():
    """The imports for type checkers and the lazy names are one list."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    typed = next(
        node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test)
        == "TYPE_CHECKING"
    )  # fmt: skip
    homes = {
        alias.name: node.module
        for node in typed.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(homes) == set(FUNCTIONS)
    for name, module in homes.items():
        assert getattr(esvit_jax, name)._home == module
    assert (PACKAGE / "py.typed").is_file()


def test_calls_pass_on_arguments_and_results():
    assert esvit_jax.create_backbone("swin_tiny", window_size=14).num_features == 768
    anything: Any = esvit_jax.default_config
    with pytest.raises(TypeError, match="no_such"):
        anything(no_such=1)


def test_jax_takes_a_public_function_for_one():
    student, teacher, center = network((2, 3), 0), network((2,), 1), centers()
    loss = jax.jit(functools.partial(esvit_jax.esvit_loss, student_temp=0.1, prototype_chunk=3))
    value, scalars = loss(
        student=student, teacher=teacher, centers=center, teacher_temp=jnp.asarray(0.07)
    )
    assert float(value) == pytest.approx(float(loss_of(student, teacher, center)[0]), rel=1e-6)
    assert "view_loss" in scalars
