"""Teachers as they are opened for a run, and whole runs that learn from an earlier run and from its bundle."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file

from fgvc import api
from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.config.teachers import AnyTeacher
from fgvc.errors import FgvcError
from fgvc.models.backbone import plain_model
from fgvc.runs.build import build_net
from fgvc.runs.images import read_index
from fgvc.runs.loaded import load_run
from fgvc.studies.speed import bench_each
from fgvc.techniques.api import Output
from fgvc.techniques.distill.ensemble import TeacherEnsemble
from fgvc.techniques.plan import Attachments, Context
from fgvc.techniques.teacher import Teacher, TeacherOutput
from fgvc.training import trainer
from fgvc.training.building import teacher_loader

DEVICE = torch.device("cpu")
LARGE, SMALL = (64, 64), (32, 32)


def recipe(tree: dict, **sections: object) -> Recipe:
    return validate(Recipe, tree | sections, where="test")


def base(colours: Path) -> dict:
    return {
        "data": {"kind": "folder", "root": str(colours)},
        "model": {"backbone": "test_resnet"},
        "image": {"size": 48},
        "train": {"epochs": 2, "batch_size": 8, "workers": 0, "device": "cpu"},
        "optim": {"lr": 0.02, "warmup_epochs": 0.5},
        "export": {"exporter": "torchscript"},
    }


@pytest.fixture(scope="module")
def taught(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of a larger input, another normalisation, re-parameterised branches and an average; and its bundle."""
    folder = tmp_path_factory.mktemp("teachers")
    own = {
        "image": {"size": 64},
        "deploy": {"mean": [0.3, 0.4, 0.5], "std": [0.25, 0.5, 0.2], "channel_order": "bgr"},
        "techniques": {"acb": {}},
        "ema": {"decay": 0.9},
        "select": "ema",
        "loss": {"label_smoothing": 0.0},
    }
    run = trainer.train(recipe(base(colours), **own), folder / "run")
    api.export(run, folder / "bundle")
    return run, folder / "bundle"


@pytest.fixture
def tree(colours: Path) -> dict:
    return base(colours)


def opened(tree: dict, teacher: dict, *, out: Path | None = None, classes: tuple[str, ...] | None = None) -> Teacher:
    config = recipe(tree)
    index = read_index(config)
    built = build_net(config, len(index.classes))
    opener = teacher_loader(config, index, DEVICE, out=out)
    if classes is not None:
        opener = replace(opener, classes=classes)
    settings = TypeAdapter(AnyTeacher).validate_python(teacher)
    return opener(settings, Attachments(net=built.step.net, size=config.image.size), built.preprocess)


def pictures(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (4, size, size, 3), generator=torch.Generator().manual_seed(5))


def test_a_run_and_its_bundle_say_what_the_shipped_net_says_of_those_pixels(taught: tuple[Path, Path], tree) -> None:
    run, bundle = taught
    pixels, trained = pictures(64), load_run(run, "ema").step
    x = (pixels.flip(3) / 255 - torch.tensor([0.3, 0.4, 0.5])) / torch.tensor([0.25, 0.5, 0.2])
    with torch.no_grad():
        features = trained.net.forward_features(x.permute(0, 3, 1, 2))
        expected = trained.net.forward_head(features)
    assert recipe(tree).deploy.mean is None
    assert timm.create_model("test_resnet").pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    student = (pixels / 255 - 0.5) / 0.5
    small = torch.zeros(4, 3, *SMALL)
    for settings in ({"kind": "run", "path": run}, {"kind": "bundle", "path": bundle}):
        teacher = opened(tree, settings)
        answer = teacher(small, student.permute(0, 3, 1, 2))
        assert teacher.size == LARGE
        torch.testing.assert_close(answer.logits, expected, rtol=1e-4, atol=1e-4)
        assert (answer.features is None) == (settings["kind"] == "bundle") == (teacher.channels is None)
        if answer.features is not None:
            torch.testing.assert_close(answer.features, features, rtol=1e-3, atol=1e-4)
        assert not teacher.notes


