"""Errors name the file, the line, the key path and the nearest valid key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

from fgvc.config.loading import differences, dump, load, validate
from fgvc.config.recipe import Recipe, with_weight_defaults
from fgvc.config.shipped import recipes
from fgvc.config.template import commented
from fgvc.data.recipe import load_recipe
from fgvc.errors import FgvcError
from fgvc.runs.build import refuse_names
from fgvc.techniques.dcl.settings import DclSettings

GOOD = """\
data:
  kind: folder
  root: images
model:
  backbone: test_resnet
techniques:
  mixup:
    alpha: 0.3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text(GOOD)
    return path


def refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(FgvcError) as caught:
        load_recipe(file, overrides)
    return str(caught.value)


def test_overrides_win_over_the_file(file: Path) -> None:
    recipe = load_recipe(file, ["optim.lr=1e-3", "techniques.mixup=null", "techniques.acb={}", "image.size=[64,128]"])
    assert recipe.optim.lr == 0.001
    assert recipe.techniques.mixup is None
    assert recipe.techniques.acb is not None
    assert recipe.image.size == (64, 128)
    assert load_recipe(file).techniques.mixup.alpha == 0.3


def test_an_unknown_key_is_named_with_its_line_and_the_nearest(file: Path) -> None:
    file.write_text(GOOD + "optim:\n  lr: 0.1\n  wieght_decay: 0\n")
    assert refusal(file) == f"{file}:11: optim.wieght_decay: unknown key; did you mean 'weight_decay'?"


def test_an_unknown_key_of_a_union_member(file: Path) -> None:
    file.write_text(GOOD.replace("root: images", "root: images\n  val_fractoin: 0.2"))
    assert refusal(file) == f"{file}:4: data.val_fractoin: unknown key; did you mean 'val_fraction'?"


def test_an_unknown_technique(file: Path) -> None:
    assert "techniques.mixpu: unknown key; did you mean 'mixup'?" in refusal(file, "techniques.mixpu={}")


def test_a_bad_value_in_an_override_names_the_override(file: Path) -> None:
    assert refusal(file, "optim.lr=-1") == "override 'optim.lr=-1': optim.lr: must be above 0 (got -1)"


def test_several_errors_come_together(file: Path) -> None:
    assert len(refusal(file, "optim.lr=-1", "train.epochs=0", "ema.decay=2").splitlines()) == 3


def test_a_missing_key(file: Path) -> None:
    file.write_text("model: {backbone: test_resnet}\ndata: {kind: cub}\n")
    assert refusal(file) == f"{file}:2: data.root: missing; give it a value"


def test_a_wrong_kind_of_data(file: Path) -> None:
    assert "'cub', 'folder', 'csv'" in refusal(file, "data.kind=cup")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.backbone=mobilenetv2_10", "model.backbone: timm has no model 'mobilenetv2_10'; nearest: mobilenetv2_100"),
        ("optim.name=adamv", "optim.name: timm has no optimizer 'adamv'; nearest: adam"),
        (
            "techniques.distill.teachers=[{kind: timm, backbone: resnet5, weights: a.pth}]",
            "techniques.distill.teachers.0.backbone: timm has no model 'resnet5'; nearest: resnet",
        ),
    ],
)
def test_names_that_only_timm_knows_are_refused_before_data_are_read(file: Path, setting: str, message: str) -> None:
    recipe = load(Recipe, file, [setting])
    with pytest.raises(FgvcError, match=re.escape(message)):
        refuse_names(recipe)


def test_ema_must_be_on_to_be_selected(file: Path) -> None:
    assert "select: ema needs" in refusal(file, "select=ema")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1,\n", "not valid YAML"),
        ("- 1\n", "a recipe is a mapping"),
        ("data: {}\ndata: {}\n", "my.yaml:2: data: given twice, first on line 1"),
    ],
)
def test_files_that_are_no_recipes(file: Path, text: str, expected: str) -> None:
    file.write_text(text)
    assert expected in refusal(file)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "can't read the recipe" in refusal(tmp_path / "none.yaml")


@pytest.mark.parametrize("override", ["optim", "=3", "optim..lr=3"])
def test_an_override_without_key_or_value_is_refused(file: Path, override: str) -> None:
    assert "write it as section.key=value" in refusal(file, override)


def test_a_dump_loads_back_equal(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file, ["ema.decay=0.9"])
    (tmp_path / "again.yaml").write_text(dump(recipe))
    assert load(Recipe, tmp_path / "again.yaml") == recipe


def test_differences_are_dotted_leaves() -> None:
    assert differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 5}, "e": 3}) == {
        "a.c": (2, 5), "d": (3, None), "e": (None, 3),
    }  # fmt: skip


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_loads_and_its_commented_form_says_the_same(name: str, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(commented(Recipe, recipes()[name], fill=with_weight_defaults))
    place = ["data.root=somewhere"]
    if "kind: auto" in own.read_text():  # finds out what is there
        for folder in ("a", "b"):
            (tmp_path / "set" / folder).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "set" / folder / "one.png")
        place = [f"data.root={tmp_path / 'set'}"]
    assert load_recipe(own, place) == load_recipe(recipes()[name], place)
    assert "root" not in yaml.safe_load(recipes()[name].read_text()).get("data", {}), (
        "a recipe names no place of its own"
    )
    assert "# target = (1 - e) one-hot + e / K" in own.read_text()


