"""Two verdicts on two files, and few lines where they differ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from fgvc.cli.app import main
from fgvc.exporting.verify import verify_files
from tests.exporting.test_spelling import _attribute, classifier, compute_shapes, stored, write_defaults


def write(path: Path, *changes) -> Path:
    model = classifier()
    for change in changes:
        change(model)
    onnx.save(model, path)
    return path


def keep_norms(model: onnx.ModelProto) -> None:
    """A batch norm behind both convolutions of the branches."""
    for name, value in (("left", "c2"), ("right", "c3")):
        at = [node.name for node in model.graph.node].index(name)
        model.graph.node[at].output[0] = f"{value}_raw"
        for key, number in (("gamma", 1.0), ("beta", 0.0), ("mean", 0.0), ("var", 1.0)):
            model.graph.initializer.append(stored(f"{value}_{key}", np.full(4, number)))
        inputs = [f"{value}_raw", *(f"{value}_{key}" for key in ("gamma", "beta", "mean", "var"))]
        model.graph.node.insert(at + 1, helper.make_node("BatchNormalization", inputs, [value], name=f"{name}/bn"))


def other_weights(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.ndim and array.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(array + 1, tensor.name))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main(["verify", *arguments])
    return int(stop.value.code or 0), capsys.readouterr().out


def test_identical_graphs_pass_strictly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a.onnx", other_weights), write(tmp_path / "b.onnx")
    code, out = run(capsys, str(a), "--against", str(b), "--strict")
    assert code == 0
    assert "the graphs are identical" in out


def test_another_spelling_is_equal_but_not_strictly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a.onnx", other_weights, write_defaults, compute_shapes), write(tmp_path / "b.onnx")
    code, out = run(capsys, str(a), "--against", str(b))
    assert code == 0
    assert "equal but for spelling" in out
    assert "default attributes (" in out
    assert "shape arithmetic (3 here, 0 there)" in out
    code, out = run(capsys, str(a), "--against", str(b), "--strict")
    assert code == 1
    assert "NOT a drop-in: other spelling" in out


def test_folded_norms_are_one_line(tmp_path: Path) -> None:
    kept, folded = write(tmp_path / "kept.onnx", keep_norms), write(tmp_path / "folded.onnx")
    result = verify_files(folded, kept)
    assert result.verdict == "different"
    assert not result.passed
    (line,) = result.summary
    assert line.startswith("your file keeps its 2 BatchNormalizations; export with `export.batch_norm: keep`")
    (line,) = verify_files(kept, folded).summary
    assert line.startswith("your file has its 2 BatchNormalizations folded into convolutions; export with")


def test_norms_that_are_folded_hide_no_other_difference(tmp_path: Path) -> None:
    kept = write(tmp_path / "kept.onnx", keep_norms)
    folded = write(tmp_path / "folded.onnx", _attribute("pool", "ceil_mode", 1))
    norms, other = verify_files(folded, kept).summary
    assert "keeps its 2 BatchNormalizations" in norms
    assert "ceil_mode" in other


def test_equal_differences_are_told_once_with_their_count_and_all_of_them_in_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def wider(model: onnx.ModelProto) -> None:
        keep_norms(model)
        for node in model.graph.node:
            if node.op_type == "BatchNormalization":
                node.attribute.append(helper.make_attribute("epsilon", 0.001))

    a, b, listed = write(tmp_path / "a.onnx", wider), write(tmp_path / "b.onnx", keep_norms), tmp_path / "all.txt"
    code, out = run(capsys, str(a), "--against", str(b), "--differences", str(listed))
    assert code == 1
    assert "2 times, first at attribute: BatchNormalization" in out
    assert len(listed.read_text().splitlines()) == 2


def test_a_long_account_is_cut_to_five_lines(tmp_path: Path) -> None:
    changes = [
        _attribute("stem", "strides", [1, 1]),
        _attribute("stem", "group", 3),
        _attribute("pool", "ceil_mode", 1),
    ]
    changes += [
        _attribute("head", "alpha", 0.5),
        _attribute("left", "dilations", [3, 3]),
        _attribute("head", "beta", 0.5),
    ]
    changes += [_attribute("right", "strides", [2, 2])]
    a, b = write(tmp_path / "a.onnx", *changes), write(tmp_path / "b.onnx")
    result = verify_files(a, b)
    assert len(result.differences) == 7
    assert len(result.summary) == 5
    assert result.summary[-1] == "3 more differences"