def test_select_chooses_the_weights(taught: tuple[Path, Path], tree) -> None:
    x = torch.randn(2, 3, *LARGE, generator=torch.Generator().manual_seed(0))
    ema, last = (opened(tree, {"kind": "run", "path": taught[0], "select": select}) for select in ("ema", "last"))
    assert torch.equal(ema(x).logits, opened(tree, {"kind": "run", "path": taught[0]})(x).logits)
    assert not torch.equal(ema(x).logits, last(x).logits)
    assert ema.identity() != last.identity()
    start = opened(tree, {"kind": "run", "path": taught[0], "select": "start"})
    assert np.abs(start(x).logits.numpy() - last(x).logits.numpy()).max() > 0.01


@pytest.mark.parametrize("kind", ["run", "bundle"])
def test_classes_in_another_order_are_put_right(kind: str, taught: tuple[Path, Path], tree) -> None:
    settings = {"kind": kind, "path": taught[kind == "bundle"]}
    x = torch.randn(2, 3, *LARGE, generator=torch.Generator().manual_seed(0))
    straight, turned = opened(tree, settings), opened(tree, settings, classes=("red", "blue", "green"))
    assert torch.equal(turned(x).logits, straight(x).logits[:, [2, 0, 1]])
    assert turned.identity() != straight.identity()
    with pytest.raises(FgvcError, match=r"it lacks 'pink'; it has besides 'red'"):
        opened(tree, settings, classes=("pink", "blue", "green"))


def weights_file(folder: Path, classes: int) -> tuple[Path, torch.nn.Module]:
    torch.manual_seed(3)
    net = plain_model("test_efficientnet", classes)
    save_file(net.state_dict(), folder / "teacher.safetensors")
    return folder / "teacher.safetensors", net.eval()


def test_a_timm_model_from_a_file_has_its_own_size_and_normalisation(tmp_path: Path, tree) -> None:
    path, net = weights_file(tmp_path, 3)
    settings = {"kind": "timm", "backbone": "test_efficientnet", "weights": str(path)}
    assert opened(tree, settings).size == (160, 160)
    assert "says nothing of its mean and std" in opened(tree, settings).notes[0]
    (tmp_path / "teacher.safetensors.json").write_text(json.dumps({"mean": [0.1, 0.2, 0.3], "std": [0.3, 0.2, 0.1]}))
    teacher, pixels = opened(tree, settings | {"size": [64, 64]}), pictures(64)
    x = (pixels / 255 - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.3, 0.2, 0.1])
    answer = teacher(((pixels / 255 - 0.5) / 0.5).permute(0, 3, 1, 2))
    with torch.no_grad():
        torch.testing.assert_close(answer.logits, net(x.permute(0, 3, 1, 2)), rtol=1e-4, atol=1e-4)
    assert not teacher.notes
    (tmp_path / "teacher.safetensors.json").unlink()
    own = opened(tree, settings | {"size": [64, 64], "mean": [0.1, 0.2, 0.3], "std": [0.3, 0.2, 0.1]})
    assert torch.equal(own(((pixels / 255 - 0.5) / 0.5).permute(0, 3, 1, 2)).logits, answer.logits)
    assert not own.notes


