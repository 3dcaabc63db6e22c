"""What a run says when it ends, however early."""

import io
import json

from rich.console import Console

from esvit_jax.analyze.summary import summarize, tables
from esvit_jax.evaluate.result import RAW_PIXELS, Result


def test_a_table_for_each_evaluation():
    results = [
        Result("knn", {"top1/10": 80.0, "top1/20": 79.0}, RAW_PIXELS),
        Result("knn", {"top1/10": 60.0, "top1/20": 59.0}, step=0),
        Result("depth", {"error": 2.0}, step=3),
        Result("knn", {"top1/10": 65.0, "top1/20": 64.0}, step=3),
        Result("knn", {"top1/10": 70.04, "top1/20": 69.0, "top5/20": 90.0}, step=6),
    ]
    knn, depth = tables(results)
    assert (knn.title, depth.title) == ("k-NN top-1 (%)", "depth error")
    assert [column.header for column in knn.columns] == ["features", "k = 10", "k = 20"]
    assert list(zip(*(column.cells for column in knn.columns), strict=True)) == [
        ("raw pixels", "80.0", "79.0"),
        ("teacher before training", "60.0", "59.0"),
        ("teacher after 6 steps", "70.0", "69.0"),
    ]
    assert [column.header for column in depth.columns] == ["features", "value"]


def test_a_run_without_a_loss_and_one_with(tmp_path, tiny_config):
    for lines, said in (
        ([], "no loss was logged yet: config.log_every_steps is 1"),
        ([{"step": 1, "loss": 5.0}], f"the loss: {tmp_path}/figures/loss.png"),
    ):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        file = io.StringIO()
        summarize(tiny_config, tmp_path, Console(file=file, width=200))
        assert file.getvalue().splitlines() == [
            said, f"the views of one image: {tmp_path}/figures/views.png",
            f"all of it and more on one page: esvit report --workdir={tmp_path}",
        ]  # fmt: skip
        assert (tmp_path / "figures" / "views.png").stat().st_size > 1000
        assert (tmp_path / "figures" / "loss.png").exists() == bool(lines)
