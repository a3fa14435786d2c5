"""Sides of a comparison: .onnx files and bundles of known answers on painted pictures."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from fgvc import api
from fgvc.cli import show
from fgvc.cli.app import main
from fgvc.config.calibration import Calibration
from fgvc.config.images import Preprocess
from fgvc.errors import FgvcError
from fgvc.evaluation.side import open_sides
from fgvc.report.compare import write_page
from fgvc.runtime.bundle import read_labels, write_bundle

NAMES = ["红", "green", "blue"]  # the position is that of the channel
PLAIN = Preprocess(size=(8, 8), resize="squash", crop_pct=1.0, mean=(0, 0, 0), std=(1, 1, 1))


def network(order: list[int], *, lost: int | None = None, scale: float = 1) -> bytes:
    """Output k is the mean of channel order[k], times 10 `scale`; of channel `lost` nothing is seen."""
    weight = 10 * np.float32(scale) * np.eye(3, dtype=np.float32)[:, order]
    if lost is not None:
        weight[lost] = 0
    nodes = [
        helper.make_node("GlobalAveragePool", ["input"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(weight, "w")],
    )
    return onnx.helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def bundle(
    folder: Path,
    order: list[int],
    *,
    lost: int | None = None,
    known: Calibration | None = None,
    scale: float = 1,
    fed: Preprocess = PLAIN,
) -> Path:
    files = {
        "model.onnx": network(order, lost=lost, scale=scale),
        "labels.json": [NAMES[k] for k in order],
        "preprocess.json": fed,
        "contract.json": {"num_classes": 3},
        "metrics.json": {},
    } | ({"calibration.json": known} if known else {})
    write_bundle(folder, files=files)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five of each colour, and one file that is none."""
    root = tmp_path_factory.mktemp("pictures")
    for channel, name in enumerate(NAMES):
        (root / name).mkdir()
        for n in range(5):
            colour = [10, 10, 10]
            colour[channel] = 200 + n
            Image.new("RGB", (12, 10), tuple(colour)).save(root / name / f"{n}.png")
    (root / "blue" / "broken.png").write_bytes(b"no picture")
    return root


def test_classes_in_another_order_are_the_same_classes(pictures: Path, tmp_path: Path) -> None:
    a, b = bundle(tmp_path / "a", [0, 1, 2]), bundle(tmp_path / "b", [2, 0, 1])
    comparison = api.compare(a, b, data=str(pictures))
    assert (comparison.paired.images, comparison.paired.gain, comparison.paired.p) == (15, 0, 1)
    assert comparison.paired.a_right.all()
    assert comparison.paired.b_right.all()
    assert comparison.flips() == []
    assert comparison.split == "all"
    assert [error.rpartition(": ")[2] for error in comparison.unreadable] == ["not an image"]


