"""`esvit report`: what stands on the page, that it loads nothing, and what it does without."""

import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from images import encoded, noise, write_image
from PIL import Image
from test_diagnosis import HEALTHY
from test_diagnosis import lines as made_up

from esvit_jax import config_file
from esvit_jax.__main__ import COMMANDS
from esvit_jax.analyze.leftovers import KINDS
from esvit_jax.analyze.report import html_of
from esvit_jax.analyze.report import report as report_of
from esvit_jax.analyze.views import pictured, views_of_images
from esvit_jax.commands.report import main
from esvit_jax.config import resolve
from esvit_jax.data.augment import augment, sample_parameters
from esvit_jax.data.sources import open_source
from esvit_jax.errors import UserError
from esvit_jax.evaluate.fewshot import FewShot, Labels, few_shot_result

VOID = {"meta", "img", "path", "circle", "rect", "image", "text", "title"}
LOADS = {"script", "link", "iframe", "object", "embed", "video", "audio", "source", "base", "form"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in BROWSERS if (found := shutil.which(name))), None)


class Page(HTMLParser):
    """What a page holds: its elements, and the text of its tables; it must be well nested."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.tables, self.open, self.text = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and {"th", "td"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def check(text):
    """That a page stands alone, and can be read by all; returns it."""
    page = Page(text)
    assert not LOADS & {tag for tag, _ in page.elements}
    assert "://" not in text and "url(" not in text and "@import" not in text
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "srcset", "data", "action", "poster", "background"):
            assert re.match("data:image/(png|webp);base64,|#|$", attributes.get(name) or "")
    assert all(image["alt"] and image["width"] for image in page.all("img"))
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in page.all("svg"))
    assert all(head["scope"] in ("col", "row") for head in page.all("th"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [a["href"][1:] for a in page.all("a")]
    assert targets == ids  # every section, in order
    assert len(page.all("h1")) == 1 and page.all("html")[0]["lang"] == "en"
    policy = next(x["content"] for x in page.all("meta") if "http-equiv" in x)
    assert policy.startswith("default-src 'none'")
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    return page


def write_lines(workdir, records):
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in records))


def write_run(workdir, config, num_images=6000):
    numbers = dataclasses.asdict(resolve(config, num_images=num_images, num_devices=1))
    config_file.write_config(workdir, config, numbers)


@pytest.fixture
def workdir(tmp_path, tiny_config):
    """A run of six steps that was evaluated while it trained."""
    tiny_config.head.num_prototypes = 256
    folder = tmp_path / "run"
    write_run(folder, tiny_config)
    knn = {"knn/top1/10": 60.0, "knn/top1/20": 59.0}
    first = {"step": 0, **{f"raw_pixels/{name}": x + 10 for name, x in knn.items()}}
    records = made_up(*[HEALTHY | {"spent_start": 0.0}] * 6, every=1)
    write_lines(folder, [first, {"step": 0} | knn, *records, {"step": 6, "knn/top1/10": 71.25}])
    return folder


def add_evaluations(workdir):
    """What commands write, with made-up numbers."""
    head = {"step": 6, "key": "teacher", "data": "flowers", "train_images": 1000,
            "test_images": 200}  # fmt: skip
    shots = [
        FewShot(Labels(shots=1), 10, {"top1": [40.0, 44.0]}, [1.0, 1.0]),
        FewShot(Labels(percent=10.0), 100, {"top1": [60.0, 60.0]}, [1.0, 1.0]),
    ]
    files = {
        "knn.json": head | {"top1/10": 71.25, "top5/10": 95.0, "top1/20": 70.0, "top5/20": 94.0},
        "linear_fast.json": head | {"top1": 80.5, "top5": 99.0, "picked": {"l2": 0.01}},
        "fewshot.json": head | {"seeds": 2} | dict(few_shot_result(shots, 6).values),
        "transfer.json": {
            "step": 6, "key": "teacher", "protocol": "fast", "sets": {}, "against": "OTHER",
            "wins": {"probe": [1, 2]}, "transfer/top1/cifar10": 66.0,
            "transfer/mean_per_class/pets": 55.5, "transfer_knn/top1/cifar10": 50.0,
        },
        "correspondence.json": [
            {"workdir": name, "step": 6, "key": "teacher", "data": "flowers", "split": "test",
             "images": 9, "accuracy": x, "distance": 4.25, "distance_cells": 0.53,
             "cutoff_similarity": 0.875}
            for name, x in (("mine", 62.5), ("OTHER", 50.0))
        ],
        "attention/entropy.json": [{"stage": 0, "keys": 16, "entropy": [2.0, 3.0]}],
    }  # fmt: skip
    (workdir / "attention").mkdir()
    for name, content in files.items():
        (workdir / name).write_text(json.dumps(content))
    pictures = ["correspondence.png", "map.png", "neighbours.png", "attention/regions.png"]
    pictures += [f"attention/block_{n}_image_{i}.png" for n in (9, 10, 11) for i in (0, 1, 2)]
    for i, name in enumerate(pictures):
        (workdir / name).write_bytes(encoded(noise(i, 30, 40, 3)))


def test_everything_that_evaluations_leave(workdir):
    add_evaluations(workdir)
    report = report_of(workdir, images=0)
    page = check(html_of(report))
    of_head = ["neighbours", "top-1 (%)", "top-5 (%)"]
    assert page.tables[1:] == [
        [["features", "k = 10", "k = 20"], ["raw pixels", "70.0", "69.0"],
         ["teacher before training", "60.0", "59.0"], ["teacher after 6 steps", "71.2", ""]],
        [of_head, ["k = 10", "71.2", "95.0"], ["k = 20", "70.0", "94.0"]],
        [["features", "top-1 (%)", "top-5 (%)"], ["teacher", "80.5", "99.0"]],
        [["labels", "top-1 (%)"], ["1 shot", "42.0 ± 2.8"], ["10 percent", "60.0 ± 0.0"]],
        [["data set", "top-1 (%)", "mean per class (%)"], ["cifar10", "66.0", "–"],
         ["pets", "–", "55.5"]],
        [["data set", "top-1 (%)"], ["cifar10", "50.0"]],
        [["network", "hits (%)", "distance (px)", "distance in cells",
          "similarity of the 11th match"],
         ["mine, teacher at step 6", "62.5", "4.2", "0.53", "0.875"],
         ["OTHER, teacher at step 6", "50.0", "4.2", "0.53", "0.875"]],
        [["block", "stage", "mean of the heads", "least", "most", "possible"],
         ["0", "1", "2.50", "2.00", "3.00", "4.00"]],
    ]  # fmt: skip
    for words in (
        "teacher at step 6; 1,000 training and 200 test images of flowers; picked: ℓ2 0.01",
        "protocol fast; better than OTHER on 1 of 2 sets by probe",
    ):
        assert words in page.words
    # Of many figures the first images', block by block.
    shown = [image["title"] for image in page.all("img")]
    blocks = [f"attention/block_{n}_image_{i}.png" for i in (0, 1) for n in (9, 10, 11)]
    assert shown == [
        "correspondence.png", "attention/regions.png", *blocks[:5], "neighbours.png", "map.png"
    ]  # fmt: skip
    assert "4 more lie in the workdir" in page.words
    assert [lack.command.split()[1] for lack in report.lacks] == ["dense"]


def test_what_was_trained(workdir, tiny_config):
    report = report_of(workdir, images=0)
    assert report.words == {
        "network": "swin_tiny, 0.00519 M parameters; 0.0112 M with view and region heads of K = "
        "256 prototypes; matrix products in float32",
        "data": "bundled/fashion_mnist_mini train, 6,000 images",
        "views": "2 global ones of 16 px and 2 local ones of 8 px of each image",
        "loss": "views and regions are matched; student temperature 0.1, teacher temperature 0.04 "
        "to 0.07 over 30 epochs; center momentum 0.9",
        "optimizer": "adamw; learning rate 1.56e-05 (0.0005 for 256 images) after 0 steps, then a "
        "cosine to 1e-06; weight decay 0.04 to 0.4; teacher momentum 0.996 to 1",
        "length": "6 steps of 8 images, 0.008 epochs, 48 images seen",
        "time": "in 0:15:10: step 98.9 %, data 1.1 %",
    }
    changed = {row.name: row.value for row in report.fields}
    assert changed["head.num_prototypes"] == 256 and "seed" not in changed
    assert [finding.title for finding in report.findings] == ["no collapse"]
    assert [chart.title for chart in report.charts][:2] == [
        "Loss (nats)",
        "Entropy (share of ln K)",
    ]
    assert report.charts[-1].title == "k-NN top-1 (%)"
    page = check(html_of(report))
    assert "37 fields" not in page.words and f"{len(changed)} fields of the config" in page.words
    # Each evaluation that is missing is named with what makes it.
    assert [lack.command for lack in report.lacks] == [
        f"esvit {kind.command} --workdir={workdir}" for kind in KINDS
    ]
    assert {kind.command.split()[0] for kind in KINDS} <= set(COMMANDS)


def test_a_collapse_is_said_on_the_page_and_in_the_terminal(workdir, capsys):
    write_lines(workdir, made_up(*[{"feature_std": 0.01}] * 6, every=1))
    main([f"--workdir={workdir}", "--images=0"])
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("collapse of the features: since step 1: the backbone tells images")
    assert out[1].startswith(f"written to {workdir}/report.html, 0.0 MB")
    text = (workdir / "report.html").read_text()
    assert "<code>config.optimizer.learning_rate</code> or <code>config.optimizer" in text
    assert '<li class="card bad">' in text


def test_views_are_those_that_the_step_cuts(tmp_path, tiny_config):
    (tmp_path / "a.png").write_bytes(b"no image")
    for name in "bc":
        (tmp_path / f"{name}.png").write_bytes(encoded(noise(ord(name), 28, 28, 3)))
    source = open_source(f"folder:{tmp_path}", "train")
    found = views_of_images(tiny_config, source, 3)
    assert sorted(viewed.name for viewed in found) == ["b.png", "c.png"]

    @jax.jit
    def cut(key, canvas, size):
        views = augment(key[None], canvas[None], size[None], tiny_config.views)
        return views, sample_parameters(key, size, tiny_config.views).box

    size = jnp.array([28, 28], jnp.int32)
    for key, viewed in zip(jax.random.split(jax.random.key(0), 3), found, strict=False):
        image = noise(ord(viewed.name[0]), 28, 28, 3)
        np.testing.assert_array_equal(viewed.image, image)
        views, box = cut(key, jnp.asarray(image), size)
        for kind, stack in views.items():
            np.testing.assert_allclose(viewed.views[kind], stack[:, 0], atol=1e-5)
        np.testing.assert_array_equal(viewed.boxes, box)
    picture = pictured(found[0], tiny_config.views)
    assert [view.name for view in picture.views] == ["global 1", "global 2", "local 1", "local 2"]
    np.testing.assert_allclose(
        np.array([view.box for view in picture.views])[:, [1, 0, 3, 2]], found[0].boxes / 28
    )
    assert picture.picture.uri.startswith("data:image/png;base64,") and picture.picture.tiny


def test_views_on_the_page(workdir):
    report = report_of(workdir, images=1)
    page = check(html_of(report))
    names = [image["title"] for image in page.all("img")]
    assert names == ["global 1", "global 2", "local 1", "local 2"]
    assert len(page.all("rect")) == 8  # each frame with a light one below it
    assert len(page.all("image")) == 1


def test_what_is_large_is_made_smaller(workdir):
    Image.fromarray(np.zeros((2000, 3000, 3), np.uint8)).save(workdir / "map.png")
    (figure,) = report_of(workdir, images=0).sections[0].figures
    assert (figure.picture.width, figure.picture.height) == (1300, 867)
    assert figure.picture.uri.startswith("data:image/webp;base64,")


def test_a_folder_that_is_no_workdir(tmp_path):
    for folder, why in ((tmp_path, "there is no config.json"),
                        (tmp_path / "none", "it is no folder")):  # fmt: skip
        with pytest.raises(UserError) as error:
            main([f"--workdir={folder}"])
        assert str(error.value).startswith(f"--workdir={folder}: {why}; give the workdir of a run")
        assert not (folder / "report.html").exists()


def lacks_of(workdir):
    """What a report lacks beside evaluations; the page is checked."""
    report = report_of(workdir, images=0)
    check(html_of(report))
    return report, [lack.what for lack in report.lacks if not lack.command]


def test_a_workdir_without_metrics(workdir):
    (workdir / "metrics.jsonl").unlink()
    report, lacks = lacks_of(workdir)
    assert lacks == ["curves: there is no metrics.jsonl"]
    assert not (report.charts or report.findings) and report.words["length"].startswith("6 steps")
    assert report.words["so far"] == "0 steps are logged"
    write_lines(workdir, [{"step": 0, "knn/top1/10": 5.0}])
    assert lacks_of(workdir)[1] == ["curves: no loss was logged yet (config.log_every_steps)"]


def test_a_run_of_three_steps(workdir):
    write_lines(workdir, made_up({}, {}, every=1))
    report, lacks = lacks_of(workdir)
    assert lacks == []
    titles = [finding.title for finding in report.findings]
    assert titles == ["too early to tell", "not at its end", "no collapse"]


def test_damaged_lines(workdir):
    metrics = workdir / "metrics.jsonl"
    whole = metrics.read_text().splitlines(keepends=True)
    odd = '{"step": 7, "loss": "much", "view_loss": [1]}\n'
    metrics.write_text("".join([*whole[:3], '{"step": 3, "lo\n', *whole[3:], odd, '{"step": 9']))
    report, lacks = lacks_of(workdir)
    assert lacks == ["damaged and left out: line 4, 12 of metrics.jsonl"]
    assert report.charts[0].curves["loss"].steps == [1, 2, 3, 4, 5, 6]


def test_images_without_labels_and_images_that_are_gone(workdir, tiny_config):
    photos = workdir.parent / "photos"
    for i in range(3):
        write_image(photos / f"{i}.png", value=40 * i)
    tiny_config.data.name, tiny_config.batch_size = f"folder:{photos}", 1
    write_run(workdir, tiny_config, num_images=3)
    report, lacks = lacks_of(workdir)
    assert [what.split(",")[0] for what in lacks] == [
        f"{title}: it needs labels" for title in ("k-NN", "Linear probe", "Few labels")
    ]
    shutil.rmtree(photos)
    (workdir / "figures").mkdir()
    (workdir / "figures" / "views.png").write_bytes(encoded(noise(0, 9, 9, 3)))
    report, lacks = lacks_of(workdir)
    assert lacks[0].startswith("views: the images are not at hand: config.data.name = 'folder:")
    assert report.views and report.views.width == 9  # as the run drew them


def test_a_converted_checkpoint(tmp_path, tiny_config):
    origin = {"source": "checkpoint.pth", "key": "teacher", "epoch": 300, "parts": "backbone"}
    config_file.write_config(tmp_path / "swin", tiny_config, origin)
    report, lacks = lacks_of(tmp_path / "swin")
    assert lacks == [] and not report.trained
    assert report.words == {
        "network": "swin_tiny, 0.00519 M parameters; matrix products in float32",
        "source": "checkpoint.pth", "key": "teacher", "epoch": "300",
    }  # fmt: skip
    tuning = {"epochs": 2.0, "class_names": ["cat", "dog"]}
    config_file.write_config(tmp_path / "tuned", tiny_config, {"parts": "backbone"} | {
        "source": "teacher of run", "finetune": tuning})  # fmt: skip
    write_lines(
        tmp_path / "tuned", [{"step": 7, "loss": 2.0}, {"step": 7, "finetune/top1/test": 9}]
    )
    report, lacks = lacks_of(tmp_path / "tuned")
    assert lacks == [] and report.findings == [] and report.charts[0].levels == {}
    assert report.words["finetune"] == "epochs 2.0; class names cat, dog"
    assert report.progress[0].rows == [["teacher after 7 steps", "9.0"]]


def test_an_export_is_no_run(workdir):
    facts = json.loads((workdir / "config.json").read_text())
    facts["facts"] |= {"format": "timm", "key": "teacher", "step": 6, "parts": "backbone"}
    export = workdir.parent / "export"
    export.mkdir()
    (export / "config.json").write_text("{}")  # timm's
    (export / "esvit_config.json").write_text(json.dumps(facts))
    report, lacks = lacks_of(export)
    assert lacks == [] and not report.trained
    assert report.words["format"] == "timm" and report.words["total steps"] == "6"
    (export / "esvit_config.json").unlink()
    with pytest.raises(UserError, match="config.json is not the config of a run: it lacks"):
        report_of(export)


def test_files_that_cannot_be_read(workdir):
    (workdir / "config.json").write_text("{")
    (workdir / "knn.json").write_text("[1]")
    (workdir / "linear.json").write_text("no JSON")
    (workdir / "map.png").write_bytes(b"no picture")
    report, lacks = lacks_of(workdir)
    assert lacks[0].startswith("what was trained: ") and "config.json is not the config" in lacks[0]
    assert lacks[1:] == [
        "knn.json is no report that can be read; run esvit knn again",
        "linear.json is no report that can be read; run esvit linear --fast again",
        "map.png is no picture; run esvit map again",
    ]
    assert report.charts and report.findings == []  # curves need no config, collapses do
    (workdir / "config.json").unlink()
    assert lacks_of(workdir)[1][0] == "what was trained: there is no config.json"


def test_names_are_text(workdir, tiny_config, monkeypatch):
    monkeypatch.chdir(workdir)
    assert report_of(".", images=0).name == "run"
    odd = workdir.rename(workdir.parent / '<b>&"a b')
    report = report_of(odd, images=0)
    page = check(html_of(report))
    assert '<b>&"a b' in page.words
    assert report.lacks[0].command == f"esvit knn --workdir='{odd}'"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize(
    ("width", "scheme", "page_color"), [(390, 0, (20, 24, 29)), (1280, 1, (246, 247, 249))]
)
def test_a_browser_shows_it_on_a_phone_in_dark_and_on_a_desktop_in_light(
    workdir, tiny_config, tmp_path, width, scheme, page_color
):
    tiny_config.views.num_local = 8
    write_run(workdir, tiny_config)
    add_evaluations(workdir)
    main([f"--workdir={workdir}", "--images=1"])
    picture = tmp_path / "shown.png"
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},5000",
        f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={picture}",
        (workdir / "report.html").as_uri(),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    shown = np.asarray(Image.open(picture).convert("RGB"))
    assert shown.shape == (5000, width, 3)
    # Nothing is wider than the page: its margins are empty.
    for edge in (shown[:, :12], shown[:, -12:]):
        assert (edge == page_color).all()
    assert (shown[:4000, 20:-20] != page_color).any(axis=(1, 2)).mean() > 0.5


def test_a_workdir_in_a_bucket(remote, workdir, capsys):
    add_evaluations(workdir)
    for file in filter(lambda path: path.is_file(), workdir.rglob("*")):
        target = remote / "run" / file.relative_to(workdir)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    main([f"--workdir={remote}/run", "--images=0"])
    assert f"written to {remote}/run/report.html" in capsys.readouterr().out
    main([f"--workdir={workdir}", "--images=0"])
    expected = (workdir / "report.html").read_text().replace(str(workdir), f"{remote}/run")
    assert (remote / "run" / "report.html").read_text() == expected