def test_with_sam_each_teacher_is_asked_once_a_part(
    taught: tuple[Path, Path], tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second_passes = []

    def ask(ensemble: TeacherEnsemble, main: Output, ctx: Context, *, features: bool) -> list[TeacherOutput]:
        second_passes.append(ctx.second_pass)
        return outputs(ensemble, main, ctx, features=features)

    outputs = TeacherEnsemble.outputs
    monkeypatch.setattr(TeacherEnsemble, "outputs", ask)
    teachers = {"distill": {"teachers": [{"kind": "run", "path": str(taught[0])}]}}
    config = recipe(tree, techniques=teachers, optim=tree["optim"] | {"sam": {}})
    config = config.model_copy(update={"train": config.train.model_copy(update={"grad_accum_steps": 2, "max_steps": 3})})
    trainer.train(config, tmp_path / "run")
    assert second_passes == [False] * 6


def test_a_timm_model_without_a_trained_head_is_refused(tmp_path: Path, tree) -> None:
    path, _ = weights_file(tmp_path, 7)
    with pytest.raises(FgvcError, match="its head does not have 3 outputs, one for each class of this run"):
        opened(tree, {"kind": "timm", "backbone": "test_efficientnet", "weights": str(path)})


def test_a_teacher_that_still_learns_is_warned_of(tmp_path: Path, taught: tuple[Path, Path], tree) -> None:
    run = Path(shutil.copytree(taught[0], tmp_path / "run", symlinks=True))
    assert opened(tree, {"kind": "run", "path": run}).notes == ()
    meta = run / "ckpt/last/meta.json"
    meta.write_text(meta.read_text().replace('"finished": true', '"finished": false'))
    assert opened(tree, {"kind": "run", "path": run}).notes == ("WARNING: its training is not finished",)


def test_what_is_not_there_is_named(tmp_path: Path, taught: tuple[Path, Path], tree) -> None:
    with pytest.raises(FgvcError, match=r"no: not a run of fgvc"):
        opened(tree, {"kind": "run", "path": tmp_path / "no"})
    with pytest.raises(FgvcError, match=r"no: no such bundle"):
        opened(tree, {"kind": "bundle", "path": tmp_path / "no"})
    with pytest.raises(FgvcError, match=r"no file .*no\.pth"):
        opened(tree, {"kind": "timm", "backbone": "test_resnet", "weights": str(tmp_path / "no.pth")})
    with pytest.raises(FgvcError, match=r"this run's own folder; kind: ema"):
        opened(tree, {"kind": "run", "path": taught[0]}, out=taught[0] / ".." / taught[0].name)


def test_a_size_that_it_can_not_take_is_said(tmp_path: Path, tree) -> None:
    torch.manual_seed(0)
    save_file(plain_model("test_vit", 3).state_dict(), tmp_path / "vit.safetensors")
    settings = {"kind": "timm", "backbone": "test_vit", "weights": str(tmp_path / "vit.safetensors")}
    assert opened(tree, settings | {"size": [64, 96]}).size == (64, 96)
    with pytest.raises(FgvcError, match=r"can't take images of 70 x 70: .* divisible by patch size"):
        opened(tree, settings | {"size": [70, 70]})


def test_opening_draws_nothing(taught: tuple[Path, Path], tree) -> None:
    config = recipe(tree)
    index = read_index(config)
    built = build_net(config, len(index.classes))
    opener, attachments = teacher_loader(config, index, DEVICE), Attachments(net=built.step.net, size=SMALL)
    before = torch.get_rng_state()
    for kind, path in zip(("run", "bundle"), taught, strict=True):
        opener(TypeAdapter(AnyTeacher).validate_python({"kind": kind, "path": path}), attachments, built.preprocess)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_may_not_overwrite_its_own_teacher(taught: tuple[Path, Path], tree, tmp_path: Path) -> None:
    shutil.copytree(taught[0], tmp_path / "run", symlinks=True)
    config = recipe(tree, techniques={"distill": {"teachers": [{"kind": "run", "path": str(tmp_path / "run")}]}})
    with pytest.raises(FgvcError, match=r"techniques\.distill\.teachers: .*this run's own folder"):
        trainer.train(config, tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / "ckpt" / "last" / "net.safetensors").is_file()


def test_without_an_average_the_bench_leaves_it_out(tree) -> None:
    from fgvc.config.techniques import settings_by_kind

    alone = recipe(tree)
    two = {kind: settings for kind, settings in settings_by_kind().items() if kind in ("distill", "mixup")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fgvc.studies.speed.settings_by_kind", lambda: two)
        assert [ratio.name.split()[1] for ratio in bench_each(alone, pairs=6)] == ["plain", "mixup"]


def losses(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_from_an_earlier_run_and_its_bundle_to_a_bundle_of_ones_own(
    taught: tuple[Path, Path], tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, bundle = (Path(shutil.copytree(path, tmp_path / path.name, symlinks=True)) for path in taught)
    teachers = [{"kind": "run", "path": str(run)}, {"kind": "bundle", "path": str(bundle)}]
    settings = {"teachers": teachers, "hints": 0.1, "attention": 0.1, "method": "dkd", "beta": 1.0}
    config = recipe(tree, techniques={"distill": settings, "mixup": {"probability": 0.5}}, checkpoint={"every_steps": 2})
    assert api.forecast(config).techniques["distill"] == "0 (and its teachers' own)"
    student = trainer.train(config, tmp_path / "student")
    part = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 7})})
    trainer.train(part, tmp_path / "again")
    trainer.train(config, tmp_path / "again")
    for name in ("net", "branches"):
        once, again = (
            load_file(tmp_path / which / "ckpt/last" / f"{name}.safetensors") for which in ("student", "again")
        )
        assert once.keys() == again.keys()
        assert all(torch.equal(value, again[key]) for key, value in once.items())
    assert losses(student) == losses(tmp_path / "again")
    assert {"distill.kd", "distill.hints", "distill.attention", "distill.teacher_accuracy"} <= losses(student)[0].keys()

    plain = plain_model("test_resnet", 3)
    assert load_file(student / "ckpt/last/net.safetensors").keys() == plain.state_dict().keys()
    branches = load_file(student / "ckpt/last/branches.safetensors")
    assert set(branches) == {"distill.hint0.weight", "distill.hint0.bias"}
    state = torch.load(student / "ckpt/last/state.pt", weights_only=True)
    trained = sum(len(group["params"]) for group in state["optimizer"]["param_groups"])
    assert trained == len(list(plain.parameters())) + 2

    # From here on nobody is left to ask.
    shutil.rmtree(run)
    shutil.rmtree(bundle)
    assert api.evaluate(student, "test").scores.images == 12
    assert api.export(student, tmp_path / "own").proven.structural.passed
    assert api.preview(load_run(student).recipe, tmp_path / "sheets", images=2, run=student).sheets
    step = load_run(student, "last", branches=True).step
    assert not len(step.branches)
    with pytest.raises(FgvcError, match=r"techniques\.distill\.teachers: .*not a run of fgvc"):
        trainer.train(config.model_copy(update={"train": config.train.model_copy(update={"epochs": 3})}), student)


