"""A run that begins from a deployed file ends in it: only payloads of weights differ, and the bundle answers as the run does."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from onnx import helper, numpy_helper
from PIL import Image
from safetensors.torch import load_file, save_file

from fgvc import api
from fgvc.cli.app import main
from fgvc.config.loading import validate
from fgvc.config.models import Model
from fgvc.config.recipe import Recipe
from fgvc.config.techniques import settings_by_kind
from fgvc.errors import FgvcError
from fgvc.exporting.deployed import compare_written
from fgvc.exporting.into import payload_spans
from fgvc.exporting.onnx import export_onnx
from fgvc.exporting.triton import write_model
from fgvc.models.net import shipped_net
from fgvc.models.weights import load_weights
from fgvc.runs.folder import read_run
from fgvc.runs.images import read_index
from fgvc.runs.loaded import load_run
from fgvc.runtime.bundle import load_bundle
from fgvc.training import trainer
from tests.conftest import paint
from tests.models.onnxnet import small
from tests.models.onnxnet.test_as_timm import staged
from tests.models.onnxnet.test_onnxnet import DEPLOYED, boxes, custom, maps, quantised, text, two_inputs
from tests.trained import Once, copied

NAMES = ("red", "purple", "green", "blue", "yellow")  # of the outputs; three of them have pictures
FED = {"resize": "squash", "interpolation": "bilinear", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
SPEC = {"size": [8, 8], "crop_pct": 1.0, "channel_order": "rgb", "input_range": 1, "fill": [0, 0, 0], **FED}
TECHNIQUES: dict[str, dict[str, Any]] = {
    "multiscale_head": {}, "centre_loss": {}, "attention_crop_drop": {}, "dcl": {}, "cam_erasing": {}, "dbb": {},
}  # fmt: skip


def tree(file: Path, pictures: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "data": {"kind": "folder", "root": str(pictures)},
        "model": {"onnx": str(file)},
        "deploy": dict(FED),
        "train": {"epochs": 1, "max_steps": 3, "batch_size": 8, "workers": 0, "device": "cpu"},
        "optim": {"lr": 0.02},
        "select": "last",
    }
    for name, values in sections.items():
        settings[name] = {**settings.get(name, {}), **values} if isinstance(values, dict) else values
    return settings


def saved(proto: onnx.ModelProto, folder: Path, *, labels: bool = True, external: bool = False) -> Path:
    path = small.saved(proto, folder, external=external)
    if labels:
        (folder / "labels.txt").write_text("\n".join(NAMES))
    return path


def sigmoid() -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(value, name) for name, value in small.weights().items()]
    return small.model([*small.layers("logits"), helper.make_node("Sigmoid", ["logits"], ["scores"])], tensors)


@pytest.fixture(scope="session")
def plain_file(once: Once) -> Path:
    return once.made("deployed/plain", lambda folder: saved(small.plain(), folder)) / "deployed.onnx"


@pytest.fixture(scope="session")
def run(once: Once, colours: Path, plain_file: Path) -> Path:
    return once.run(Recipe.model_validate(tree(plain_file, colours)))


@pytest.fixture(scope="session")
def bundle(once: Once, run: Path) -> Path:
    return once.bundle(run)


def outside(path: Path) -> bytes:
    """The bytes of a file without the payloads of its floats."""
    data = bytearray(path.read_bytes())
    for start, end in payload_spans(bytes(data)).values():
        data[start:end] = bytes(end - start)
    return bytes(data)


@pytest.mark.parametrize(
    "name", ["in_constants", "kept_norm", "external", "shared", "fixed_batch", "half", "bytes_in", "standardised"]
)
def test_a_file_is_trained_and_written_back(name: str, colours: Path, tmp_path: Path) -> None:
    proto = small.plain() if name == "external" else small.FILES[name]()
    file = saved(proto, tmp_path / "given", external=name == "external")
    deploy: dict[str, Any] = {"mean": None, "std": None, "input_range": 255} if name == "bytes_in" else {}
    settings = tree(file, colours, deploy=deploy)
    if name == "bytes_in":
        settings["deploy"] = {"resize": "squash", "interpolation": "bilinear"}
    run = trainer.train(Recipe.model_validate(settings), tmp_path / "run")
    exported = api.export(run, tmp_path / "bundle")
    written = exported.proven.written
    assert written is not None
    assert written.moved
    bundle = load_bundle(tmp_path / "bundle")
    if name == "external":
        write_model(bundle, tmp_path / "triton")
        assert onnx.load(str(tmp_path / "triton" / "bundle" / "1" / "model.onnx")) == onnx.load(str(bundle.model))
        assert (bundle.folder / "deployed.onnx.data").read_bytes() != (file.parent / "deployed.onnx.data").read_bytes()
    if not written.reencoded:
        assert outside(bundle.model) == outside(file)
    assert api.verify(bundle.folder).passed
    compared = api.verify(bundle.folder, into=file)
    assert compared.passed
    assert set(compared.moved) == set(written.moved) == set(bundle.contract["moved"])
    pair = api.compare(run, bundle.folder, split="test")
    assert np.array_equal(*pair.predicted)


def test_untrained_weights_come_back_bit_for_bit(run: Path, plain_file: Path, tmp_path: Path) -> None:
    exported = api.export(run, tmp_path / "start", select="start", into="own")
    assert (tmp_path / "start" / "model.onnx").read_bytes() == plain_file.read_bytes()
    assert exported.proven.contract["moved"] == []


def test_what_the_contract_records_and_verify_repeats(
    run: Path, bundle: Path, plain_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contract = load_bundle(bundle).contract
    assert set(contract["moved"]) == set(small.weights())
    assert contract["kept"] == []
    assert contract["proofs"]["behavioural"]["worst"] <= 1e-4
    assert contract["proofs"]["numeric"]["folded_float64"] <= 1e-9
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(bundle / "model.onnx"), "--into", str(plain_file)])
    assert ended.value.code == 0
    assert "4 payloads of weights differ, and nothing else" in capsys.readouterr().out.replace("\n", " ")
    other = onnx.load(str(bundle / "model.onnx"))
    other.graph.node[0].attribute[0].ints[0] = 0
    onnx.save(other, str(tmp_path / "other.onnx"))
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(tmp_path / "other.onnx"), "--into", str(plain_file)])
    assert ended.value.code == 1


def test_what_is_no_weight_may_not_differ(tmp_path: Path) -> None:
    """A mean that the graph subtracts before its first layer is a float like others, and nothing trains it."""
    file, other = saved(small.bytes_in(), tmp_path / "a"), small.bytes_in()
    mean = next(tensor for tensor in other.graph.initializer if tensor.name == "mean")
    mean.raw_data = np.array([1, 2, 3], np.float32).tobytes()
    assert not compare_written(saved(other, tmp_path / "b"), file).passed
    assert compare_written(file, file).passed


def test_the_run_has_its_own_copy(colours: Path, tmp_path: Path) -> None:
    file = saved(small.plain(), tmp_path / "given")
    (tmp_path / "given" / "preprocess.json").write_text(json.dumps(SPEC))
    settings = tree(file, colours)
    del settings["deploy"]
    run = trainer.train(Recipe.model_validate(settings), tmp_path / "run")
    assert read_run(run).deploy.fill == (0, 0, 0)
    assert json.loads((run / "labels.json").read_text()) == list(NAMES)
    content = file.read_bytes()
    shutil.rmtree(file.parent)
    settings["train"]["max_steps"] = 5
    trainer.train(Recipe.model_validate(settings), run)
    moved = copied(run, tmp_path / "elsewhere")
    api.export(moved, tmp_path / "bundle")
    assert outside(tmp_path / "bundle" / "model.onnx") == outside(moved / "deployed" / "deployed.onnx")
    assert (moved / "deployed" / "deployed.onnx").read_bytes() == content
    other = small.plain()
    other.graph.initializer[0].raw_data = bytes(len(other.graph.initializer[0].raw_data))
    saved(other, tmp_path / "given")
    with pytest.raises(FgvcError, match="is not the file that this run began with"):
        trainer.train(Recipe.model_validate(settings), run)
    (moved / "deployed" / "deployed.onnx").write_bytes(content + b"\x0a\x00")
    with pytest.raises(FgvcError, match="is not the deployed file that .* began with"):
        load_run(moved)


def test_classes_without_images_keep_their_rows(run: Path, bundle: Path, plain_file: Path) -> None:
    before, after = (
        {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(str(path)).graph.initializer}
        for path in (plain_file, bundle / "model.onnx")
    )
    for name in ("head.weight", "head.bias"):
        same = (before[name] == after[name]).reshape(len(NAMES), -1).all(1)
        assert same.tolist() == [False, True, False, False, True]
    scores = api.evaluate(run, "test").scores
    assert scores.confusion.shape == (5, 5)
    assert np.isfinite(list(scores.numbers().values())).all()
    assert load_bundle(bundle).labels == NAMES


def test_a_set_without_some_of_the_files_classes_is_no_fault(colours: Path, plain_file: Path) -> None:
    report = api.check(Recipe.model_validate(tree(plain_file, colours)))
    assert report.ok
    assert "2 classes have no image, and are not trained: purple, yellow" in report.warnings
    assert report.imbalance == 1


def with_metadata(key: str, value: str) -> onnx.ModelProto:
    model = small.plain()
    model.metadata_props.append(onnx.StringStringEntryProto(key=key, value=value))
    return model


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("names", "{0: 'red', 1: 'purple', 2: 'green', 3: 'blue', 4: 'yellow'}"),
        ("classes", '["red", "purple", "green", "blue", "yellow"]'),
        ("labels", "red,purple, green,blue,yellow"),
        ("class_names", "red\npurple\ngreen\nblue\nyellow\n"),
        ("id2label", '{"1": "purple", "0": "red", "2": "green", "3": "blue", "4": "yellow"}'),
        ("labels.json", '["red", "purple", "green", "blue", "yellow"]'),
        ("labels.txt", "red\npurple\ngreen\nblue\nyellow\n"),
        ("classes.txt", "1 red\n2 purple\n3 green\n4 blue\n5 yellow\n"),
        ("config.json", '{"id2label": {"0": "red", "1": "purple", "2": "green", "3": "blue", "4": "yellow"}}'),
    ],
)
def test_where_labels_are_read_from(key: str, value: str, colours: Path, tmp_path: Path) -> None:
    beside = "." in key
    file = saved(small.plain() if beside else with_metadata(key, value), tmp_path, labels=False)
    if beside:
        (tmp_path / key).write_text(value)
    else:
        (tmp_path / "labels.txt").write_text("a\nb\n")  # the file's own come first
    index = read_index(Recipe.model_validate(tree(file, colours)))
    assert index.classes == NAMES
    assert {str(path).split("/")[1]: NAMES[label] for path, label in zip(index.paths, index.labels, strict=True)} == {
        name: name for name in ("red", "green", "blue")
    }


def refusal(settings: dict[str, Any], out: Path) -> str:
    with pytest.raises(FgvcError) as caught:
        trainer.train(validate(Recipe, settings, where="my.yaml"), out)
    assert not out.exists()
    return str(caught.value)


def test_refusals_of_recipes(colours: Path, tmp_path: Path, plain_file: Path) -> None:
    out, of = tmp_path / "run", tree
    both = of(plain_file, colours, model={"backbone": "test_resnet"})
    assert "both are given; set one of them to null" in refusal(both, out)
    assert "neither is given" in refusal(of(plain_file, colours) | {"model": {}}, out)
    assert "weights: deployed are those in the file" in refusal(
        of(plain_file, colours) | {"model": {"backbone": "test_resnet", "weights": "deployed"}}, out
    )
    for model, words in (
        ({"kwargs": {"drop_rate": 0.1}}, "kwargs: are timm's"),
        ({"weights": "none"}, "none is a random start"),
        ({"weights": "hub"}, "are of a net of timm's, and deployed.onnx is none of timm's"),
        ({"head": "probe"}, "2 of the file's 5 have none"),
        ({"output": "other"}, "has no output 'other'"),
    ):
        assert words in refusal(of(plain_file, colours, model=model), out)
    assert "takes images of image.size alone" in refusal(of(plain_file, colours, image={"train_scale": 0.5}), out)
    assert "as many classes as its file" in refusal(of(plain_file, colours, data={"first_classes": 2}), out)
    assert "takes images of 8 x 8 pixels alone, not 16 x 16" in refusal(of(plain_file, colours, image={"size": 16}), out)
    assert "no such file" in refusal(of(tmp_path / "gone.onnx", colours), out)


def test_refusals_of_files(colours: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    unnamed = saved(small.plain(), tmp_path / "unnamed", labels=False)
    message = refusal(tree(unnamed, colours), out)
    assert "which of its outputs is which class?" in message
    assert "deploy.labels=FILE" in message
    (unnamed.parent / "labels.txt").write_text("reed\npurple\ngreen\nblue\nyellow\n")
    assert "'red' (nearest: 'reed')" in refusal(tree(unnamed, colours), out)
    (unnamed.parent / "labels.txt").write_text("red\ngreen\nblue\n")
    assert "gives 5 numbers an image, and its labels name 3 classes" in refusal(tree(unnamed, colours), out)
    file = saved(small.plain(), tmp_path / "unfed")
    open_ = tree(file, colours) | {"deploy": {"resize": "crop", "mean": [0.5, 0.5, 0.5]}}
    message = refusal(open_, out)
    assert "says deploy.interpolation, deploy.std, deploy.crop_pct" in message
    assert "preprocess.json" in message
    any_size = saved(small.plain(shape=("n", 3, "h", "w")), tmp_path / "any")
    assert "says image.size" in refusal(tree(any_size, colours), out)
    each = saved(sigmoid(), tmp_path / "sigmoid")
    assert "ends with a sigmoid" in refusal(tree(each, colours), out)
    raw = saved(small.bytes_in(), tmp_path / "bytes")
    assert "takes them as bytes and does the rest by itself" in refusal(tree(raw, colours), out)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (two_inputs, "has one input, this has 2"), (text, "has 2 axes; images have four"), (boxes, "has 2 outputs"),
        (custom, "this operator is not known here"), (quantised, "an int8 file can't be trained"),
        (maps, "a classifier gives one number a class"),
    ],
)  # fmt: skip
def test_what_is_no_classifier_of_images_is_not_trained(
    make: Callable[[], onnx.ModelProto], words: str, colours: Path, tmp_path: Path
) -> None:
    assert words in refusal(tree(saved(make(), tmp_path / "given"), colours), tmp_path / "run")


def test_broken_and_large_files_are_not_trained(colours: Path, tmp_path: Path) -> None:
    file = saved(small.plain(), tmp_path / "given")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    assert "not an ONNX file, or cut short" in refusal(tree(file, colours), tmp_path / "run")
    with file.open("wb") as stream:  # of no blocks
        stream.truncate(2**31)
    assert "is of 2 GB or more" in refusal(tree(file, colours), tmp_path / "run")
    external = saved(small.plain(), tmp_path / "external", external=True)
    external.with_name("deployed.onnx.data").unlink()
    assert "deployed.onnx.data" in refusal(tree(external, colours), tmp_path / "run")


def test_a_recipe_that_differs_from_what_lies_beside_the_file_is_warned(
    colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = saved(small.plain(), tmp_path / "given")
    (file.parent / "preprocess.json").write_text(json.dumps(SPEC | {"mean": [0.4, 0.4, 0.4]}))
    run = trainer.train(Recipe.model_validate(tree(file, colours)), tmp_path / "run")
    assert read_run(run).deploy.mean == (0.5, 0.5, 0.5)
    assert "preprocess.json says otherwise than the recipe, which holds: mean of R, G, B" in capsys.readouterr().err


def test_one_of_several_outputs(colours: Path, tmp_path: Path) -> None:
    model = small.plain()
    model.graph.output.insert(0, helper.make_tensor_value_info("d", onnx.TensorProto.FLOAT, ("n", small.WIDTH)))
    file = saved(model, tmp_path / "given")
    run = trainer.train(Recipe.model_validate(tree(file, colours, model={"output": "scores"})), tmp_path / "run")
    int8 = api.Int8(images=8, first=0)
    api.export(run, tmp_path / "bundle", variants=api.Variants(int8=int8, fp16=True, agreement=0.01))
    assert outside(tmp_path / "bundle" / "model.onnx") == outside(file)
    assert api.verify(tmp_path / "bundle").passed
    assert api.verify(tmp_path / "bundle", into=file).passed
    assert np.array_equal(*api.compare(run, tmp_path / "bundle", split="test").predicted)
    main_exits(["explain", str(tmp_path / "bundle"), str(colours / "test" / "red" / "00.png"), "-o", str(tmp_path / "looks")], 0)


def test_a_sigmoid_file_trains_by_bce(colours: Path, tmp_path: Path) -> None:
    file = saved(sigmoid(), tmp_path / "given")
    run = trainer.train(Recipe.model_validate(tree(file, colours, loss={"kind": "bce"})), tmp_path / "run")
    assert api.export(run, tmp_path / "bundle").proven.contract["output"]["ending"] == "sigmoid"


def test_into_another_file(run: Path, plain_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that differs in payloads alone takes the weights, too; another graph is refused."""
    same = small.plain()
    same.graph.initializer[0].raw_data = bytes(len(same.graph.initializer[0].raw_data))
    file = saved(same, tmp_path / "same")
    main_exits(["export", str(run), "--into", str(file), "-o", str(tmp_path / "b")], 0)
    assert outside(tmp_path / "b" / "model.onnx") == outside(file)
    other = saved(small.kept_norm(), tmp_path / "other")
    main_exits(["export", str(run), "--into", str(other), "-o", str(tmp_path / "c")], 2)
    assert "is not the file that" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
    main_exits(["export", str(run), "--into", "-o", str(tmp_path / "d")], 0)
    main_exits(["export", str(run), "-o", str(tmp_path / "e")], 0)
    assert (tmp_path / "d" / "model.onnx").read_bytes() == (tmp_path / "e" / "model.onnx").read_bytes()
    main_exits(["export", str(run), "--opset", "17", "-o", str(tmp_path / "f")], 2)
    assert "are of a fresh export" in capsys.readouterr().err
    with pytest.raises(FgvcError, match="are of a fresh export"):
        api.export(run, tmp_path / "f", against=plain_file)
    assert not (tmp_path / "f").exists()


