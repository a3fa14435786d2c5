"""`fgvc probe`: which images it judges by, what it ranks, and that its advice works as it is printed."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from fgvc import api
from fgvc.cli.app import main
from fgvc.config.images import Deploy
from fgvc.config.models import Model
from fgvc.config.shipped import recipe_file
from fgvc.config.teachers import ProbeTeacher
from fgvc.data.recipe import load_recipe
from fgvc.data.splits import fold_numbers
from fgvc.errors import FgvcError
from fgvc.models.backbone import plain_model
from fgvc.models.probe import fit_probe
from fgvc.studies.advice import Advice, advise, summary
from fgvc.studies.candidate import open_candidate
from fgvc.techniques.distill.settings import DistillSettings
from fgvc.training import trainer

FAST = ("train.workers=0", "train.device=cpu")


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A weights file of a tiny net, with its sidecar."""
    folder = tmp_path_factory.mktemp("weights")

    def make(net: str = "test_resnet", *, name: str = "", seed: int = 0, **facts: object) -> Path:
        file = folder / f"{name or net}.safetensors"
        torch.manual_seed(seed)
        kwargs = facts.get("kwargs", {})
        assert isinstance(kwargs, dict)
        save_file(plain_model(net, 7, kwargs).state_dict(), file)
        sidecar = {"mean": [0.5] * 3, "std": [0.5] * 3} | facts
        file.with_name(file.name + ".json").write_text(json.dumps(sidecar))
        return file

    return make


