"""`fgvc export --int8 --fp16`: what is written, what it is measured by, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import yaml
from onnx import numpy_helper

from fgvc import api
from fgvc.cli.app import main
from fgvc.config.data import SPLITS
from fgvc.errors import FgvcError
from fgvc.evaluation.agreement import FP16, INT8
from fgvc.exporting import prove as proving
from fgvc.exporting import variant as quantising
from fgvc.exporting.onnx import serialised
from fgvc.exporting.quantize import quantise
from fgvc.images.decode import decode
from fgvc.images.preprocess import preprocess
from fgvc.runs.loaded import Answers, load_run
from fgvc.runtime.bundle import load_bundle, write_bundle
from fgvc.runtime.engine import Engine, OnnxSession
from fgvc.studies import variants as variant
from fgvc.training import trainer

SMALL = api.Int8(first=2, images=24)


@pytest.fixture(scope="module")
def run(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = {
        "data": {"kind": "folder", "root": str(colours)},
        "image": {"size": 32},
        "model": {"backbone": "test_efficientnet"},
        "train": {
            "epochs": 16,  # sure enough of its answers for 7 bits, where a CPU needs those
            "batch_size": 8,
            "workers": 0,
            "device": "cpu",
        },
        "optim": {"lr": 0.05, "warmup_epochs": 0.5},
        "export": {"exporter": "torchscript"},
    }
    folder = tmp_path_factory.mktemp("variant")
    (folder / "own.yaml").write_text(yaml.safe_dump(tree))
    return trainer.train(api.load_recipe(folder / "own.yaml"), folder / "run")


@pytest.fixture(scope="module")
def exported(run: Path) -> api.Exported:
    # Twelve images: one of them is 8 %, and on which of them int8 errs is the processor's affair. So the bars are low.
    variants = api.Variants(int8=SMALL, fp16=True, agreement=0.5)
    with pytest.MonkeyPatch.context() as patch:
        for name, bars in (("INT8", INT8), ("FP16", FP16)):
            patch.setattr(variant, name, replace(bars, loss=0.5))
        return api.export(run, run.parent / "bundle", variants=variants)


@pytest.mark.parametrize("kind", ["int8", "fp16"])
def test_the_report_is_what_one_finds_by_hand(exported: api.Exported, colours: Path, kind: str) -> None:
    bundle = load_bundle(exported.bundle)
    paths = sorted((colours / "val").rglob("*.png"))
    x = np.stack([preprocess(decode(path), bundle.preprocess) for path in paths])
    labels = np.array([bundle.labels.index(path.parent.name) for path in paths])
    z, variant_z = (
        onnxruntime.InferenceSession(bundle.folder / name).run(None, {"input": x})[0]
        for name in ("model.onnx", f"model.{kind}.onnx")
    )
    section = bundle.contract[kind]
    agreement = section["agreement"]
    assert agreement["images"] == len(paths) == 12
    assert agreement["split"] == "val"
    assert agreement["share"] == (z.argmax(1) == variant_z.argmax(1)).mean()
    assert agreement["top1"] == (variant_z.argmax(1) == labels).mean()
    assert agreement["top1_float"] == (z.argmax(1) == labels).mean()
    assert agreement["worst"] == pytest.approx(np.abs(variant_z.astype(float) - z).max(), rel=1e-3)
    assert agreement["differing"] == len(agreement["worst_images"]) == (z.argmax(1) != variant_z.argmax(1)).sum()
    assert agreement["bars"]["agreement"] == 0.5
    assert section["bytes"] == (bundle.folder / f"model.{kind}.onnx").stat().st_size


def test_the_bundle_says_how_int8_was_made_and_proves_again(exported: api.Exported) -> None:
    bundle = load_bundle(exported.bundle)
    assert {"model.int8.onnx", "model.fp16.onnx", "model.onnx"} <= bundle.files.keys()
    section = bundle.contract["int8"]
    assert (section["images"], section["float_layers"]) == (24, 2)
    assert isinstance(section["reduce_range"], bool)
    checks = {check.name: check for check in api.verify(exported.bundle).checks}  # type: ignore[union-attr]
    assert checks["int8"].passed
    assert checks["fp16"].passed
    assert "as a plain model's becomes" in checks["int8"].detail


def test_another_structure_or_lower_agreement_than_the_contracts_fails(exported: api.Exported, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in exported.bundle.iterdir() if path.name != "manifest.json"}
    contract = json.loads(files["contract.json"])
    contract["versions"]["torch"] = "1.0"  # the plain model is not made again: quicker
    contract["int8"]["sha256"] = "0" * 64
    contract["fp16"]["agreement"]["share"] = 0.1
    write_bundle(tmp_path / "b", files=files | {"contract.json": contract})
    checks = {check.name: check for check in api.verify(tmp_path / "b").checks}  # type: ignore[union-attr]
    assert "in the contract 0000" in checks["int8"].detail
    assert "agrees on 10.00 %" in checks["fp16"].detail
    assert not checks["int8"].passed
    assert not checks["fp16"].passed
    del contract["int8"]
    write_bundle(tmp_path / "c", files=files | {"contract.json": contract})
    checks = {check.name: check for check in api.verify(tmp_path / "c").checks}  # type: ignore[union-attr]
    assert "has no entry for it" in checks["int8"].detail


def test_the_engine_and_predict_take_either(
    exported: api.Exported, colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {path.name: path.read_bytes() for path in exported.bundle.iterdir() if path.name != "manifest.json"}
    proto = onnx.load_from_string(files["model.onnx"])
    # Each names another class, whatever it is shown.
    answers = {"model.onnx": 0, "model.int8.onnx": 1, "model.fp16.onnx": 2}
    write_bundle(tmp_path / "told", files=files | {n: serialised(of_one_answer(proto, k)) for n, k in answers.items()})
    bundle, picture = load_bundle(tmp_path / "told"), decode(next((colours / "test" / "red").iterdir()))
    for variant_of, expected in (("float", 0), ("int8", 1), ("fp16", 2)):
        assert Engine(bundle, variant=variant_of).classify([picture])[0].predictions[0].index == expected
    with pytest.raises(SystemExit) as ended:
        main(["predict", str(exported.bundle), str(colours / "test" / "red"), "--variant", "int8"])
    assert not ended.value.code
    assert len(capsys.readouterr().out.splitlines()) == 4
    del files["model.int8.onnx"]
    write_bundle(tmp_path / "b", files=files)
    with pytest.raises(FgvcError, match=r"has no model\.int8\.onnx; export the run with --int8"):
        Engine(load_bundle(tmp_path / "b"), variant="int8")


def of_one_answer(proto: onnx.ModelProto, answer: int = 0) -> onnx.ModelProto:
    """A file that names this class for every picture, on any processor: its last layer is nothing but a bias."""
    last = [node for node in proto.graph.node if node.op_type == "Gemm"][-1]
    for tensor in proto.graph.initializer:
        if tensor.name in last.input[1:]:
            value = np.zeros_like(numpy_helper.to_array(tensor))
            value[answer] = tensor.name == last.input[2]
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return proto


def test_a_file_that_answers_otherwise_is_refused_and_no_bundle_written(
    run: Path,
    exported: api.Exported,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    again = tmp_path / "run"
    shutil.copytree(run, again)
    monkeypatch.setattr(quantising, "quantise", lambda *args, **settings: of_one_answer(quantise(*args, **settings)))
    monkeypatch.setattr(proving.PlainBackbone, "prove", lambda *_: exported.proven)
    with pytest.raises(SystemExit) as ended:
        main(["export", str(again), "-o", str(tmp_path / "b"), "--int8", "--int8-float", "2"])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert re.search(
        r"model\.int8\.onnx is refused:\n  answers as the float file for \d+\.\d\d % of 12 val images", message
    )
    assert "--int8-images" in message
    assert "becomes" in message
    assert not (tmp_path / "b").exists()
    page = (again / "reports" / "int8.html").read_text()
    assert "Refused:" in page
    assert page.count("<figure>") == int(re.search(r"(\d+) of \1 images", page)[1])  # type: ignore[index]
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)


def test_logits_that_overflow_in_sixteen_bits_are_refused(
    run: Path, exported: api.Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, session = variant._answers, OnnxSession(exported.proven.source)
    monkeypatch.setattr(variant, "_answers", lambda *args: broken_from(ask(*args), args[1] is not session))
    with pytest.raises(FgvcError, match=r"model\.fp16\.onnx is refused:\n  gives logits that are no numbers .* for 1 of 12 val"):
        variant.make_variants(load_run(run), exported.proven, session, api.Variants(fp16=True))


def broken_from(answers: Answers, broken: bool) -> Answers:
    return replace(answers, logits=np.where(np.arange(12)[:, None] == 3, np.inf, answers.logits)) if broken else answers


def test_an_opset_without_scales_for_channels_leaves_int8_out_and_says_so(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["export", str(run), "-o", str(tmp_path / "b"), "--int8", "--opset", "11"])
    assert not ended.value.code
    output = " ".join(capsys.readouterr().out.split())
    assert "warning: no model.int8.onnx: it needs opset 13 or newer, and model.onnx is of opset 11" in output
    bundle = load_bundle(tmp_path / "b")
    assert onnx.load(bundle.model).opset_import[0].version == 11
    assert "explain.onnx" in bundle.files
    assert "model.int8.onnx" not in bundle.files
    assert "opset 13 or newer" in bundle.contract["left_out"]["model.int8.onnx"]
    assert api.verify(tmp_path / "b").passed


def test_a_by_product_that_can_not_be_made_is_left_out_and_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> bytes:
        raise FgvcError("no such operator\nand more")

    monkeypatch.setattr(proving, "_explain", fails)
    result = api.export(run, tmp_path / "b")
    assert "explain.onnx" not in load_bundle(tmp_path / "b").files
    assert result.proven.warnings[-1] == "the bundle has no explain.onnx, which can't be made: no such operator"
    assert "no such operator" in result.proven.contract["explain"]


def test_the_deployed_file_says_its_opset_itself(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FgvcError, match="--opset, --batch-norm: the deployed file that --against names has its own"):
        api.export(run, tmp_path / "b", against=tmp_path / "a.onnx", opset=12)
    with pytest.raises(FgvcError, match=r"dynamo exporter writes opset 18 to 26; .* --exporter torchscript"):
        api.export(run, tmp_path / "b", exporter="dynamo", opset=12)


def test_bad_settings_of_variants_are_refused(run: Path) -> None:
    with pytest.raises(FgvcError, match="--agreement 1.01: a share above 0 and up to 1"):
        api.Variants(agreement=1.01)
    with pytest.raises(FgvcError, match="--int8-images: at least 1"):
        api.Variants(int8=api.Int8(images=0))


def test_without_a_validation_part_train_images_judge(run: Path, exported: api.Exported) -> None:
    loaded = load_run(run)
    splits = np.where(loaded.index.splits == SPLITS.index("val"), SPLITS.index("test"), loaded.index.splits)
    vars(loaded)["images"] = replace(loaded.images, index=replace(loaded.index, splits=splits))  # a cached property
    (beside,) = variant.make_variants(loaded, exported.proven, OnnxSession(exported.proven.source), api.Variants(fp16=True))
    assert (beside.agreement.split, beside.agreement.images) == ("train", 48)


def test_the_command_lines_defaults_are_those_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, api.Variants] = {}

    def export(*_: object, variants: api.Variants, **__: object) -> None:
        calls["variants"] = variants
        raise FgvcError("enough")

    monkeypatch.setattr(api, "export", export)
    with pytest.raises(SystemExit):
        main(["export", "run", "-o", "out", "--int8"])
    assert calls["variants"] == api.Variants(int8=api.Int8())
