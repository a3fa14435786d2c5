"""A deployed file that gets other classes: an export of the same graph with an output of another shape, which is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

from fgvc import api
from fgvc.cli import show, show_export
from fgvc.cli.app import main
from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.errors import FgvcError
from fgvc.models.onnxnet.classes import change_classes
from fgvc.models.onnxnet.net import open_onnx
from fgvc.runs.loaded import load_run
from fgvc.runtime.bundle import load_bundle
from tests.e2e.test_deployed_file import saved, tree
from tests.models.onnxnet import small

COLOURS = ("blue", "green", "red")


def as_convolution() -> onnx.ModelProto:
    """The last layer is a convolution of one cell, and a Reshape behind it names the number of classes."""
    values = small.weights()
    values["head.weight"] = values["head.weight"].reshape(small.CLASSES, small.WIDTH, 1, 1)
    nodes = small.layers()[:3]
    nodes += [
        helper.make_node("Conv", ["c", "head.weight", "head.bias"], ["e"]),
        helper.make_node("Reshape", ["e", "shape"], ["scores"]),
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in values.items()]
    return small.model(nodes, [*tensors, numpy_helper.from_array(np.array([-1, small.CLASSES], np.int64), "shape")])


def settings(file: Path, pictures: Path, **model: Any) -> dict[str, Any]:
    return tree(file, pictures, model={"classes": "change", **model})


@pytest.mark.parametrize("make", [small.plain, small.in_constants, as_convolution])
def test_a_run_of_other_classes_is_exported_with_an_output_of_another_shape(
    make: Callable[[], onnx.ModelProto], colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = saved(make(), tmp_path / "given")
    run = api.train(Recipe.model_validate(settings(file, colours)), tmp_path / "run")
    loaded = load_run(tmp_path / "run")
    assert loaded.classes == COLOURS
    assert loaded.recipe.model.head == "probe"
    rows = loaded.index.rows("test")
    assert (loaded.selecting("start").answers(rows).logits.argmax(1) == loaded.index.labels[rows]).mean() > 0.6
    show.console.width = 300
    show_export.contract(api.export(run, tmp_path / "bundle"))
    output = capsys.readouterr().out
    assert "the shape of its output changes, 3 numbers an image in place of 5: it is no drop-in for deployed.onnx" in output
    bundle = load_bundle(tmp_path / "bundle")
    assert bundle.labels == COLOURS
    assert api.verify(bundle.folder).passed
    new, old = onnx.load(str(bundle.model)), onnx.load(str(file))
    assert [node.op_type for node in new.graph.node] == [node.op_type for node in old.graph.node]
    onnx.checker.check_model(new, full_check=True)
    session = onnxruntime.InferenceSession(str(bundle.model), providers=["CPUExecutionProvider"])
    assert session.get_outputs()[0].shape[-1] == 3
    x = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)
    with torch.no_grad():
        expected = loaded.step.net(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(session.run(None, {"image": x})[0], expected, atol=1e-4)
    assert np.array_equal(*api.compare(run, bundle.folder, split="test").predicted)
    assert not api.verify(bundle.folder, into=file).passed
    damaged = onnx.load(str(bundle.model))
    damaged.graph.node[-1].name = "another"
    (bundle.folder / "model.onnx").write_bytes(damaged.SerializeToString())
    with pytest.raises(FgvcError, match="is not the file that was exported"):
        api.verify(bundle.folder)


def test_export_into_the_file_is_refused(colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = saved(small.plain(), tmp_path / "given")
    api.train(Recipe.model_validate(settings(file, colours)), tmp_path / "run")
    for into in ([], [str(file)]):
        with pytest.raises(SystemExit) as ended:
            main(["export", str(tmp_path / "run"), "--into", *into, "-o", str(tmp_path / "bundle")])
        assert ended.value.code == 2
        message = capsys.readouterr().err
        assert "for 3 classes (model.classes: change)" in message
        assert "the shape of the file's output changes" in message
    assert not (tmp_path / "bundle").exists()


def test_settings_that_do_not_fit(colours: Path, tmp_path: Path) -> None:
    file = saved(small.plain(), tmp_path / "given")
    with pytest.raises(FgvcError, match="head: timm is the file's last layer"):
        validate(Recipe, settings(file, colours, head="timm"), where="my.yaml")
    with pytest.raises(FgvcError, match="classes: change is of a file's last layer"):
        validate(Recipe, {"data": {"root": str(colours)}, "model": {"backbone": "test_resnet", "classes": "change"}}, where="x")
    (file.parent / "labels.txt").write_text("reed\npurple\ngreen\nblue\nyellow\n")
    with pytest.raises(FgvcError, match=r"model\.classes=change makes a new last layer"):
        api.train(Recipe.model_validate(tree(file, colours)), tmp_path / "run")


@pytest.mark.parametrize("make", [small.plain, small.in_constants, as_convolution])
def test_more_classes_go_through_the_files_own_shapes(make: Callable[[], onnx.ModelProto], tmp_path: Path) -> None:
    """The way back to the file is the inverse of the way from it, whatever the number of classes."""
    net = open_onnx(saved(make(), tmp_path))
    change_classes(net, 7)
    weight, bias = torch.randn(7, small.WIDTH), torch.randn(7)
    with torch.no_grad():
        net.classifier.weight.copy_(weight)
        net.classifier.bias.copy_(bias)
    values = {name: value for name, value in net.stored()}
    state = net.by_own_names(values)
    torch.testing.assert_close(state["classifier.weight"], weight.double())
    torch.testing.assert_close(state["classifier.bias"], bias.double())
    assert net(torch.zeros(2, 3, 8, 8)).shape == (2, 7)
