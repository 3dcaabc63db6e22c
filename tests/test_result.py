"""Results to and from lines of metrics."""

from esvit_jax.evaluate.result import (
    RAW_PIXELS,
    Result,
    by_evaluation,
    heading,
    results_of_line,
    results_of_lines,
    value_title,
)

KNN = Result("knn", {"top1/10": 68.5, "top1/20": 67.7, "top5/10": 97.0}, step=30)
PIXELS = Result("knn", {"top1/10": 80.0}, RAW_PIXELS)
LINEAR = Result("linear", {"top1": 71.0}, step=30)


def test_lines():
    assert KNN.scalars() == {"knn/top1/10": 68.5, "knn/top1/20": 67.7, "knn/top5/10": 97.0}
    assert PIXELS.scalars() == {"raw_pixels/knn/top1/10": 80.0}
    assert LINEAR.scalars() == {"linear/top1": 71.0}
    line = {"step": 30, "loss": 1.0} | KNN.scalars() | PIXELS.scalars() | LINEAR.scalars()
    assert results_of_line(line) == [KNN, PIXELS, LINEAR]
    assert results_of_lines([{"step": 1, "loss": 2.0}, line]) == [KNN, PIXELS, LINEAR]
    assert results_of_line({"step": 1, "loss": None, "knn/top1/10": None}) == []
    assert by_evaluation([KNN, LINEAR, PIXELS]) == {"knn": [KNN, PIXELS], "linear": [LINEAR]}


def test_quantities_and_units():
    assert KNN.first_quantity == LINEAR.first_quantity == "top1"
    assert KNN.quantity("top1") == {"10": 68.5, "20": 67.7}
    assert LINEAR.quantity("top1") == {"": 71.0}
    assert KNN.json()["values"]["top1/10"] == {"value": 68.5, "unit": "%"}
    assert str(PIXELS) == "top1/10 80.0 %"


def test_titles():
    assert heading("knn", "top1") == "k-NN top-1 (%)"
    assert heading("depth", "error") == "depth error"
    assert value_title("knn", "10") == "k = 10"
    assert value_title("knn", "10/0.04") == "k = 10, temperature = 0.04"
    assert (value_title("linear", ""), value_title("fewshot", "5")) == ("teacher", "5")