@pytest.fixture(scope="module")
def shades(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Colours that are hard to tell apart: 12 train, 8 val and 4 test pictures each."""
    root = tmp_path_factory.mktemp("shades")
    for k, colour in enumerate([(120, 100, 100), (113, 105, 100), (108, 100, 108)]):
        for part, count in (("train", 12), ("val", 8), ("test", 4)):
            for i in range(count):
                paint(
                    root / part / f"shade {k}" / f"{i:02d}.png",
                    colour,
                    seed=1000 * k + 100 * len(part) + i,
                    size=(12, 12),
                )
    return root


def paint(path: Path, colour: tuple[int, int, int], *, seed: int, size: tuple[int, int]) -> None:
    pixels = np.clip(np.array(colour) + np.random.default_rng(seed).normal(0, 60, (*size, 3)), 0, 255)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def call(*arguments: object) -> None:
    """Run the command line, which must end well."""
    with pytest.raises(SystemExit) as stop:
        main([str(one) for one in arguments])
    assert stop.value.code == 0


@pytest.fixture
def recipe(recipe_tree: dict, shades: Path, weights: Callable[..., Path], tmp_path: Path) -> Path:
    recipe_tree["data"]["root"] = str(shades)
    recipe_tree["model"]["weights"] = str(weights())
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe_tree))
    return tmp_path / "mine.yaml"


def test_the_images_are_those_of_train_and_validation(recipe: Path, shades: Path) -> None:
    probe = api.probe(str(recipe))
    names = probe.data.index.paths[probe.data.rows].tolist()
    assert len(names) == probe.data.available == 60
    assert {name.split("/")[0] for name in names} == {"train", "val"}
    assert [(one.size, one.crop) for one in sorted(probe.results, key=lambda one: one.crop)] == [
        ((32, 32), 0.95),
        ((32, 32), 1),
    ]
    assert probe.results[0].accuracy >= probe.results[1].accuracy


def test_the_test_part_is_not_read(recipe: Path, shades: Path, tmp_path: Path) -> None:
    spoiled = tmp_path / "set"
    shutil.copytree(shades, spoiled)
    for file in spoiled.glob("test/*/*"):
        file.write_bytes(b"no picture")
    whole, rest = summary(api.probe(str(recipe))), summary(api.probe(str(recipe), [f"data.root={spoiled}"]))
    for one in (*whole["results"], *rest["results"]):
        del one["seconds_per_image"]
    assert rest["results"] == whole["results"]
    assert not rest["notes"]
    table = "\n".join(
        [
            "path,label,split",
            *(f"{p.relative_to(spoiled)},{p.parent.name},{p.parts[-3]}" for p in spoiled.glob("*/*/*")),
        ]
    )
    (spoiled / "set.csv").write_text(table)
    by_table = api.probe(str(spoiled / "set.csv"), FAST, starts=[str(_weights_of(recipe))], sizes=[(32, 32)])
    assert by_table.data.available == 60


def _weights_of(recipe: Path) -> Path:
    return Path(load_recipe(recipe).model.weights)


def test_the_accuracy_is_that_of_a_loop_by_hand(recipe: Path) -> None:
    probe = api.probe(str(recipe), crops=[1.0])
    assert len(probe.results) == 1
    result, data = probe.results[0], probe.data
    start = open_candidate(str(_weights_of(recipe)), deploy=Deploy(), size=(32, 32))
    loaded = load_recipe(recipe, ["deploy.crop_pct=1"])
    from fgvc.evaluation.features import compute_features, load_frozen

    x = compute_features(loaded, load_frozen(loaded, 3), data.index, data.rows).vectors
    y = data.index.labels[data.rows]
    numbers = fold_numbers(y, folds=5, seed=0)
    right = np.zeros(len(y), bool)
    for number in range(5):
        learn = numbers != number
        fit = fit_probe(x[learn], y[learn], classes=3, strengths=(result.curve.strength,))
        right[~learn] = fit.logits(x[~learn]).argmax(1) == y[~learn]
    assert result.accuracy == right.mean()
    assert result.macs == start.macs((32, 32))


def test_a_larger_set_is_sampled_and_said(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("probe", recipe, "--images", 30, "--crop", 1)
    output = capsys.readouterr().out
    assert "30 images to learn from, a stratified sample of 60" in output
    probe = api.probe(str(recipe), images=30, crops=[1.0])
    assert np.bincount(probe.data.index.labels[probe.data.rows]).tolist() == [10] * 3


def test_a_sample_of_many_classes_can_still_hold_some_of_each_out(recipe: Path) -> None:
    probe = api.probe(str(recipe), images=3, crops=[1.0])
    assert np.bincount(probe.data.index.labels[probe.data.rows]).tolist() == [5] * 3
    assert probe.data.scarce == 0


def test_a_larger_size_is_proposed_as_the_option_reads_it(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("probe", recipe, "--crop", 1, "--size", "32x64")
    output = capsys.readouterr().out
    assert "such as --size 32x64 --size 64x96" in output
    assert max(map(len, output.split("not read\n")[1].split("ms:")[0].splitlines()[:-1])) <= 80


def test_groups_are_held_out_as_a_whole(shades: Path, weights: Callable[..., Path], tmp_path: Path) -> None:
    rows = [
        (file, file.parent.name, f"{file.parent.name} {int(file.stem) // 3}")
        for file in sorted(shades.glob("train/*/*"))
    ]
    lines = ["file,class,plant_id", *(f"{file},{label},{plant}" for file, label, plant in rows)]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    probe = api.probe(
        str(tmp_path), [*FAST, "data.test_fraction=0"], starts=[str(weights())], sizes=[(32, 32)], crops=[1.0]
    )
    groups = probe.data.groups
    assert groups is not None
    for fold in probe.data.folds:
        assert set(groups[fold.held_out]).isdisjoint(groups[fold.train[0]])
    assert summary(probe)["groups"] == 12
    assert probe.results[0].curve.groups is not None, "so the interval counts groups"


def test_a_size_that_a_net_cannot_take(shades: Path, weights: Callable[..., Path]) -> None:
    vit = weights("test_vit", name="test_vit", backbone="test_vit", kwargs={"dynamic_img_size": False})
    probe = api.probe(str(shades), FAST, starts=[str(weights()), str(vit)], sizes=[(32, 32)], crops=[1.0])
    assert [one.candidate.name for one in probe.results] == ["test_resnet"]
    assert any("test_vit: can't take images of 32 x 32" in note for note in probe.notes)
    with pytest.raises(FgvcError, match=r"test_vit: could not be tried.*\n.*can't take images of 32 x 32"):
        api.probe(str(shades), FAST, starts=[str(vit), str(weights())], sizes=[(32, 32)], crops=[1.0])


def test_classes_with_too_few_images_are_counted(recipe: Path, shades: Path, tmp_path: Path) -> None:
    for file in shades.glob("train/*/*"):
        alone = file.parent.name == "shade 0" and file.stem != "00"
        if not alone:
            (tmp_path / "set" / file.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / "set" / file.parent.name)
    settings = [f"data.root={tmp_path / 'set'}", "data.test_fraction=0"]
    probe = api.probe(str(recipe), settings, crops=[1.0])
    assert probe.data.scarce == 1
    assert probe.results[0].curve.held_out.sum() == 24
    for name in ("shade 1", "shade 2"):
        for file in sorted((tmp_path / "set" / name).iterdir())[1:]:
            file.unlink()
    with pytest.raises(FgvcError, match="needs two images"):
        api.probe(str(recipe), settings)


def test_a_folder_and_the_command_to_go_on(
    shades: Path, weights: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    small, wide = weights(), weights("test_resnet", name="b", backbone="test_resnet", seed=1)
    options = ["--start", f"test_resnet={small}", "--start", wide, "--size", 32, "--size", 48]
    call("probe", shades, *FAST, *options)
    output = capsys.readouterr().out
    assert "recognised: class folders in train/, val/, test/" in output
    assert all(f"  {what}:" in output for what in ("images", "resolution", "start"))
    command = output.split("to go on:\n")[1].splitlines()[0]
    verb, action, name, *overrides = shlex.split(command)
    assert (verb, action) == ("fgvc", "train")
    trained = load_recipe(recipe_file(name), overrides)
    assert trained.data.root == shades
    assert trained.model.backbone == "test_resnet"
    assert trained.model.weights in (str(small), str(wide))
    assert trained.image.size == (32, 32), "what is deployed costs as much as the first at the first size"
    assert trained.train.device == "cpu"
    probe = api.probe(str(shades), FAST, starts=[f"test_resnet={small}", str(wide)], sizes=[(32, 32), (48, 48)])
    advice = advise(probe)
    larger = [one for one in probe.results if one.size == (48, 48)]
    if advice.teacher is not None:
        assert advice.teacher.accuracy == max(one.accuracy for one in larger) > advice.best.accuracy
        assert yaml.safe_load(advice.teacher_line)["distill"]["teachers"] == [
            {"kind": "probe", "backbone": "test_resnet", "weights": advice.teacher.candidate.model.weights, "size": 48}
        ]  # type: ignore[union-attr]
    else:
        assert max(one.accuracy for one in larger) <= advice.best.accuracy


def test_the_command_of_a_recipe_says_what_is_new(recipe: Path, shades: Path) -> None:
    own = advise(api.probe(str(recipe), crops=[0.95])).command
    assert own == f"fgvc train {recipe}"
    other = advise(api.probe(str(recipe), ["data.val_fraction=0.2"], crops=[0.5], sizes=[(48, 48)])).command
    assert other == f"fgvc train {recipe} data.val_fraction=0.2 image.size=48 deploy.crop_pct=0.5"


def test_the_best_that_costs_no_more_is_chosen_and_a_larger_one_teaches(
    shades: Path, weights: Callable[..., Path]
) -> None:
    """Of figures made by hand: a bundle has no weights to train from, and a run that knows the images advises nothing."""
    starts = [str(weights()), str(weights("test_resnet", name="b", backbone="test_resnet", seed=1))]
    probe = api.probe(str(shades), FAST, starts=starts, sizes=[(32, 32), (48, 48)], crops=[1.0])
    at = {(one.candidate.name, one.size[0]): one for one in probe.results}

    def advice_on(**right: int) -> Advice:
        """The advice where so many of 60 are named rightly; b48: by the second net at 48 pixels."""
        names = {
            "a32": ("test_resnet", 32),
            "a48": ("test_resnet", 48),
            "b32": ("test_resnet (b)", 32),
            "b48": ("test_resnet (b)", 48),
        }
        results = []
        for short, count in right.items():
            one = at[names[short.rstrip("_")]]
            curve = replace(one.curve, right=np.stack([np.arange(60) < count] * 3), held_out=np.ones(60, bool))
            learned = 30 if short.endswith("_") else 0
            results.append(replace(one, curve=curve, trained_images=learned))
        first = next(one.candidate for one in results if one.candidate.name == "test_resnet")
        return advise(replace(probe, results=tuple(results), first=first))

    advice = advice_on(a32=30, a48=40, b32=20, b48=50)
    assert (advice.best.candidate.name, advice.best.size) == ("test_resnet", (32, 32))
    assert advice.teacher is not None
    assert advice.teacher.candidate.name == "test_resnet (b)"
    assert {one.what: one.limiting for one in advice.limits} == {"images": False, "resolution": True, "start": True}
    taught = settings_of(advice.teacher_line)
    assert (taught.temperature, taught.kd, taught.teachers[0].weights) == (2, 4, starts[1]), "as docs/results.md has it"
    advice = advice_on(a32=30, b32=40, b48=35)
    assert advice.best.candidate.name == "test_resnet (b)"
    assert (advice.teacher, advice.larger) == (None, True)
    assert "b.safetensors" in advice.command
    assert advice_on(a32=30, b32_=60, b48_=60).best.accuracy == 0.5
    assert advice_on(a32=60).limits[-1].what == "ceiling"


def settings_of(teacher_line: str) -> DistillSettings:
    return DistillSettings.model_validate(yaml.safe_load(teacher_line)["distill"])


@pytest.mark.parametrize("weights_of", ["deployed", "runs/x/ckpt/last/net.safetensors"])
def test_a_file_s_net_teaches_as_a_file(
    shades: Path, weights: Callable[..., Path], tmp_path: Path, weights_of: str
) -> None:
    probe = api.probe(str(shades), FAST, starts=[str(weights())], sizes=[(32, 32)], crops=[1.0])
    of_file = replace(probe.results[0].candidate, model=Model(onnx=tmp_path / "m.onnx", weights=weights_of))
    advice = replace(advise(probe), teacher=replace(probe.results[0], candidate=of_file))
    (teacher,) = settings_of(advice.teacher_line).teachers
    assert isinstance(teacher, ProbeTeacher)
    assert (teacher.onnx, teacher.backbone, teacher.size) == (tmp_path / "m.onnx", None, (32, 32))
    assert ("not the run's" in advice.teacher_line) == (weights_of != "deployed")


def test_a_parquet_file_is_a_set_of_images(shades: Path, weights: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    import pyarrow as pa
    import pyarrow.parquet

    files = sorted(shades.glob("train/*/*"))
    images = [{"bytes": file.read_bytes(), "path": None} for file in files]
    table = pa.table({"image": images, "label": [file.parent.name for file in files]})
    pa.parquet.write_table(table, tmp_path / "shades.parquet")
    options = [*FAST, "data.test_fraction=0"]
    probe = api.probe(str(tmp_path / "shades.parquet"), options, starts=[str(weights())], sizes=[(32, 32)], crops=[1.0])
    assert len(probe.data.rows) == len(files)
    _, _, name, *overrides = shlex.split(advise(probe).command)
    assert load_recipe(recipe_file(name), overrides).data == probe.data.recipe.data


def test_a_run_is_no_set_of_images(trained: tuple[Path, Path]) -> None:
    with pytest.raises(FgvcError, match="is no recipe; it is a run of fgvc"):
        api.probe(str(trained[0]))


def test_results_as_json(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("probe", recipe, "--crop", 1, "--json", "-")
    report = json.loads(capsys.readouterr().out)
    assert report["images"] == 60
    assert report["results"][0]["top1"].keys() == {"0.25", "0.5", "1"}
    assert report["results"][0]["seconds_per_image"] > 0
    assert report["command"].startswith("fgvc train ")
    call("probe", recipe, "--crop", 1, "--json", tmp_path / "p.json")
    assert "GMAC" in capsys.readouterr().out
    assert json.loads((tmp_path / "p.json").read_text())["results"][0]["top1"] == report["results"][0]["top1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shades: Path) -> tuple[Path, Path]:
    """A run and its bundle."""
    folder = tmp_path_factory.mktemp("trained")
    tree = {
        "data": {"kind": "folder", "root": str(shades)}, "image": {"size": 32}, "model": {"backbone": "test_resnet"},
        "train": {"epochs": 1, "batch_size": 8, "workers": 0, "device": "cpu"}, "export": {"exporter": "torchscript"},
    }  # fmt: skip
    (folder / "r.yaml").write_text(yaml.safe_dump(tree))
    run = trainer.train(load_recipe(folder / "r.yaml"), folder / "run")
    return run, api.export(run, folder / "bundle").bundle


def test_a_run_and_its_bundle_have_the_same_features(trained: tuple[Path, Path], shades: Path, recipe: Path) -> None:
    run, bundle = trained
    a, b = (open_candidate(str(path), deploy=Deploy(), size=None) for path in trained)
    assert a.spec == b.spec
    x = torch.randn(3, 3, 32, 32)
    np.testing.assert_allclose(a.embed(torch.device("cpu"))(x), b.embed(torch.device("cpu"))(x), atol=1e-4)
    assert a.model is not None
    assert a.run == run
    np.testing.assert_allclose(
        open_candidate(f"test_resnet={a.model.weights}", deploy=Deploy(), size=None).embed(torch.device("cpu"))(x),
        a.embed(torch.device("cpu"))(x),
        atol=1e-5,
    )
    probe = api.probe(str(recipe), starts=[str(run), str(bundle)], crops=[1.0])
    by_run = next(one for one in probe.results if one.candidate.name == str(run))
    assert by_run.trained_images == 36, "of train; validation was not learned from"
    assert probe.results[-1] is by_run
    assert any("was trained on 36 of these 60 images" in note for note in probe.notes)
    assert any("not known" in note for note in probe.notes)
    with pytest.raises(FgvcError, match="48 x 48|takes images of"):
        open_candidate(str(bundle), deploy=Deploy(), size=None).refuse_size((48, 48))


def test_a_graph_without_a_linear_end(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """A softmax is no end of its own; what else stands behind the last layer is."""
    tree = json.loads((trained[1] / "preprocess.json").read_text())
    del tree["network"]  # of the bundle's file
    (tmp_path / "preprocess.json").write_text(json.dumps(tree))
    model = onnx.load(trained[1] / "model.onnx")
    name = model.graph.output[0].name
    model.graph.node.append(onnx.helper.make_node("Softmax", [name], ["p"]))
    model.graph.output[0].name = "p"
    onnx.save(model, tmp_path / "softmax.onnx")
    x, place = torch.randn(3, 3, 32, 32), torch.device("cpu")
    files = (str(tmp_path / "softmax.onnx"), str(trained[1]))
    a, b = (open_candidate(file, deploy=Deploy(), size=None).embed(place)(x) for file in files)
    np.testing.assert_allclose(a, b, atol=1e-6)
    model.graph.node[-1].op_type = "Relu"
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(FgvcError, match=r"come from a Relu, not from a Gemm.*name the run"):
        open_candidate(str(tmp_path / "m.onnx"), deploy=Deploy(), size=None)


def test_a_sidecar_tells_the_net_and_its_kwargs(weights: Callable[..., Path]) -> None:
    file = weights("test_resnet", name="mine", backbone="test_resnet", kwargs={"stem_width": 8})
    candidate = open_candidate(str(file), deploy=Deploy(), size=(32, 32))
    assert candidate.model is not None
    assert (candidate.model.backbone, candidate.model.kwargs) == ("test_resnet", {"stem_width": 8})
    plain = weights("test_resnet", name="test_resnet.birds")
    assert open_candidate(str(plain), deploy=Deploy(), size=(32, 32)).model.backbone == "test_resnet"  # type: ignore[union-attr]
    with pytest.raises(FgvcError, match=r"weights of which net\? Give --start NAME="):
        open_candidate(str(weights("test_resnet", name="unknown")), deploy=Deploy(), size=None)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("gone.safetensors", "no file gone.safetensors"),
        ("test_resnet=gone.safetensors", "no file gone.safetensors"),
        ("no_such_net=hub", "timm has no model 'no_such_net'"),
        (".", "neither a run nor a bundle"),
    ],
)
def test_a_bad_start_is_refused(shades: Path, start: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["probe", str(shades), "--start", start])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_weights_that_are_broken(shades: Path, weights: Callable[..., Path], tmp_path: Path) -> None:
    state = plain_model("test_resnet", 3).state_dict()
    save_file({key: value for key, value in state.items() if "layer4" not in key}, tmp_path / "w.safetensors")
    with pytest.raises(FgvcError, match="does not fit"):
        api.probe(str(shades), FAST, starts=[f"test_resnet={tmp_path / 'w.safetensors'}"])


def test_images_that_cannot_be_read(recipe: Path, shades: Path, tmp_path: Path) -> None:
    shutil.copytree(shades, tmp_path / "set")
    (tmp_path / "set/train/shade 0/00.png").write_bytes(b"no picture")
    probe = api.probe(str(recipe), [f"data.root={tmp_path / 'set'}"])
    assert len(probe.data.rows) == 59
    assert sum("skipped" in note for note in probe.notes) == 1
    with pytest.raises(FgvcError, match="1 of 60 images can't be read"):
        api.probe(str(recipe), [f"data.root={tmp_path / 'set'}", "data.max_unreadable=0"])


def test_real_birds(shared: Path) -> None:
    """The figure for a few classes is far above chance, and more images help."""
    start = f"tf_efficientnet_lite0={shared / 'weights/tf_efficientnet_lite0.safetensors'}"
    probe = api.probe(
        str(shared / "data/cub50"), [*FAST, "data.first_classes=6"], starts=[start], sizes=[(96, 96)], crops=[1.0]
    )
    result = probe.results[0]
    assert len(probe.data.rows) == 180
    assert result.accuracy > 0.6
    assert result.macs is not None
    assert result.macs / (96 / 224) ** 2 == pytest.approx(0.39e9, rel=0.05), (
        "published: 0.39 G multiply-adds at 224 pixels"
    )
    assert result.candidate.parameters == pytest.approx(4.65e6 - 1281 * 1000, rel=0.01)