def test_a_run_of_timms_net_goes_into_the_file_that_it_is(once: Once, colours: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "data": {"kind": "folder", "root": str(colours)},
        "model": {"backbone": "test_efficientnet"},
        "image": {"size": 32},
        "deploy": dict(FED),
        "train": {"epochs": 1, "max_steps": 2, "batch_size": 8, "workers": 0, "device": "cpu"},
        "export": {"exporter": "torchscript", "opset": 17},
    }
    one = once.run(Recipe.model_validate(settings))
    file = once.bundle(one)
    settings["train"]["seed"] = 1
    two = trainer.train(Recipe.model_validate(settings | {"techniques": {"dbb": {}}}), tmp_path / "run")
    exported = api.export(two, tmp_path / "bundle", into=file)
    assert exported.proven.written is not None
    assert exported.proven.written.moved
    assert not exported.proven.written.kept
    assert outside(tmp_path / "bundle" / "model.onnx") == outside(file / "model.onnx")
    assert api.verify(tmp_path / "bundle").passed
    with pytest.raises(FgvcError, match="has no file of its own: name one"):
        api.export(two, tmp_path / "b", into="own")
    settings["model"] = {"backbone": "test_resnet"}
    other = trainer.train(Recipe.model_validate(settings), tmp_path / "other")
    with pytest.raises(FgvcError, match="is not the test_resnet that was trained"):
        api.export(other, tmp_path / "b", into=file)
    assert not (tmp_path / "b").exists()