def test_a_lone_file_says_what_its_bundle_says(taught: tuple[Path, Path], tree, tmp_path: Path) -> None:
    bundle, file = taught[1], tmp_path / "model.onnx"
    shutil.copy(bundle / "model.onnx", file)
    with pytest.raises(FgvcError, match=r"nothing says which classes it has"):
        opened(tree, {"kind": "bundle", "path": file})
    shutil.copy(bundle / "labels.json", tmp_path)
    with pytest.raises(FgvcError, match=r"nothing says how it is fed"):
        opened(tree, {"kind": "bundle", "path": file})
    shutil.copy(bundle / "preprocess.json", tmp_path)
    teachers = [opened(tree, {"kind": "bundle", "path": path}) for path in (bundle, file)]
    x = torch.rand(2, 3, *teachers[0].size)
    torch.testing.assert_close(teachers[1](x).logits, teachers[0](x).logits, rtol=0, atol=0)
    assert teachers[0].identity() != teachers[1].identity()  # another content of the same name would be another teacher


def test_a_bundle_alone_has_no_features(taught: tuple[Path, Path], tree, tmp_path: Path) -> None:
    settings = {"teachers": [{"kind": "bundle", "path": str(taught[1])}], "attention": 1.0}
    with pytest.raises(FgvcError, match=r"techniques\.distill\.attention: .*\(a bundle\).* gives logits, no features"):
        trainer.train(recipe(tree, techniques={"distill": settings}), tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_with_a_cache_the_second_run_never_asks_and_ends_with_the_same_bits(
    taught: tuple[Path, Path], tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    inner = Teacher.__call__

    def counting(self: Teacher, *arguments: object) -> object:
        names.append(self.name)
        return inner(self, *arguments)

    monkeypatch.setattr(Teacher, "__call__", counting)
    teachers = [{"kind": "run", "path": str(taught[0])}, {"kind": "bundle", "path": str(taught[1])}]
    settings = {"teachers": teachers, "cache": str(tmp_path / "cache")}
    config = recipe(tree, techniques={"distill": settings})
    first = trainer.train(config, tmp_path / "first")
    steps = 2 * (48 // 8)
    assert len(names) == 2 * steps
    second = trainer.train(config, tmp_path / "second")
    assert len(names) == 2 * steps
    assert losses(first) == losses(second)
    assert len(list((tmp_path / "cache").glob("*/epoch-000[01].f32"))) == 4
    # A seed, a crop or images changed on the way are something else.
    for number, other in enumerate(
        (
            {"train": tree["train"] | {"seed": 1}},
            {"augment": {"flip": 0.0}},
            {"image": {"size": 32}},
            {"techniques": {"distill": settings, "ae_psl": {"rounds": 2}}},
        )
    ):
        before = len(names)
        trainer.train(recipe(tree | {"techniques": {"distill": settings}} | other), tmp_path / f"other{number}")
        assert len(names) == before + 2 * steps, other
