"""What stands around a model: known of bundles, stated of lone files, never guessed in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fgvc import api
from fgvc.cli import show
from fgvc.cli.app import main
from fgvc.config.images import Preprocess
from fgvc.errors import FgvcError
from fgvc.runtime.bundle import load_bundle, write_bundle
from fgvc.runtime.stack import Stack, agreement, stack_of
from tests.serving.small import LABELS, SIZE, network, save_bundle

FED = Preprocess(size=(SIZE, SIZE), resize="squash", crop_pct=1.0, mean=(0, 0, 0), std=(1, 1, 1))
TURNED = LABELS[::-1]


@pytest.fixture
def lone(tmp_path: Path) -> Path:
    (tmp_path / "lone").mkdir()
    path = tmp_path / "lone" / "net.onnx"
    path.write_bytes(network(3))
    return path


def stated(folder: Path, **changed: Any) -> Path:
    """A file for --preprocess."""
    path = folder / "fed.json"
    path.write_text(json.dumps(FED.model_dump(mode="json") | changed))
    return path


Verify = Callable[..., tuple[int, str]]


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Verify:
    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["verify", *map(str, arguments)])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out + err

    return run


def test_a_file_is_known_by_what_lies_beside_it_or_is_stated(lone: Path, tmp_path: Path) -> None:
    bundle = save_bundle(tmp_path / "b")
    for path in (bundle, bundle / "model.onnx"):
        stack = stack_of(path)
        assert (stack.preprocess, list(stack.labels or ()), stack.model) == (FED, LABELS, bundle / "model.onnx")
        with pytest.raises(FgvcError, match=r"--preprocess .*has its own, .*leave the option out"):
            stack_of(path, preprocess=stated(tmp_path))
    bare = stack_of(lone)
    assert (bare.preprocess, bare.labels) == (None, None)
    names = tmp_path / "names.txt"
    names.write_text("\n".join(TURNED))
    other = stack_of(lone, labels=names, preprocess=stated(tmp_path, channel_order="bgr"))
    assert other.labels == tuple(TURNED)
    assert other.preprocess is not None
    assert other.preprocess.channel_order == "bgr"
    with pytest.raises(FgvcError, match="no such bundle"):
        stack_of(tmp_path / "nowhere")


@pytest.mark.parametrize("key", [key for key in Preprocess.model_fields if key not in Preprocess.later])
def test_a_partial_preprocessing_is_refused_wherever_it_is_read(lone: Path, tmp_path: Path, key: str) -> None:
    """A default would be a guess at what somebody's stack does."""
    partial = {name: value for name, value in FED.model_dump(mode="json").items() if name != key}
    path = tmp_path / "partial.json"
    path.write_text(json.dumps(partial))
    with pytest.raises(FgvcError, match=f"partial.json: says nothing of {key};"):
        stack_of(lone, preprocess=path)
    (lone.parent / "preprocess.json").write_text(json.dumps(partial))
    with pytest.raises(FgvcError, match=f"says nothing of {key};"):
        stack_of(lone)


def test_all_missing_keys_are_named_and_impossible_ones_refused(lone: Path, tmp_path: Path) -> None:
    path = tmp_path / "fed.json"
    for tree, message in (
        (
            {"size": [8, 8], "mean": [0, 0, 0]},
            "resize, crop_pct, interpolation, channel_order, input_range, std, fill",
        ),
        ({}, "size, resize, crop_pct"),
        ({"sise": [8, 8]}, "did you mean 'size'"),
        (FED.model_dump() | {"mean": [124, 116, 104]}, "outside of 0..1"),
        (FED.model_dump() | {"std": [0, 1, 1]}, "must be above 0"),
    ):
        path.write_text(json.dumps(tree))
        with pytest.raises(FgvcError, match=message):
            stack_of(lone, preprocess=path)


def test_a_bundle_with_an_impossible_mean_is_not_loaded(tmp_path: Path) -> None:
    tree = FED.model_dump(mode="json") | {"mean": [124, 116, 104]}
    files = {
        "model.onnx": network(),
        "labels.json": LABELS,
        "preprocess.json": tree,
        "contract.json": {"num_classes": 3},
    }
    write_bundle(tmp_path / "b", files=files | {"metrics.json": {}})
    with pytest.raises(FgvcError, match=r"preprocess.json: mean: .*outside of 0..1"):
        load_bundle(tmp_path / "b")


