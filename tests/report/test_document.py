"""The page says what was measured, names what users named, and needs nothing else."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from fgvc import api
from fgvc.api import report
from fgvc.config.loading import leaves
from fgvc.config.recipe import Recipe
from fgvc.errors import FgvcError
from fgvc.evaluation.metrics import score_logits
from fgvc.evaluation.paired import wilson
from fgvc.images.address import picture
from fgvc.images.decode import decode
from fgvc.images.overlay import overlay
from fgvc.images.preprocess import preprocess
from fgvc.report.document import duration
from fgvc.report.gallery import MISTAKES, gallery
from fgvc.runs.loaded import load_run
from fgvc.training import trainer
from tests.conftest import paint
from tests.report.test_localisation import numbers

NAMES = ("<i>red", "blue & \"bold\" 'un'", "麻雀")  # as folders sort them
COLOURS = ((200, 70, 60), (60, 80, 200), (70, 170, 80))


class Page(HTMLParser):
    """A page taken apart: its tables cell by cell, its text, the addresses in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.inside:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.inside = False

    def row(self, first: str) -> list[str]:
        return next(row for row in self.rows if row and row[0].strip() == first)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes whose names must be escaped or need a font; one picture of the validation split is broken."""
    root = tmp_path_factory.mktemp("named")
    for number, (name, colour) in enumerate(zip(NAMES, COLOURS, strict=True)):
        for split, count in (("train", 12), ("val", 6), ("test", 4)):
            for i in range(count):
                paint(root / split / name / f"{i:02d}.png", colour, seed=1000 * number + 100 * len(split) + i)
    (root / "val" / NAMES[2] / "05.png").write_bytes(b"no picture")
    return root


def trained(data: Path, out: Path, **changes: object) -> Path:
    tree = {
        "data": {"kind": "folder", "root": str(data), "max_unreadable": 0.5},
        "image": {"size": [64, 96]},
        "model": {"backbone": "test_resnet"},
        "train": {"epochs": 2, "batch_size": 8, "workers": 0, "device": "cpu", "max_steps": 4},
        "optim": {"lr": 0.01, "warmup_epochs": 0.5},
    }
    return trainer.train(Recipe.model_validate(tree | changes), out)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(data, tmp_path_factory.mktemp("runs") / "first")


@pytest.fixture(scope="module")
def other(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(
        data, tmp_path_factory.mktemp("runs") / "second", techniques={"dcl": {"grid": 2}}, loss={"kind": "focal"}
    )


@pytest.fixture(scope="module")
def text(run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return report([run], tmp_path_factory.mktemp("out") / "deep" / "r.html", images=4).read_text(encoding="utf-8")


def test_the_numbers_are_those_of_eval(run: Path, text: str) -> None:
    scores = api.evaluate(run).scores
    page = Page(text)
    words = "".join(page.texts)
    for share in (scores.top1, scores.top5, scores.macro_f1, scores.balanced_accuracy, scores.ece):
        assert f"{100 * share:.2f} %" in words
    assert f"{scores.loss:.4f}" in words
    assert f"{scores.images} images" in words
    for row in scores.by_class(load_run(run).classes):
        cells = [cell.strip() for cell in page.row(str(row["class"]))]
        expected = [f"{100 * row[key]:.1f}" if row[key] != "" else "" for key in ("recall", "precision", "f1")]
        assert cells[1:5] == [str(row["images"]), *expected]
        assert cells[5].startswith(str(row["taken_for"]))
    assert [row[0] for row in page.rows if row[:1] and row[0] in load_run(run).classes] == [
        row["class"] for row in sorted(scores.by_class(load_run(run).classes), key=lambda row: row["recall"])
    ]


def test_the_verdict_comes_first_and_the_matrix_has_its_numbers(run: Path, text: str) -> None:
    """A run of random first weights has no floor, and the page says so."""
    assert text.index("No floor to compare with") < text.index("<nav>") < text.index('id="curves"')
    assert "What the network sees" in text
    confusion, classes = api.evaluate(run).scores.confusion, load_run(run).classes
    page = Page(text)
    for number, (name, counts) in enumerate(zip(classes, confusion.tolist(), strict=True), 1):
        assert [cell.strip() for cell in page.row(f"{number} {name}")][1:] == [str(count or "") for count in counts]


def test_nothing_is_fetched_run_or_left_unescaped(run: Path, text: str) -> None:
    page = Page(text)
    assert not page.tags & {"script", "link", "iframe", "object", "i"}
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    for name in load_run(run).classes:
        assert name in "".join(page.texts)
    kinds = set()
    for address in page.addresses:
        if address.startswith("data:image/jpeg"):
            kinds.add(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).size)
    assert kinds == {(224, 149), (48, 40)}, "crops, and a picture as it is stored"
    anchors = set(re.findall(r'id="([^"]+)"', text))
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= anchors


def test_an_unreadable_picture_is_named_and_not_counted(text: str) -> None:
    assert "1 image could not be read" in text
    assert "05.png: not an image" in text


def test_the_same_run_gives_the_same_bytes(run: Path, text: str, tmp_path: Path) -> None:
    assert report([run], tmp_path / "again.html", images=4).read_text(encoding="utf-8") == text


def test_worst_and_most_uncertain_by_their_definitions(run: Path) -> None:
    loaded = load_run(run)
    answers = loaded.answers(loaded.rows_of()[1])
    scores = score_logits(answers.logits, answers.labels)
    chosen = gallery(loaded, answers, scores, None, images=5)
    z, y = torch.from_numpy(answers.logits), torch.from_numpy(answers.labels)
    losses = F.cross_entropy(z, y, reduction="none")
    paths = loaded.index.paths[answers.rows]
    assert [shot.path for shot in chosen.worst] == [str(paths[at]) for at in losses.argsort(descending=True)[:5]]
    top = z.softmax(1).topk(2).values
    assert [shot.path for shot in chosen.uncertain] == [str(paths[at]) for at in (top[:, 0] - top[:, 1]).argsort()[:5]]
    assert sum(sum(pair.counts) for pair in chosen.pairs) == int((z.argmax(1) != y).sum())
    for pair in chosen.pairs:
        for (true, other), count, shots in zip((pair.classes, pair.classes[::-1]), pair.counts, pair.shots, strict=True):
            assert len(shots) == min(count, MISTAKES)
            assert all((shot.true, shot.predicted) == (true, other) for shot in shots)
        assert all(pair.examples)


def pixels(address: str | None) -> np.ndarray:
    assert address is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))), dtype=float)


@pytest.mark.parametrize("tokens", [False, True])
def test_maps_are_grad_cam_of_the_class_that_is_said(run: Path, data: Path, tmp_path: Path, tokens: bool) -> None:
    """By autograd alone, laid over the picture of the page; of a ViT that reads the class token, before its last block."""
    if tokens:
        kwargs = {"global_pool": "token", "img_size": 64}
        model, size = {"backbone": "test_vit", "kwargs": kwargs}, {"size": 64}
        run = trained(data, tmp_path / "vit", model=model, image=size)
    loaded = load_run(run)
    answers = loaded.answers(loaded.rows_of()[1])
    chosen = gallery(loaded, answers, score_logits(answers.logits, answers.labels), None, images=4)
    assert chosen.unmapped == ""
    net, away = loaded.step.net, []
    rows = {str(path): row for row, path in enumerate(loaded.index.paths)}
    for shot in (*chosen.worst, *chosen.uncertain):
        x = torch.from_numpy(preprocess(decode(loaded.index.path(rows[shot.path])), loaded.preprocess))[None]
        tapped_maps: list[torch.Tensor] = []
        tapped = net.blocks[-1].norm1 if tokens else net.layer4
        handle = tapped.register_forward_hook(lambda module, given, a, tapped_maps=tapped_maps: tapped_maps.append(a))
        (gradient,) = torch.autograd.grad(net(x)[0, loaded.classes.index(shot.predicted)], tapped_maps[0])
        handle.remove()
        if tokens:
            a, g = (t[:, 1:].transpose(1, 2).unflatten(2, (4, 4)) for t in (tapped_maps[0], gradient))
        else:
            a, g = tapped_maps[0], gradient
        raw = (g.mean((2, 3), keepdim=True) * a).sum(1, keepdim=True).clamp(min=0)
        large = F.interpolate(raw, loaded.preprocess.size, mode="bilinear")[0, 0].detach().numpy()
        if not np.ptp(large):
            continue
        large = (large - large.min()) / np.ptp(large)
        page, crop = pixels(shot.map), Image.fromarray(np.uint8(pixels(shot.picture)))
        right, wrong = (
            np.abs(pixels(picture(overlay(crop, one), side=224)) - page).mean() for one in (large, large[:, ::-1])
        )
        assert right < 4, "no more than JPEG costs"
        away.append(wrong / right)
    assert np.median(away) > 3, "another map would show"


def test_runs_side_by_side(run: Path, other: Path, tmp_path: Path) -> None:
    page = Page(report([run, other], tmp_path / "r.html", images=1).read_text(encoding="utf-8"))
    assert page.rows[0] == ["", "first", "second"]
    both = [api.evaluate(folder).scores for folder in (run, other)]
    assert page.row("top-1")[1:] == [f"{100 * scores.top1:.2f} %" for scores in both]
    assert page.row("techniques")[1:] == ["none", "dcl"]
    assert page.row("loss.kind")[1:] == ["cross_entropy", "focal"]
    assert page.row("techniques.dcl")[1] == "null"
    assert "grid: 2" in page.row("techniques.dcl")[2]
    assert not [row for row in page.rows if len(row) == 3 and row[0] in ("optim.lr", "data.root")]


def test_runs_that_can_not_share_a_page_are_refused(run: Path, colours: Path, tmp_path: Path) -> None:
    third = trained(colours, tmp_path / "third")
    with pytest.raises(FgvcError, match=r"first and .*third have different classes \(3 and 3; .* is in one alone"):
        report([run, third], tmp_path / "r.html")
    with pytest.raises(FgvcError, match="the same run twice"):
        report([run, run], tmp_path / "r.html")
    with pytest.raises(FgvcError, match="is a folder"):
        report([run], tmp_path)
    assert not (tmp_path / "r.html").exists()


def test_localisation_is_shown_where_it_was_measured(run: Path, text: str, tmp_path: Path) -> None:
    assert "fgvc localize" in text
    path = run / "localisation.json"
    path.write_text(json.dumps({"val.last.gradcam": numbers()}))
    try:
        page = Page(report([run], tmp_path / "r.html", images=1).read_text(encoding="utf-8"))
        path.write_text("{")
        with pytest.raises(FgvcError, match=r"localisation\.json: not as fgvc wrote it"):
            report([run], tmp_path / "none.html", images=1)
    finally:
        path.unlink()
    assert not (tmp_path / "none.html").exists()
    assert page.row("MaxBoxAccV2 (oracle)")[1:] == ["8.0", "8.1", "8.2", ""]


def test_wilson_durations_and_leaves_by_hand() -> None:
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)  # 1 - 1 / (1 + z^2 / 10)
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert [duration(s) for s in (4.4, 61, 3661)] == ["4 s", "1 min 1 s", "1 h 1 min"]
    assert dict(leaves({"a": {"b": 1, "c": {}}, "d": [1]})) == {"a.b": 1, "a.c": {}, "d": [1]}
