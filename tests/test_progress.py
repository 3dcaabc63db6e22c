"""Progress on a terminal, in a notebook and in a pipe."""

import io
import sys
import time
import types

import jax.numpy as jnp
from rich.console import Console

from esvit_jax.runlog import alive
from esvit_jax.runlog import progress as progress_module
from esvit_jax.runlog.progress import Progress


def text(console):
    """What was written to a console whose file is a StringIO."""
    return console.file.getvalue()


PACE = {"img_per_s": 250.0, "data_wait_share": 0.012, "seconds_per_step": 2.0}


def test_plain_lines_align():
    console = Console(file=io.StringIO(), width=40)  # narrow, and still one line each
    with Progress(5000, console=console) as progress:
        for step in range(1, 101):
            progress.advance(step)
            if step % 50 == 0:
                progress.update(step, {"loss": jnp.float32(11.5 - step / 10), **PACE})
        progress.print("[a warning] in words, as it is, however long the line may turn out to be")
        progress.update(5000, {"loss": float("nan"), **PACE})
    assert text(console).splitlines() == [
        "step   50/5000  loss  6.5000    250.0 img/s  wait   1.2 %  ETA 2:45:00",
        "step  100/5000  loss  1.5000    250.0 img/s  wait   1.2 %  ETA 2:43:20",
        "[a warning] in words, as it is, however long the line may turn out to be",
        "step 5000/5000  loss     nan    250.0 img/s  wait   1.2 %  ETA 0:00:00",
    ]


def test_terminal_line():
    console = Console(
        file=io.StringIO(), width=100, force_terminal=True, color_system=None, _environ={}
    )
    with Progress(200, first_step=40, console=console) as progress:
        progress.update(60, {"loss": 6.5, **PACE})
        progress.print("[a warning]")
        progress.advance(61)
    screen = text(console)
    assert "\x1b[2K" in screen  # it redraws its line
    last = screen.splitlines()[-2]  # below it, the cursor is shown again
    assert "step 61/200" in last
    assert "loss  6.5000    250.0 img/s  wait   1.2 %  ETA 0:04:40" in last
    assert "━" in last
    assert sum("[a warning]" in line for line in screen.splitlines()) == 1


def test_terminal_line_says_what_takes_long(monkeypatch):
    monkeypatch.setattr(progress_module, "REDRAW", 0.01)
    console = Console(file=io.StringIO(), width=80, force_terminal=True, _environ={})
    with Progress(200, first_step=40, console=console) as progress:
        with progress.busy("compiling the step"):
            time.sleep(0.1)
        assert "compiling the step (0 s)" in text(console)
        progress.first(41, 6.5)
    last = text(console).splitlines()[-2]
    assert "step 41/200" in last and "loss  6.5000" in last and "compiling" not in last


def test_plain_lines_say_what_takes_long(monkeypatch):
    monkeypatch.setattr(alive, "FIRST_LINE", 0.02)
    monkeypatch.setattr(alive, "NEXT_LINE", 0.02)
    console = Console(file=io.StringIO(), width=80)
    with Progress(200, first_step=40, console=console) as progress:
        with progress.busy("compiling the step"):
            time.sleep(0.2)
        progress.first(41, 6.5)
    *lines, last = text(console).splitlines()
    assert len(lines) >= 2 and set(lines) == {"compiling the step (0 s)"}
    assert last == "step  41/200  loss  6.5000"


def test_notebook_has_one_line(monkeypatch):
    """It is redrawn twice a second at most, and prints nothing else."""
    now, shown = 100.0, []

    def display(data, *, raw, display_id):
        shown.append((display_id, data["text/plain"]))

    fake = types.SimpleNamespace(display=display, update_display=display)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=fake))
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    console = Console(file=io.StringIO(), force_jupyter=True)
    with Progress(200, console=console) as progress:
        for step in range(1, 101):
            now += 0.01
            progress.advance(step)
            if step % 50 == 0:
                progress.update(step, {"loss": 6.5, **PACE})
    assert len({which for which, _ in shown}) == 1
    assert [line.split("  ")[0] for _, line in shown] == [
        "",
        "step 1/200",
        "step 51/200",
        "step 100/200",
    ]
    assert shown[-1][1].endswith("loss  6.5000    250.0 img/s  wait   1.2 %  ETA 0:03:20")
    assert text(console) == ""


def test_terminal_line_fits_80_columns():
    console = Console(
        file=io.StringIO(), width=80, force_terminal=True, color_system=None, _environ={}
    )
    with Progress(375000, console=console) as progress:
        progress.update(123456, {"loss": 11.0904, **PACE, "seconds_per_step": 1.0})
    last = text(console).splitlines()[-2].split("\x1b[2K")[-1]
    assert last.startswith("step 123456/375000 ")
    assert last.endswith("loss 11.0904    250.0 img/s  wait   1.2 %  ETA 69:52:24")


def test_quiet_console_is_silent():
    console = Console(file=io.StringIO(), quiet=True)
    with Progress(10, console=console) as progress:
        progress.update(5, {"loss": 1.0, **PACE})
        progress.print("words")
    assert text(console) == ""