def test_an_agreement_names_what_differs_and_what_nobody_says() -> None:
    def stack(name: str, preprocess: Preprocess | None = FED, labels: list[str] | None = LABELS) -> Stack:
        return Stack(path=Path(name), preprocess=preprocess, labels=tuple(labels) if labels else None)

    same = agreement(stack("a"), stack("b"))
    assert (same.preprocess, same.labels, same.differences, same.unproved) == ("the same", "the same", (), "")
    bgr = FED.model_copy(update={"channel_order": "bgr", "fill": (0, 0, 0)})
    other = agreement(stack("a"), stack("b", bgr, TURNED))
    assert (other.preprocess, other.labels, other.unproved) == ("other", "other", "")
    assert [line.partition(":")[0] for line in other.differences] == ["channel_order", "labels"]
    half = agreement(stack("a"), stack("b", None, TURNED))
    assert (half.preprocess, half.labels) == ("not known", "other")
    assert "b: says nothing of its preprocessing" in half.unproved
    assert "std (1, 1, 1)" in half.unproved, "what is assumed"
    assert "--preprocess FILE" in half.unproved
    assert "--labels" not in half.unproved
    numbers = sorted(str(n) for n in range(1, 13))
    lone = agreement(stack("a", FED, numbers), stack("b", FED, None))
    assert "sorted as text (1, 10, 11, 12, 2, ...)" in lone.unproved
    assert "timm" in lone.unproved
    nobody = agreement(stack("a", None), stack("b", None))
    assert "a and b: says nothing" in nobody.unproved
    assert all(pair.unproved.count("\n") == 0 for pair in (half, lone, nobody))


@pytest.mark.parametrize("place", ["", "model.onnx"])
def test_bundles_that_agree_in_all_are_a_drop_in(verify: Verify, tmp_path: Path, place: str) -> None:
    a, b = save_bundle(tmp_path / "a", 1), save_bundle(tmp_path / "b", 2)
    code, output = verify(a / place, "--against", b / place)
    assert code == 0
    assert "a drop-in replacement: the graphs are identical, preprocessing and labels are the same" in output
    code, output = verify(
        save_bundle(tmp_path / "c", 1, preprocess={"input_range": 255, "std": (255,) * 3}), "--against", b
    )
    assert (code, "a drop-in replacement" in output) == (0, True)


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ({"labels": TURNED}, ["labels: 2 of 3 outputs", "other labels"]),
        ({"preprocess": {"resize": "pad"}}, ["resize: squash against pad", "other preprocessing"]),
        ({"preprocess": {"mean": (0.5, 0.5, 0.5)}}, ["mean of R, G, B: (0, 0, 0) against (0.5, 0.5, 0.5)"]),
        (
            {"labels": TURNED, "preprocess": {"interpolation": "bilinear"}},
            ["interpolation: bicubic against bilinear", "labels:", "other preprocessing, labels"],
        ),
    ],
)
@pytest.mark.parametrize("place", ["", "model.onnx"])
def test_bundles_that_are_fed_or_read_otherwise_are_none(
    verify: Verify, tmp_path: Path, change: dict[str, Any], lines: list[str], place: str
) -> None:
    a, b = save_bundle(tmp_path / "a", 1), save_bundle(tmp_path / "b", 1, **change)
    show.console.width = 300
    code, out = verify(a / place, "--against", b / place)
    assert code == 1
    assert "NOT a drop-in" in out
    assert "a drop-in replacement" not in out
    for line in lines:
        assert line in out


def test_a_lone_file_proves_its_graph_alone(verify: Verify, lone: Path, tmp_path: Path) -> None:
    bundle, another = save_bundle(tmp_path / "a", 1), tmp_path / "another.onnx"
    another.write_bytes(network(5))
    show.console.width = 300
    for pair in ((bundle, lone), (lone, bundle), (lone, another)):
        code, out = verify(pair[0], "--against", pair[1])
        assert code == 0
        assert "drop-in replacement" not in out
        assert "the graphs are identical; whether it is a drop-in was not proved" in out
        assert (
            sum("not proved: " in line and "says nothing of its preprocessing" in line for line in out.splitlines())
            == 1
        )
    names = tmp_path / "names.json"
    names.write_text(json.dumps(LABELS))
    code, out = verify(bundle, "--against", lone, "--labels", names, "--preprocess", stated(tmp_path))
    assert (code, "a drop-in replacement" in out) == (0, True)
    code, out = verify(bundle, "--against", lone, "--labels", names)
    assert (code, "drop-in replacement" in out, "of its preprocessing" in out) == (0, False, True)
    code, out = verify(bundle, "--against", lone, "--preprocess", stated(tmp_path, input_range=255))
    assert (code, "input_range: 1 against 255" in out) == (1, True)
    assert verify(bundle, "--labels", names)[0] == 2
    assert api.verify(bundle, against=lone).passed