def test_an_override_of_an_unknown_section_is_blamed_itself(file: Path) -> None:
    assert refusal(file, "foo.bar=1").startswith("override 'foo.bar=1': foo: unknown key")


@pytest.mark.parametrize(("text", "expected"), [("a: [", "not valid YAML"), ("model: 5", "a section of settings")])
def test_init_of_a_broken_file_is_named(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(FgvcError, match=expected):
        commented(Recipe, tmp_path / "broken.yaml", fill=with_weight_defaults)


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("deploy", {"std": [0.2, 0, 0.2]}, r"deploy.std.1: must be above 0"),
        ("deploy", {"fill": [0, 256, 0]}, r"deploy.fill.1: must be at most 255"),
        ("image", {"size": "abc"}, r"image.size: one number for a square, or \[height, width\]; not 'abc'"),
    ],
)
def test_values_that_no_image_could_have(section: str, value: dict, message: str) -> None:
    tree = {"data": {"kind": "folder", "root": "x"}, "model": {"backbone": "resnet18"}, section: value}
    with pytest.raises(FgvcError, match=message):
        validate(Recipe, tree, where="test")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["deploy.mean=[123.7,116.3,103.5]"], "deploy.mean: (123.7, 116.3, 103.5) is outside of 0..1"),
        (["deploy.mean=[0.5,0.5,1.01]"], "outside of 0..1"),
        (["deploy.mean=[0.5,-0.1,0.5]"], "give it in units of 0..1"),
        (["deploy.mean=[.nan,0.5,0.5]"], "outside of 0..1"),
        (["deploy.mean=[.inf,0.5,0.5]"], "outside of 0..1"),
        (["deploy.input_range=255", "deploy.mean=[256,1,1]"], "outside of 0..255"),
        (["deploy.input_range=255", "deploy.mean=[-1,1,1]"], "outside of 0..255"),
        (["deploy.std=[0.2,0,0.2]"], "deploy.std.1: must be above 0 (got"),
        (["deploy.std=[0.2,-0.2,0.2]"], "deploy.std.1: must be above 0 (got"),
        (["deploy.std=[0.2,.inf,0.2]"], "deploy.std.1: must be a finite number"),
        (["deploy.std=[0.2,.nan,0.2]"], "deploy.std.1: must be"),
    ],
)
def test_a_mean_that_no_picture_has_is_refused(file: Path, overrides: list[str], message: str) -> None:
    assert message in refusal(file, *overrides)


def test_the_ends_of_the_range_are_means(file: Path) -> None:
    for mean in ("[0,0,0]", "[1,1,1]"):
        load_recipe(file, [f"deploy.mean={mean}"])
    load_recipe(file, ["deploy.input_range=255", "deploy.mean=[0,127.5,255]"])


@pytest.mark.parametrize(
    ("setting", "message"), [({"mean": [124, 116, 104]}, "outside of 0..1"), ({"std": [0.2, 0.2, 0]}, "above 0")]
)
def test_a_teacher_has_a_mean_and_std_that_can_be_too(file: Path, setting: dict, message: str) -> None:
    teacher = {"kind": "timm", "backbone": "test_resnet", "weights": "w.safetensors"} | setting
    tree = yaml.safe_load(GOOD) | {"techniques": {"distill": {"teachers": [teacher]}}}
    with pytest.raises(FgvcError, match=message):
        validate(Recipe, tree, where="recipe")


def test_a_value_that_cannot_be_says_what_it_must_be_and_what_was_given(file: Path) -> None:
    for override, message in {
        "image.train_scale=0": "image.train_scale: must be above 0 (got 0)",
        "train.epochs=0": "train.epochs: must be at least 1 (got 0)",
        "train.seed=1.5": "train.seed: must be a whole number (got 1.5)",
        "optim.layer_decay=2": "optim.layer_decay: must be at most 1 (got 2)",
        "ema.decay=1": "ema.decay: must be below 1 (got 1)",
        "deploy.resize=cut": "deploy.resize: must be 'crop', 'pad' or 'squash' (got 'cut')",
        "optim=adamw": "optim: must be a mapping of keys (got 'adamw'); did you mean optim.name=adamw?",
    }.items():
        assert refusal(file, override).split(": ", 1)[1] == message


def test_a_rate_alone_leaves_the_optimizer_as_it_is(file: Path) -> None:
    """With pretrained weights: AdamW; one that is named has the settings' own defaults."""
    weights = "model.weights=w.safetensors"
    optim = load_recipe(file, [weights, "optim={}"]).optim
    assert (optim.name, optim.lr, optim.weight_decay) == ("adamw", 3e-4, 0.01)
    optim = load_recipe(file, [weights, "optim={lr: 0.001}"]).optim
    assert (optim.name, optim.lr, optim.weight_decay) == ("adamw", 1e-3, 0.01)
    optim = load_recipe(file, [weights, "optim={name: sgd}"]).optim
    assert (optim.name, optim.lr, optim.weight_decay) == ("sgd", 0.03, 1e-4)
    optim = load_recipe(file, ["model.weights=none", "optim={lr: 0.001}"]).optim
    assert (optim.name, optim.lr, optim.weight_decay) == ("sgd", 1e-3, 1e-4)