def test_weights_of_timms_net_go_into_the_file_that_it_is(once: Once, tmp_path: Path) -> None:
    torch.manual_seed(0)
    nets = [timm.create_model("test_efficientnet", num_classes=5).eval() for _ in range(2)]
    for net in nets:
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    file = tmp_path / "deployed.onnx"
    proto = export_onnx(nets[0], size=(32, 32), exporter="torchscript", opset=17)
    file.write_bytes(proto.SerializeToString())
    save_file(nets[1].state_dict(), tmp_path / "w.safetensors")
    model = Model(onnx=file, weights=str(tmp_path / "w.safetensors"))
    net = shipped_net(model, 5, None).eval()
    assert "as test_efficientnet of timm" in load_weights(net, model, stated=("mean", "std")).origin
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(net(x), nets[1](x), rtol=1e-4, atol=1e-5)


def main_exits(words: list[str], code: int) -> None:
    try:
        main(words)
        ended: int | str | None = 0
    except SystemExit as error:
        ended = error.code or 0
    assert ended == code


def test_verbs_that_open_the_run(run: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = api.report([run], tmp_path / "page.html", bundles=[bundle], images=1)
    assert "payloads of weights moved" in page.read_text()
    with pytest.raises(SystemExit):
        main(["predict", str(bundle), str(next((read_run(run).data.root / "test").rglob("*.png")))])
    out = capsys.readouterr().out
    assert any(name in out for name in NAMES)
    half_way = api.interpolate(run, tmp_path / "between", share=0.5)
    api.export(half_way.out, tmp_path / "b")
    assert outside(tmp_path / "b" / "model.onnx") == outside(run / "deployed" / "deployed.onnx")


@pytest.mark.parametrize("name", ["plain", "bytes_in", "in_constants"])
def test_smaller_files_are_those_of_the_deployed_file(name: str, colours: Path, run: Path, tmp_path: Path) -> None:
    if name != "plain":
        settings = tree(saved(small.FILES[name](), tmp_path / "given"), colours)
        if name == "bytes_in":
            settings["deploy"] = {"resize": "squash", "interpolation": "bilinear"}
        run = trainer.train(Recipe.model_validate(settings), tmp_path / "run")
    int8 = api.Int8(images=8, first=0) if name != "in_constants" else None  # an Identity hides its kernels from the tool
    api.export(run, tmp_path / "bundle", variants=api.Variants(int8=int8, fp16=True, agreement=0.01))
    verified = api.verify(tmp_path / "bundle")
    assert verified.passed
    assert {check.name for check in verified.checks} >= {"fp16"} | ({"int8"} if int8 else set())


def test_inspect_looks_at_images(colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = saved(small.plain(), tmp_path / "given")
    main_exits(["inspect", str(file), str(colours / "test")], 2)
    assert "give --preprocess FILE" in capsys.readouterr().err
    (tmp_path / "spec.json").write_text(json.dumps(SPEC))
    (colours_and_text := tmp_path / "images").mkdir()
    shutil.copytree(colours / "test" / "red", colours_and_text / "red")
    (colours_and_text / "broken.png").write_bytes(b"no picture")
    main_exits(["inspect", str(file), str(colours_and_text), "--preprocess", str(tmp_path / "spec.json")], 0)
    out, err = capsys.readouterr()
    assert "broken.png" in err
    assert f"labels: 5 by {tmp_path / 'given' / 'labels.txt'}: red, purple" in out
    assert "apart on 4 images; it can be trained as it is" in out
    paths = sorted((colours / "test" / "red").iterdir())
    x = np.stack([np.asarray(Image.open(path).resize((8, 8), Image.Resampling.BILINEAR)) for path in paths])
    x = ((x / 255 - 0.5) / 0.5).astype(np.float32).transpose(0, 3, 1, 2)
    scores = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, {"image": x})[0]
    inspection = api.inspect(file, images=[colours / "test" / "red"], preprocess=tmp_path / "spec.json")
    assert inspection.answers == dict(Counter(NAMES[number] for number in scores.argmax(1)).most_common())


def test_inspect_asks_labelled_images_how_they_are_prepared(
    colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search itself is tested where it lies; this net of random weights does not tell one from another."""
    monkeypatch.setattr("fgvc.evaluation.preprocessing.binomtest", lambda *_, **__: SimpleNamespace(pvalue=0.0))
    file = saved(small.plain(), tmp_path / "given")
    main_exits(["inspect", str(file), str(colours / "test")], 0)
    out = capsys.readouterr().out
    assert "images: nothing states how they are prepared; by its answers:\n" in out
    assert "  likeliest: size (8, 8)" in out
    main_exits(["inspect", str(file), str(colours / "test"), "--json"], 0)
    report = json.loads(capsys.readouterr().out)
    assert report["search"]["preprocess"] == report["preprocess"]


@pytest.fixture(scope="session")
def few(once: Once) -> Path:
    """Two classes of four pictures."""

    def draw(root: Path) -> None:
        for number, (split, count) in enumerate((("train", 4), ("val", 1))):
            for at, colour in enumerate(((200, 70, 60), (60, 80, 200))):
                for i in range(count):
                    paint(root / split / f"class {at}" / f"{i}.png", colour, seed=100 * number + 10 * at + i, size=(96, 96))

    return once.made("few", draw)


def of_shared(name: str, shared: Path, few: Path, folder: Path, **techniques: Any) -> Recipe:
    (folder / "labels.txt").write_text("\n".join(f"class {number}" for number in range(50)))
    settings = tree(
        shared / "deployed" / f"{name}.onnx", few, deploy={"labels": str(folder / "labels.txt")},
        train={"max_steps": 2, "epochs": 20, "batch_size": 4}, optim={"lr": 1e-3}, techniques=techniques,
    )  # fmt: skip
    if any(kind == "cam_erasing" for kind in techniques):
        settings["ema"] = {"decay": 0.9}
    return Recipe.model_validate(settings)


@pytest.mark.parametrize(("name", "kind"), list(zip(DEPLOYED, [*TECHNIQUES, "dbb"], strict=True)))
def test_files_of_other_programs_train_and_are_written_back(
    name: str, kind: str, shared: Path, few: Path, tmp_path: Path
) -> None:
    run = trainer.train(of_shared(name, shared, few, tmp_path, **{kind: TECHNIQUES[kind]}), tmp_path / "run")
    exported = api.export(run, tmp_path / "bundle")
    assert exported.proven.written is not None
    assert len(exported.proven.written.moved) >= 50
    assert outside(tmp_path / "bundle" / "model.onnx") == outside(shared / "deployed" / f"{name}.onnx")


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections",
    [
        {"ema": {"decay": 0.9}, "select": "ema"},
        {"swa": {"start": 0.5}, "select": "swa", "train": {"epochs": 2, "max_steps": None}},
        {"model": {"batch_norm": "batch"}, "train": {"precise_bn": 16}},
        {"optim": {"sam": {"rho": 0.05}}},
        {"train": {"grad_checkpointing": True}},
        {"optim": {"l2_sp": 0.01}},
        {"optim": {"layer_decay": 0.7}},
        {"loss": {"kind": "focal"}},
    ],
    ids=lambda sections: next(iter(sections)),
)
def test_settings_of_training(sections: dict[str, Any], colours: Path, tmp_path: Path) -> None:
    file = saved(small.kept_norm(), tmp_path / "given")
    run = trainer.train(Recipe.model_validate(tree(file, colours, **sections)), tmp_path / "run")
    written = api.export(run, tmp_path / "bundle").proven.written
    assert written is not None
    moved = {"stem.weight", "stem.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"}
    running = {"norm.mean", "norm.var"} if "model" in sections else set()
    assert set(written.moved) == moved | running
    assert outside(tmp_path / "bundle" / "model.onnx") == outside(file)


@pytest.mark.slow
@pytest.mark.parametrize("grad_checkpointing", [False, True])
@pytest.mark.parametrize("kind", sorted(set(settings_by_kind()) - {"box_head"}))  # which needs boxes
def test_every_technique_takes_the_net_of_a_file(
    kind: str, grad_checkpointing: bool, colours: Path, tmp_path: Path
) -> None:
    file = saved(staged(), tmp_path / "given")
    settings = tree(
        file, colours, train={"epochs": 4, "grad_checkpointing": grad_checkpointing}, ema={"decay": 0.9},
        techniques={kind: {"teachers": [{"kind": "ema"}]} if kind == "distill" else {}},
    )  # fmt: skip
    run = trainer.train(Recipe.model_validate(settings), tmp_path / "run")
    written = api.export(run, tmp_path / "bundle").proven.written
    assert written is not None
    assert len(written.moved) == 10
    assert outside(tmp_path / "bundle" / "model.onnx") == outside(file)


@pytest.mark.parametrize("batch_norm", ["frozen", "restore"])
def test_blocks_replace_convolutions_that_got_a_scale_or_a_norm_back(batch_norm: str, colours: Path, tmp_path: Path) -> None:
    file = saved(small.plain(), tmp_path / "given")
    settings = tree(file, colours, model={"batch_norm": batch_norm}, techniques={"dbb": {}})
    run = trainer.train(Recipe.model_validate(settings), tmp_path / "run")
    proven = api.export(run, tmp_path / "bundle").proven
    assert proven.numeric.folded_float64 <= 1e-9
    assert outside(tmp_path / "bundle" / "model.onnx") == outside(file)


def test_a_run_that_was_stopped_ends_with_the_same_bits(colours: Path, run: Path, plain_file: Path, tmp_path: Path) -> None:
    stopped = tree(plain_file, colours, train={"max_steps": 1})
    half = trainer.train(Recipe.model_validate(stopped), tmp_path / "run")
    trainer.train(Recipe.model_validate(tree(plain_file, colours)), half)
    weights = [load_file(place / "ckpt" / "last" / "net.safetensors") for place in (half, run)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", TECHNIQUES)
@pytest.mark.parametrize("name", DEPLOYED)
def test_every_technique_trains_real_files(name: str, kind: str, shared: Path, few: Path, tmp_path: Path) -> None:
    recipe = of_shared(name, shared, few, tmp_path, **{kind: TECHNIQUES[kind]})
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_steps": 20})})
    run = trainer.train(recipe, tmp_path / "run")
    api.export(run, tmp_path / "bundle")
    assert outside(tmp_path / "bundle" / "model.onnx") == outside(shared / "deployed" / f"{name}.onnx")
    assert api.verify(tmp_path / "bundle").passed
