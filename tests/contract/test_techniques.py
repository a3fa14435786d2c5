"""What every technique owes, for each of the union: a new one is tested by being in it.

Each trains on a tiny CNN and, where it does not refuse it by name, on a tiny ViT.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fgvc.config.exporting import Export
from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.config.techniques import settings_by_kind
from fgvc.errors import FgvcError
from fgvc.exporting.onnx import Interface, export_onnx
from fgvc.exporting.proofs import compare_structure
from fgvc.exporting.reference import independent_plain
from fgvc.models.backbone import deployed
from fgvc.reparam.plain import strip
from fgvc.runs.build import build_net
from fgvc.techniques.registry import build_technique
from fgvc.training import trainer
from tests.trained import Once, copied, copied_at

NETS = {"cnn": "test_resnet", "vit": "test_vit"}
KWARGS = {"cnn": {}, "vit": {"img_size": 64}}
SIZE = (64, 64)  # two by two cells of the CNN's map: class maps of one cell say nothing
CASES = [(kind, net) for kind in [None, *settings_by_kind()] for net in NETS]


def recipe(tree: dict, kind: str | None, net: str, **train: object) -> Recipe:
    own = {
        "model": {"backbone": NETS[net], "kwargs": KWARGS[net]},
        "train": {**tree["train"], "epochs": 4, "device": "cpu", **train},
        "techniques": {kind: {}} if kind else {},
        "ema": {"decay": 0.9},
        "checkpoint": {"every_steps": 4},
    }
    return validate(Recipe, tree | own, where="test")


def weights(run: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(run / "ckpt" / "last" / f"{name}.safetensors")


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case)), scope="module")
def trained(request, boxed_few, once: Once) -> tuple[Recipe, Path, Path, Path]:
    """One uninterrupted run, what a kill within its third epoch would have left, and its plain twin, made once for all the tests
    of a technique."""
    kind, net = request.param
    tree = {"data": {"kind": "cub", "root": str(boxed_few), "val_fraction": 0.2}, "image": {"size": 64}}
    tree |= {"train": {"batch_size": 8, "workers": 0}, "optim": {"lr": 0.02, "warmup_epochs": 0.5}}
    own = recipe(tree, kind, net)
    try:
        build_net(own, 3)
    except FgvcError as error:
        if f"techniques.{kind}" not in str(error):  # a refusal names the technique
            raise
        pytest.skip(f"refused by name: {error}")

    def train(place: Path) -> None:
        with copied_at(8, place / "killed"):
            trainer.train(own, place / "whole")

    made = once.made(f"contract/{kind}-{net}", train)
    return own, made / "whole", made / "killed", once.run(recipe(tree, None, net), name="plain")


def losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_the_loss_is_finite_and_falls(trained) -> None:
    _, run, *_ = trained
    assert np.isfinite(losses(run)).all()
    assert losses(run)[-1] < losses(run)[0]


def test_it_changes_what_is_learned(trained) -> None:
    recipe, run, _, plain = trained
    kind = next((k for k in settings_by_kind() if getattr(recipe.techniques, k) is not None), None)
    if kind is None:
        assert all(torch.equal(a, weights(plain, "net")[k]) for k, a in weights(run, "net").items()), "the same twice"
    else:
        assert losses(run) != losses(plain)


def test_killed_and_resumed_it_ends_with_the_same_bits(trained, tmp_path: Path) -> None:
    recipe, run, killed, _ = trained
    resumed = trainer.train(recipe, copied(killed, tmp_path))
    for name in ("net", "branches", "ema"):
        again, once = weights(resumed, name), weights(run, name)
        assert again.keys() == once.keys()
        for key, value in once.items():
            assert torch.equal(value, again[key]), f"{name}: {key}"
    states = [torch.load(place / "ckpt" / "last" / "state.pt", weights_only=True) for place in (run, resumed)]
    for key, value in states[0]["optimizer"]["state"].items():
        torch.testing.assert_close(value, states[1]["optimizer"]["state"][key], rtol=0, atol=0)
    assert losses(run) == losses(resumed)


def test_it_strips_to_the_plain_net_and_its_graph(trained) -> None:
    recipe, run, *_ = trained
    net = build_net(recipe, 3, pretrained=False).step.net
    net.load_state_dict(weights(run, "ema"))
    net.eval().double()
    arguments = {"backbone": recipe.model.backbone, "num_classes": 3, "kwargs": recipe.model.kwargs}
    exact, plain = strip(net, **arguments, dtype=torch.float64), strip(net, **arguments)
    x = torch.randn(4, 3, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z = net(x)
        assert (exact(x) - z).abs().max() <= 1e-9 * z.abs().max()
        assert (plain(x.float()) - z).abs().max() <= 1e-4 * z.abs().max()
    settings = Export(exporter="torchscript")
    proto = export_onnx(deployed(plain), size=SIZE, exporter=settings.exporter, opset=settings.opset)
    reference, positions = reference_of(recipe.model.backbone)
    structural = compare_structure(proto, reference, positions)
    assert structural.passed, structural.differences


def reference_of(backbone: str):
    net = next(net for net, name in NETS.items() if name == backbone)
    interface = Interface(size=SIZE, opset=Export().opset)
    return independent_plain(
        backbone=backbone, num_classes=3, kwargs=KWARGS[net], interface=interface, exporter="torchscript"
    )


@pytest.mark.parametrize("kind", settings_by_kind())
def test_it_is_documented(kind: str) -> None:
    config = settings_by_kind()[kind]
    technique = build_technique(config())
    assert technique.source
    assert technique.forwards
    assert technique.leaves
    assert config.__doc__
    assert all(field.description for name, field in config.model_fields.items() if name != "kind")
