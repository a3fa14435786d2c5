"""A teacher without training: a frozen net whose head is fitted when the run begins, and kept in its checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression

from fgvc import api
from fgvc.config.images import Preprocess
from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.config.teachers import ProbeTeacher
from fgvc.config.techniques import settings_by_kind
from fgvc.data.augment import Augmenter
from fgvc.data.loader import augmented_views, evaluation_loader
from fgvc.errors import FgvcError
from fgvc.runs.distributed import process_group
from fgvc.runs.images import read_index
from fgvc.studies.identity import digest
from fgvc.studies.speed import bench_each
from fgvc.techniques.plan import Attachments
from fgvc.techniques.teacher import Teacher
from fgvc.training import trainer
from fgvc.training.session import open_session
from fgvc.training.start import fit_teachers
from fgvc.training.teachers import TeacherLoader

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Of a net with seven outputs, which a run of three classes has no use for; it says how it is fed."""
    torch.manual_seed(7)
    save_file(timm.create_model("test_efficientnet", num_classes=7).state_dict(), tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors.json").write_text(json.dumps({"mean": MEAN, "std": STD}))
    return tmp_path / "w.safetensors"


@pytest.fixture
def teacher(weights: Path) -> dict[str, Any]:
    return {"kind": "probe", "backbone": "test_efficientnet", "weights": str(weights), "size": 64}


def recipe(tree: dict, *teachers: dict, distill: dict | None = None, **sections: dict) -> Recipe:
    techniques = {"techniques": {"distill": {"teachers": list(teachers)} | (distill or {})}}
    exporter = {"export": {"exporter": "torchscript"}}
    return validate(Recipe, tree | exporter | techniques | {k: tree.get(k, {}) | v for k, v in sections.items()}, where="test")


def saved_teachers(run: Path) -> list[dict[str, Any]]:
    return torch.load(run / "ckpt" / "last" / "state.pt", weights_only=True)["teachers"]


def same(a: Path, b: Path) -> bool:
    one, other = (load_file(run / "ckpt" / "last" / "net.safetensors") for run in (a, b))
    return all(torch.equal(value, other[key]) for key, value in one.items())


def never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fgvc.training.start._fit_head", lambda *_, **__: pytest.fail("fitted"))


def by_hand(weights: Path, one: Recipe, strength: float) -> Callable[[torch.Tensor], np.ndarray]:
    """Probabilities for images (B,3,64,64): scikit-learn's, on timm's features of the views."""
    index = read_index(one)
    net = timm.create_model("test_efficientnet", num_classes=0).eval()
    net.load_state_dict({k: v for k, v in load_file(weights).items() if not k.startswith("classifier.")})
    # Cropped as for the student, whose timm weights say 0.95 and bilinear.
    spec = Preprocess(size=(64, 64), mean=MEAN, std=STD, crop_pct=0.95, interpolation="bilinear")
    rows, seed = index.rows("train"), one.train.seed
    plain = list(evaluation_loader(index, rows, spec=spec, batch_size=16, workers=0))
    augmenter = Augmenter(one.augment, spec, seed=seed)
    views = list(augmented_views(index, rows, augmenter=augmenter, views=2, batch_size=16, seed=seed, workers=0))
    pixels = [((view.images / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2) for view in views]
    with torch.no_grad():
        x = torch.cat([net(part) for part in (*(batch.images for batch in plain), *pixels)]).double().numpy()
    y = torch.cat([batch.labels for batch in (*plain, *views)]).numpy()
    assert len(y) == 3 * len(rows)
    spread = x.std(axis=0)
    spread = np.maximum(spread, 0.3 * np.median(spread))
    fitted = LogisticRegression(C=strength, max_iter=500).fit(((x - x.mean(axis=0)) / spread).astype(np.float32), y)

    def probabilities(images: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            return fitted.predict_proba((net(images).double().numpy() - x.mean(axis=0)) / spread)

    return probabilities


def test_it_says_what_logistic_regression_on_its_features_says(
    recipe_tree: dict, weights: Path, teacher: dict
) -> None:
    one = recipe(recipe_tree, teacher)
    with process_group(one.train) as process, open_session(one, process) as session:
        opened, student = session.step.attachments.teachers[0], session.preprocess
        assert not opened(torch.zeros(2, 3, 64, 64)).logits.any(), "the head of the weights file is dropped"
        (name, fit), *others = fit_teachers(session).items()
        assert not others
        assert f"test_efficientnet of {weights}" in name
        assert (fit.images, fit.views) == (48, 3)
        assert fit.held_out_loss is not None
        pixels = torch.rand(9, 64, 64, 3, generator=torch.Generator().manual_seed(0))
        of_student = (pixels - torch.tensor(student.mean)) / torch.tensor(student.std)
        own = (pixels - torch.tensor(MEAN)) / torch.tensor(STD)
        p = opened(of_student.permute(0, 3, 1, 2)).logits.softmax(1).numpy()
    expected = by_hand(weights, one, fit.strength)(own.permute(0, 3, 1, 2))
    np.testing.assert_allclose(p, expected, atol=5e-3)
    assert expected.std(axis=0).max() > 0.02


def test_a_run_of_it_is_a_run_of_the_same_net_with_that_head(
    tmp_path: Path, recipe_tree: dict, weights: Path, teacher: dict
) -> None:
    once = {"train": {"epochs": 1}}
    run = trainer.train(recipe(recipe_tree, teacher, **once), tmp_path / "run")
    (state,) = saved_teachers(run)
    whole = {k: v for k, v in load_file(weights).items() if not k.startswith("classifier.")}
    save_file(whole | {f"classifier.{key}": value for key, value in state["head"].items()}, tmp_path / "whole.safetensors")
    shutil.copy(f"{weights}.json", tmp_path / "whole.safetensors.json")
    trained = teacher | {"kind": "timm", "weights": str(tmp_path / "whole.safetensors")}
    assert same(trainer.train(recipe(recipe_tree, trained, **once), tmp_path / "other"), run)

    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (event,) = [line for line in events if line["event"] == "teacher"]
    assert state["fit"].items() <= event.items()
    assert state["fit"].keys() == {"images", "views", "strength", "held_out_loss"}


def test_a_run_that_goes_on_has_the_head_that_it_began_with(
    tmp_path: Path, recipe_tree: dict, weights: Path, teacher: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    two, keep = (teacher, teacher | {"size": [48, 32], "weight": 2}), {"checkpoint": {"every_steps": 2, "keep": 2}}
    whole = trainer.train(recipe(recipe_tree, *two, **keep), tmp_path / "whole")
    parts = trainer.train(recipe(recipe_tree, *two, **keep, train={"max_steps": 3}), tmp_path / "parts")
    began = saved_teachers(parts)
    assert len(began) == 2
    assert not torch.equal(began[0]["head"]["weight"], began[1]["head"]["weight"])
    never(monkeypatch)

    # Of another file it would say something else with that head.
    state = load_file(weights)
    save_file(state | {"conv_stem.weight": state["conv_stem.weight"] * 1.5}, weights)
    with pytest.raises(FgvcError, match="not the net that its head was fitted to"):
        trainer.train(recipe(recipe_tree, *two, **keep), parts)
    save_file(state, weights)
    sidecar = Path(f"{weights}.json").read_text()
    Path(f"{weights}.json").write_text(json.dumps({"mean": MEAN, "std": MEAN}))
    with pytest.raises(FgvcError, match="not the net that its head was fitted to"):
        trainer.train(recipe(recipe_tree, *two, **keep), parts)
    Path(f"{weights}.json").write_text(sidecar)

    # A damaged head is noticed, and an older checkpoint has the same.
    path = (parts / "ckpt" / "last").resolve() / "state.pt"
    raw = bytearray(path.read_bytes())
    at = raw.find(began[0]["head"]["weight"].numpy().tobytes())
    assert at > 0
    raw[at] ^= 1
    path.write_bytes(raw)
    trainer.train(recipe(recipe_tree, *two, **keep), parts)
    assert same(whole, parts)
    for was, now in zip(began, saved_teachers(parts), strict=True):
        assert torch.equal(was["head"]["weight"], now["head"]["weight"])
        assert torch.equal(was["head"]["bias"], now["head"]["bias"])
    longer = trainer.train(recipe(recipe_tree, *two, **keep, train={"epochs": 3}), whole)
    assert torch.equal(saved_teachers(longer)[0]["head"]["weight"], began[0]["head"]["weight"])


def test_nothing_but_training_fits_or_needs_its_file(
    tmp_path: Path, recipe_tree: dict, weights: Path, teacher: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = recipe(recipe_tree, teacher, train={"max_steps": 2})
    run = trainer.train(one, tmp_path / "run")
    weights.unlink()
    never(monkeypatch)
    assert "test_efficientnet" in " ".join(api.forecast(one).notes)
    assert api.preview(one, tmp_path / "sheets", images=2).sheets
    assert api.preview(one, tmp_path / "sheets2", images=2, run=run).sheets
    alone = {"distill": settings_by_kind()["distill"]}
    monkeypatch.setattr("fgvc.studies.speed.settings_by_kind", lambda: alone)
    assert [ratio.name.split(":")[0] for ratio in bench_each(one, pairs=6)] == ["step", "teacher", "step"]
    assert api.evaluate(run, "test").scores.images == 12
    assert api.export(run, tmp_path / "bundle").proven.structural.passed
    with pytest.raises(FgvcError, match=r"techniques\.distill\.teachers: .*no file"):
        trainer.train(one, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_an_estimate_of_a_study_does_not_fit(
    tmp_path: Path, recipe_tree: dict, teacher: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fgvc.studies.run import estimate
    from fgvc.studies.study import read_study

    never(monkeypatch)
    monkeypatch.setattr("fgvc.studies.cost.PAIRS", 1)
    (tmp_path / "base.yaml").write_text(json.dumps(recipe_tree))
    arms = {"plain": {}, "taught": {"techniques.distill.teachers": [teacher | {"weights": "nowhere.safetensors"}]}}
    (tmp_path / "study.yaml").write_text(json.dumps({"base": "base.yaml", "arms": arms, "seeds": [0]}))
    costs = estimate(read_study(tmp_path / "study.yaml"), tmp_path / "out")
    assert not costs.refused
    assert costs.costs["taught"].ratio > 0


def test_its_answers_are_kept_for_the_next_run_that_fits_the_same_head(
    tmp_path: Path, recipe_tree: dict, teacher: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    inner = Teacher.__call__

    def counting(self: Teacher, *arguments: object) -> object:
        names.append(self.name)
        return inner(self, *arguments)

    monkeypatch.setattr(Teacher, "__call__", counting)
    once = {"distill": {"cache": str(tmp_path / "cache")}, "train": {"epochs": 1}}
    config = recipe(recipe_tree, teacher, **once)
    first = trainer.train(config, tmp_path / "first")
    assert (before := len(names)) == 6
    second = trainer.train(config, tmp_path / "second")
    assert len(names) == before
    assert same(first, second)
    trainer.train(recipe(recipe_tree, teacher | {"size": 48}, **once), tmp_path / "third")
    assert len(names) == 2 * before


def test_the_digest_is_of_its_weights_and_settings(recipe_tree: dict, weights: Path, teacher: dict) -> None:
    before = digest(recipe(recipe_tree, teacher))
    moved = weights.with_name("moved.safetensors")
    weights.rename(moved)
    Path(f"{weights}.json").rename(f"{moved}.json")
    assert digest(recipe(recipe_tree, teacher | {"weights": str(moved)})) == before
    assert digest(recipe(recipe_tree, teacher | {"weights": str(moved), "size": 48})) != before
    state = load_file(moved)
    save_file({key: value * 1.1 for key, value in state.items()}, moved)
    assert digest(recipe(recipe_tree, teacher | {"weights": str(moved)})) != before


NETS = ["test_resnet", "test_vit", "test_convnext", "test_mambaout", "test_nfnet", "test_byobnet", "mobilenetv3_small_050"]


@pytest.mark.parametrize("backbone", NETS)
def test_any_net_with_a_linear_head_teaches(tmp_path: Path, recipe_tree: dict, backbone: str) -> None:
    torch.manual_seed(3)
    net = timm.create_model(backbone)
    save_file(net.state_dict(), tmp_path / "any.safetensors")
    settings = {"kind": "probe", "backbone": backbone, "weights": str(tmp_path / "any.safetensors")}
    normalisation = {"mean": MEAN, "std": STD} | ({} if backbone == "test_vit" else {"size": 32})
    one = recipe(recipe_tree, settings | normalisation)
    with process_group(one.train) as process, open_session(one, process) as session:
        (fit,) = fit_teachers(session).values()
        assert fit.images == 48
        opened = session.step.attachments.teachers[0]
        assert not [note for note in opened.notes if "says nothing of its mean" in note]
        assert opened(torch.randn(3, 3, *(opened.size or (0, 0)))).logits.abs().max() > 0


@pytest.mark.parametrize(
    ("backbone", "kwargs", "reason"),
    [
        ("deit_tiny_distilled_patch16_224", {}, "has no linear head .*; take another net"),
        ("test_resnet", {"global_pool": ""}, "can.t take images of"),
    ],
)
def test_refuses_a_net_without_a_linear_head_on_pooled_features(
    tmp_path: Path, recipe_tree: dict, backbone: str, kwargs: dict, reason: str
) -> None:
    save_file(timm.create_model(backbone).state_dict(), tmp_path / "two.safetensors")
    settings = {"kind": "probe", "backbone": backbone, "weights": str(tmp_path / "two.safetensors"), "kwargs": kwargs}
    with pytest.raises(FgvcError, match=rf"techniques\.distill\.teachers: .* {reason}"):
        trainer.train(recipe(recipe_tree, settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_comes_before_the_last_layer_must_be_in_the_file(tmp_path: Path, recipe_tree: dict) -> None:
    state = timm.create_model("test_convnext").state_dict()
    lost = "head.norm.weight"
    save_file({key: value for key, value in state.items() if key != lost}, tmp_path / "part.safetensors")
    settings = {"kind": "probe", "backbone": "test_convnext", "weights": str(tmp_path / "part.safetensors"), "size": 32}
    with pytest.raises(FgvcError, match=lost):
        trainer.train(recipe(recipe_tree, settings), tmp_path / "run")


def test_weights_of_a_run_that_saw_what_is_set_aside_are_warned_of(tmp_path: Path, recipe_tree: dict) -> None:
    everything = {"kind": "folder", "root": str(Path(recipe_tree["data"]["root"]) / "train")}
    plain = {key: value for key, value in recipe_tree.items() if key != "data"}
    of_all = validate(Recipe, plain | {"data": everything | {"test_fraction": 0, "val_fraction": 0}}, where="test")
    one_step = of_all.train.model_copy(update={"max_steps": 1})
    trainer.train(of_all.model_copy(update={"train": one_step}), tmp_path / "seen")
    file = str(tmp_path / "seen" / "ckpt" / "last" / "net.safetensors")
    settings = {"kind": "probe", "backbone": "test_resnet", "weights": file, "size": 32}
    one = recipe(plain | {"data": everything | {"test_fraction": 0.25, "val_fraction": 0}}, settings)
    with process_group(one.train) as process, open_session(one, process) as session:
        assert "trained on 12 of the images" in " ".join(session.step.attachments.teachers[0].notes)


def test_random_weights_have_nothing_to_teach(recipe_tree: dict, teacher: dict) -> None:
    with pytest.raises(FgvcError, match="random weights"):
        recipe(recipe_tree, teacher | {"weights": "none"})


# `known` runs here, too.
RANKS = """
import json
from pathlib import Path

import torch

from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.runs.distributed import ProcessGroup
from fgvc.training.session import open_session
from fgvc.training.start import fit_teachers


def known(rank, world):
    recipe = validate(Recipe, json.loads(Path(__file__).with_name("recipe.json").read_text()), where="ranks")
    torch.manual_seed(rank)
    with open_session(recipe, ProcessGroup(torch.device("cpu"), rank, world, "fp32")) as session:
        fits = fit_teachers(session)
        x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        (state,) = session.capture().rest["teachers"]
        said = session.step.attachments.teachers[0](x).logits
        return {"said": said, "fits": [str(fit) for fit in fits.values()], **state["head"]}
"""


def test_all_ranks_have_the_head_that_the_first_one_fitted(
    tmp_path: Path, recipe_tree: dict, teacher: dict, two_ranks: Callable[[str, Path], AbstractContextManager[Path]]
) -> None:
    import runpy

    one = recipe(recipe_tree, teacher)
    (tmp_path / "recipe.json").write_text(one.model_dump_json())
    with two_ranks(RANKS, tmp_path) as script:
        alone = runpy.run_path(str(script))["known"](0, 1)
    both = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name in ("said", "weight", "bias"):
        assert torch.equal(both[0][name], both[1][name])
        torch.testing.assert_close(both[0][name], alone[name])
    assert both[0]["fits"] == both[1]["fits"] == alone["fits"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the older exporter
def test_a_deployed_file_s_net_teaches_at_a_larger_size(tmp_path: Path, recipe_tree: dict, weights: Path, teacher: dict) -> None:
    """As timm's net does from which the file was made."""
    net = timm.create_model("test_efficientnet", num_classes=7)
    net.load_state_dict(load_file(weights))
    file = tmp_path / "deployed.onnx"
    torch.onnx.export(net.eval(), (torch.zeros(1, 3, 32, 32),), file, dynamo=False)
    fed = Preprocess(size=(32, 32), mean=MEAN, std=STD)
    (tmp_path / "preprocess.json").write_text(fed.model_dump_json())
    x, answers = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(0)), []
    for one in (teacher, {"kind": "probe", "onnx": str(file), "size": 64}):
        made = recipe(recipe_tree, one)
        with process_group(made.train) as process, open_session(made, process) as session:
            opened = session.step.attachments.teachers[0]
            (fit,) = fit_teachers(session).values()
            answers.append((fit.strength, opened(x).logits.softmax(1)))
    (expected_strength, expected), (strength, found) = answers
    assert strength == expected_strength
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=0)
    assert expected.std(0).max() > 0.02

    one = recipe(recipe_tree, {"kind": "probe", "onnx": str(file), "size": 64}, train={"epochs": 1})
    run, before = trainer.train(one, tmp_path / "run"), digest(one)
    trainer.train(one.model_copy(update={"train": one.train.model_copy(update={"epochs": 2})}), run)
    (tmp_path / "preprocess.json").unlink()  # then it is fed as the run is
    assert digest(one) != before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the older exporter
def test_a_teacher_s_output_is_not_the_student_s(tmp_path: Path) -> None:
    """Fed as the student is, where nothing lies beside its file; but its outputs have their own names."""
    file, network = tmp_path / "teacher.onnx", {"output": "students"}
    net = timm.create_model("test_efficientnet", num_classes=7).eval()
    torch.onnx.export(net, (torch.zeros(1, 3, 32, 32),), file, dynamo=False)
    student = Preprocess.model_validate({"size": (32, 32), "mean": MEAN, "std": STD, "network": network})
    loader = TeacherLoader(classes=("a", "b", "c"), device=torch.device("cpu"), averaged=False)
    assert loader(ProbeTeacher(kind="probe", onnx=file), Attachments(net=net, size=(32, 32)), student).size == (32, 32)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"backbone": None, "weights": None}, "give backbone"),
        ({"onnx": "x.onnx"}, "leave out backbone"),
        ({"weights": "none"}, "random weights has nothing to teach"),
    ],
)
def test_one_net_teaches(recipe_tree: dict, teacher: dict, given: dict, message: str) -> None:
    with pytest.raises(FgvcError, match=message):
        recipe(recipe_tree, teacher | given)