def test_an_override_reaches_into_a_list_of_sections(file: Path) -> None:
    teachers = "techniques.distill.teachers=[{kind: run, path: a}, {kind: run, path: b}]"
    distill = load_recipe(file, [teachers, "techniques.distill.teachers.1.path=c"]).techniques.distill
    assert [(teacher.path, teacher.weight) for teacher in distill.teachers] == [(Path("a"), 1), (Path("c"), 1)]
    message = "techniques.distill.teachers: a list, which has no '2'; give one of its items (0, 1), or the whole list"
    assert message in refusal(file, teachers, "techniques.distill.teachers.2.path=c")
    wrong = "techniques.distill.teachers.1.weight=-1"
    assert refusal(file, teachers, wrong).startswith(f"override {wrong!r}: techniques.distill.teachers.1.weight: ")
    assert "augment.crop_scale: " in refusal(file, "augment.crop_scale.0=1")


def test_an_override_replaces_the_alternative_that_the_file_has(tmp_path):
    """A recipe of a timm net is one of a deployed file by one override, and the other way round."""
    path = tmp_path / "mine.yaml"
    path.write_text("data: {kind: folder, root: .}\nmodel: {backbone: resnet18, kwargs: {in_chans: 3}, weights: hub}\n")
    model = load(Recipe, path, ["model.onnx=net.onnx"]).model
    assert (model.onnx, model.backbone, model.kwargs, model.weights) == (Path("net.onnx"), None, {}, "deployed")
    assert load(Recipe, path, ["model.onnx=net.onnx", "model.weights=packaged"]).model.weights == "packaged"
    assert load(Recipe, path, ["model.onnx=null"]).model.backbone == "resnet18"
    path.write_text("data: {kind: folder, root: .}\nmodel: {onnx: net.onnx, output: scores}\n")
    model = load(Recipe, path, ["model.backbone=resnet18"]).model
    assert (model.onnx, model.output, model.backbone) == (None, None, "resnet18")
    with pytest.raises(FgvcError, match="both are given"):
        load(Recipe, path, ["model.backbone=resnet18", "model.onnx=other.onnx"])


@pytest.mark.parametrize(
    ("value", "lines"),
    [
        ("-1", ["techniques.dcl.classify: must be at least 0 (got -1)"]),
        ("[[0, -1], [2, 1]]", ["techniques.dcl.classify.0.1: must be at least 0 (got -1)"]),
        ("[[0, a]]", ["techniques.dcl.classify.0.1: must be a number (got 'a')"]),
        ("a", ["must be a number (got 'a')", "must be a list (got 'a')"]),
    ],
)
def test_of_a_value_of_two_types_the_one_that_was_given_is_blamed(file: Path, value: str, lines: list[str]) -> None:
    message = refusal(file, f"techniques.dcl.classify={value}").splitlines()
    assert all(line in row for line, row in zip(lines, message, strict=False)), message
    assert not any("must be a list" in row or "must be a number (got [" in row for row in message) or value == "a"


def test_an_empty_section_is_off_and_says_so(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(GOOD + "ema:\nswa: null\n")
    text = GOOD.replace("techniques:\n", "techniques:\n  dcl:\n")
    assert text != GOOD
    file.write_text(text + "ema:\nswa: null\nselect:\n")
    assert load_recipe(file).techniques.dcl is None
    first, second = capsys.readouterr().err.splitlines()
    assert f"{file}:" in first
    assert "techniques.dcl: empty, so it is off; write {} for it with its defaults, null for off" in first
    assert "ema: empty" in second
    assert load_recipe(file, ["techniques.dcl={}", "ema.decay=0.9"]).techniques.dcl is not None
    assert capsys.readouterr().err == ""


def test_requirements_of_another_type_are_refused(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.setattr(DclSettings, "requires", {"average": True})
    with pytest.raises(FgvcError, match=r"techniques\.dcl: its settings' `requires` is \{.*return a Requires"):
        load_recipe(file, ["techniques.dcl={}"])


def test_an_opset_that_the_exporter_does_not_write_is_refused_when_the_recipe_is_read(file: Path) -> None:
    message = refusal(file, "export.exporter=torchscript", "export.opset=24")
    assert message.startswith("export.opset=24: torch's torchscript exporter writes opset 7 to 23; set export.exporter=dynamo")


def test_data_of_no_kind_are_whatever_lies_there(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / "set" / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "set" / folder / "one.png")
    path = tmp_path / "my.yaml"
    path.write_text(f"data: {{root: {tmp_path / 'set'}}}\nmodel: {{backbone: test_resnet}}\n")
    assert load(Recipe, path).data.kind == "auto"
    assert load_recipe(path).data.kind == "folder"