def test_what_is_lost_is_found_with_its_images(pictures: Path, tmp_path: Path) -> None:
    a, b = bundle(tmp_path / "a", [0, 1, 2]), bundle(tmp_path / "b", [2, 0, 1], lost=0)
    comparison = api.compare(a, b, data=str(pictures))
    pair = comparison.paired
    assert pair.negative.sum() == 5
    assert pair.gain == pytest.approx(-1 / 3)
    assert {Path(flip["path"]).parent.name for flip in comparison.flips()} == {"红"}
    assert {(flip["flip"], flip["class"], flip["a"]) for flip in comparison.flips()} == {("negative", "红", "红")}
    assert pair.by_class(comparison.classes)[0]["change"] == -1
    back = api.compare(b, a, data=str(pictures))
    assert back.paired.gain == -pair.gain
    assert {flip["flip"] for flip in back.flips()} == {"positive"}
    assert back.paired.positive.sum() == 5
    write_page(comparison, tmp_path / "out" / "page.html", failures=["<b>no</b>"])
    page = (tmp_path / "out" / "page.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == 5
    assert "红" in page
    assert "&lt;b&gt;no" in page
    with open(tmp_path / "out" / "page.csv", encoding="utf-8") as file:
        assert [row["class"] for row in csv.DictReader(file)] == ["红"] * 5
    assert "红,5,1.0,0.0,-1.0,5,0" in (tmp_path / "out" / "page-classes.csv").read_text(encoding="utf-8")
    write_page(comparison, tmp_path / "again.html", failures=["<b>no</b>"])
    assert (tmp_path / "again.html").read_text(encoding="utf-8").replace("again.csv", "page.csv") == page


def test_a_bare_file_takes_labels_and_the_other_sides_eyes(pictures: Path, tmp_path: Path) -> None:
    a = bundle(tmp_path / "a", [0, 1, 2])
    bare, names = tmp_path / "bare" / "new.onnx", tmp_path / "names.txt"
    bare.parent.mkdir()
    bare.write_bytes(network([1, 2, 0]))
    names.write_text("green\nblue\n红\n", encoding="utf-8")
    assert api.compare(a, bare, data=str(pictures), labels=names, seen="none").paired.negative.sum() == 0
    (tmp_path / "names.json").write_text(json.dumps(["green", "blue", "红"]))
    assert read_labels(tmp_path / "names.json") == read_labels(names)
    with pytest.raises(FgvcError, match="give --labels"):
        open_sides(a, bare)
    with pytest.raises(FgvcError, match="give --preprocess|Give --preprocess"):
        open_sides(bare, bare, labels=names)
    (tmp_path / "eyes.json").write_text(PLAIN.model_dump_json())
    assert api.compare(bare, bare, data=str(pictures), labels=names, preprocess=tmp_path / "eyes.json", seen="none").paired.p == 1
    with pytest.raises(FgvcError, match="leave the option out"):
        open_sides(a, a / "model.onnx", labels=names)
    assert open_sides(a, a / "model.onnx")[1].classes == tuple(NAMES)  # what lies beside it


def test_each_side_sees_by_its_own_eyes_and_differences_are_said(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """B's stack feeds BGR: its file answers rightly so, and by A's eyes would take red for blue."""
    bgr = PLAIN.model_copy(update={"channel_order": "bgr"})
    a, b = bundle(tmp_path / "a", [0, 1, 2]), bundle(tmp_path / "b", [2, 1, 0], fed=bgr)
    (b / "labels.json").write_text(json.dumps(NAMES))  # its output 0 reads channel 2, which is red
    for name in ("manifest.json", "metrics.json"):
        (b / name).unlink()
    comparison = api.compare(a, b / "model.onnx", data=str(pictures), seen="none")
    assert comparison.paired.b_right.all()
    assert comparison.differences == ("channel_order: rgb against bgr",)
    assert not comparison.notes
    blind = tmp_path / "blind" / "model.onnx"
    blind.parent.mkdir()
    blind.write_bytes((b / "model.onnx").read_bytes())
    (tmp_path / "names.json").write_text(json.dumps(NAMES))
    assumed = api.compare(a, blind, data=str(pictures), labels=tmp_path / "names.json", seen="none")
    assert assumed.paired.b_right.sum() == 5, "by A's eyes only green is right"
    assert "says nothing of its preprocessing; assumed, as" in assumed.notes[0]
    show.console.width = 300
    show.comparison(comparison, [])
    output = capsys.readouterr().out
    assert "B is not a drop-in for A" in output
    assert "channel_order: rgb against bgr" in output
    write_page(comparison, tmp_path / "page.html")
    assert "B is not a drop-in for A" in (tmp_path / "page.html").read_text(encoding="utf-8")
    show.comparison(api.compare(a, a, data=str(pictures)), [])
    assert "drop-in" not in capsys.readouterr().out


def test_another_order_of_labels_is_said(pictures: Path, tmp_path: Path) -> None:
    a, b = bundle(tmp_path / "a", [0, 1, 2]), bundle(tmp_path / "b", [2, 1, 0])
    (line,) = api.compare(a, b, data=str(pictures)).differences
    assert line.startswith("labels: 2 of 3 outputs mean another class, the first of them output 0: '红' against 'blue'")


@pytest.mark.parametrize("gate", [["--max-negative-flips", "5"], ["--min-gain=-100"]])
def test_a_gate_does_not_judge_by_what_is_only_assumed(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], gate: list[str]
) -> None:
    b, lone, names, eyes = (
        bundle(tmp_path / "b", [0, 1, 2]),
        tmp_path / "old.onnx",
        tmp_path / "names.json",
        tmp_path / "eyes.json",
    )
    lone.write_bytes(network([0, 1, 2]))
    names.write_text(json.dumps(NAMES))
    eyes.write_text(PLAIN.model_dump_json())

    def code(*arguments: object) -> int:
        with pytest.raises(SystemExit) as ended:
            main(["compare", *map(str, arguments), "--data", str(pictures), "--seen", "none"])
        return int(ended.value.code or 0)

    for sides in ((lone, b), (b, lone)):
        assert code(*sides, "--labels", names) == 0
        assert "warning: " in capsys.readouterr().out
        assert code(*sides, "--labels", names, *gate) == 2
        assert "old.onnx: nothing says how" in (message := capsys.readouterr().err)
        assert "--preprocess FILE" in message
        assert code(*sides, *gate) == 2
        assert "give --preprocess FILE and --labels FILE" in capsys.readouterr().err
        assert code(*sides, "--preprocess", eyes, *gate) == 2
        assert "give --labels FILE" in capsys.readouterr().err
        assert code(*sides, "--labels", names, "--preprocess", eyes, *gate) == 0
        assert "warning: " not in capsys.readouterr().out


def test_two_lone_files_take_one_option_or_one_each(pictures: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a.onnx", tmp_path / "b.onnx"
    a.write_bytes(network([0, 1, 2]))
    b.write_bytes(network([2, 1, 0]))
    files = {}
    for name, order in (("a", [0, 1, 2]), ("b", [2, 1, 0])):
        files[name] = tmp_path / f"{name}.json"
        files[name].write_text(json.dumps([NAMES[k] for k in order]))
    eyes, bgr = tmp_path / "eyes.json", tmp_path / "bgr.json"
    eyes.write_text(PLAIN.model_dump_json())
    bgr.write_text(PLAIN.model_copy(update={"channel_order": "bgr"}).model_dump_json())
    options = {"data": str(pictures), "certain": True, "seen": "none"}
    comparison = api.compare(a, b, labels=[files["a"], files["b"]], preprocess=eyes, **options)
    assert comparison.paired.a_right.all()
    assert comparison.paired.b_right.all()
    assert [line.partition(":")[0] for line in comparison.differences] == ["labels"]
    comparison = api.compare(a, b, labels=files["a"], preprocess=[eyes, bgr], **options)
    assert comparison.paired.b_right.all(), "read in A's order, and fed with BGR"
    assert [line.partition(":")[0] for line in comparison.differences] == ["channel_order"]
    c = bundle(tmp_path / "c", [0, 1, 2])
    for wrong in ([eyes, eyes], [eyes, eyes, eyes]):
        with pytest.raises(FgvcError, match="--preprocess"):
            open_sides(c, b, labels=files["b"], preprocess=wrong)
    eyes.write_text(PLAIN.model_copy(update={"input_range": 255, "std": (0.2, 0.2, 0.2)}).model_dump_json())
    (doubt,) = api.compare(c, b, data=str(pictures), labels=files["b"], preprocess=eyes, seen="none").notes
    assert doubt.startswith(f"{b}: std (0.2, 0.2, 0.2), where white is 255, is ")
    assert "in other units" in doubt
    eyes.write_text(PLAIN.model_copy(update={"input_range": 255}).model_dump_json())  # the net's own affair
    assert not api.compare(c, b, data=str(pictures), labels=files["b"], preprocess=eyes, seen="none").notes
    (tmp_path / "part.json").write_text('{"size": [8, 8]}')
    with pytest.raises(FgvcError, match="says nothing of resize"):
        open_sides(c, b, labels=files["b"], preprocess=tmp_path / "part.json")


def test_sides_that_can_not_be_compared_are_refused(pictures: Path, tmp_path: Path) -> None:
    a, bare = bundle(tmp_path / "a", [0, 1, 2]), tmp_path / "new.onnx"
    bare.write_bytes(network([0, 1, 2]))
    (tmp_path / "other.txt").write_text("红\ngreen\nviolet\n", encoding="utf-8")
    with pytest.raises(FgvcError, match=r"new.onnx lacks blue"):
        open_sides(a, bare, labels=tmp_path / "other.txt")
    (tmp_path / "two.txt").write_text("红\ngreen\n", encoding="utf-8")
    with pytest.raises(FgvcError, match="lacks"):
        open_sides(a, bare, labels=tmp_path / "two.txt")
    with pytest.raises(FgvcError, match="gives"):
        open_sides(bare, bare, labels=tmp_path / "two.txt", preprocess=a / "preprocess.json")
    with pytest.raises(FgvcError, match="which images"):
        api.compare(a, a)
    with pytest.raises(FgvcError, match="no test split"):
        api.compare(a, a, data=str(pictures), split="test")
    (tmp_path / "alien" / "violet").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "alien" / "violet" / "1.png")
    with pytest.raises(FgvcError, match=r"does not know: violet"):
        api.compare(a, a, data=str(tmp_path / "alien"))
    with pytest.raises(FgvcError, match="no such run"):
        open_sides(a, tmp_path / "nowhere")


def test_what_none_of_these_holds_back_is_counted(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Logits of B: 10 * (200 + n) / 255 for the picture's colour, 10 * 10 / 255 for another, 0 for the one that it can't see.
    calibration = Calibration(
        temperature=9.0, threshold=0.541, keep=0.95, fitted_on="val", images=80, nll_before=1, nll_after=1,
        ece_before=0.2, ece_after=0.1, kept=0.95, coverage=0.9, accuracy=0.8,
    )  # fmt: skip
    a, b = bundle(tmp_path / "a", [0, 1, 2]), bundle(tmp_path / "b", [2, 0, 1], lost=0, known=calibration)
    z = [10 * np.array([200 + n, 10, 0]) / 255 / 9 for n in range(5)]
    below = sum(bool(np.exp(x[0]) / np.exp(x).sum() < 0.541) for x in z)
    assert 0 < below < 5
    comparison = api.compare(a, b, data=str(pictures))
    assert comparison.rejections() == [(0, 0), (5 + 2 * below, 2 * below)]
    assert comparison.paired.negative.sum() == 5  # as without a threshold
    show.console.width = 200
    show.comparison(comparison, [])
    assert f"{5 + 2 * below} " in next(line for line in capsys.readouterr().out.splitlines() if f"B {b}" in line)
    write_page(comparison, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"B answers &ldquo;none of these&rdquo; to {5 + 2 * below} images, {2 * below} of which" in page
    assert "A answers" not in page
    plain = api.compare(a, a, data=str(pictures))
    show.comparison(plain, [])
    assert "none of these" not in capsys.readouterr().out
    write_page(plain, tmp_path / "plain.html")
    assert "none of these" not in (tmp_path / "plain.html").read_text(encoding="utf-8")
    assert (tmp_path / "plain.csv").read_text() == "path,flip,class,a,a_confidence,b,b_confidence,a_calibrated,b_calibrated\n"


@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused(pictures: Path, tmp_path: Path, scale: float) -> None:
    a = bundle(tmp_path / "a", [0, 1, 2])
    with np.errstate(invalid="ignore"):  # inf * 0
        b = bundle(tmp_path / "sick", [0, 1, 2], scale=scale)
    for sides in ((a, b), (b, a)):
        with pytest.raises(
            FgvcError, match=r"sick: gives logits that are no numbers .* 15 of 15 images, .*blue.0\.png"
        ):
            api.compare(*sides, data=str(pictures))


@pytest.mark.parametrize(
    ("options", "code", "output"),
    [
        ([], 0, "-33.33 points"),
        (["--max-negative-flips", "5"], 0, "5 (33.33 %)"),
        (["--max-negative-flips", "10%"], 1, "FAIL: 5 negative flips"),
        (["--min-gain", "0"], 1, "FAIL: a gain of -33.33"),
        (["--min-gain=-50"], 0, ""),
        (["--max-negative-flips", "much"], 2, ""),
        (["--out", "page.pdf"], 2, ""),
    ],
)
def test_exit_code_and_output_of_the_verb(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, output: str
) -> None:
    a, b = bundle(tmp_path / "a", [0, 1, 2]), bundle(tmp_path / "b", [0, 1, 2], lost=0)
    show.console.width = 120
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(a), str(b), "--data", str(pictures), *options])
    assert (ended.value.code or 0) == code
    assert output in capsys.readouterr().out
