"""What training computes, step by step, must not change while the code is moved: losses, weights and graphs of short runs.

The figures were recorded by this file (`FGVC_WRITE_GOLDEN=1`). Where a change of behaviour is meant, record anew in a commit that
says so. A run's random streams are named by constants, so that a renamed setting changes nothing here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from threadpoolctl import threadpool_limits

from fgvc.config.exporting import Export
from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.exporting.canonical import canonicalise
from fgvc.exporting.onnx import export_onnx
from fgvc.models.backbone import deployed
from fgvc.reparam.plain import strip
from fgvc.runs.build import build_net
from fgvc.training import trainer

HERE = Path(__file__).parent
STEPS = 20
PACKAGES = ("torch", "timm", "onnx", "onnxscript", "albumentations", "numpy")
CNN, VIT = {"backbone": "test_resnet"}, {"backbone": "test_vit", "kwargs": {"img_size": 64}}
PRETRAINED = CNN | {"weights": "START"}
RUNS = {
    "plain": {"model": CNN},
    "vit": {
        "model": VIT, "optim": {"name": "adamw", "lr": 1e-5}, "techniques": {"attention_crop_drop": {}},
    },
    "probe": {"model": PRETRAINED, "ema": {"decay": 0.9}},
    "mixing": {
        "model": CNN,
        "techniques": {"mixup": {"probability": 0.4}, "snapmix": {"probability": 0.3}, "mosaic": {"probability": 0.2}},
    },
    "jigsaw": {"model": CNN, "techniques": {"dcl": {"grid": 4}, "adl": {}}, "loss": {"label_smoothing": 0.1}},
    "erasing": {
        "model": CNN,
        "ema": {"decay": 0.9}, "techniques": {"cam_erasing": {}, "acol": {}, "random_erasing": {}, "dropblock": {}},
    },
    "rounds": {"model": CNN, "techniques": {"ae_psl": {"rounds": 2}, "hide_and_seek": {}, "spatial_dropout": {}}},
    "heads": {
        "model": CNN,
        "techniques": {"multiscale_head": {}, "centre_loss": {}, "box_head": {}, "similar_smoothing": {}},
    },
    "branches": {
        "model": CNN,
        "techniques": {"acb": {}}, "train": {"grad_accum_steps": 2, "grad_checkpointing": True},
        "optim": {"lr": 1e-3, "clip_grad": 1.0},
    },
    "overparam": {"model": CNN, "techniques": {"overparam": {}}, "swa": {"start": 0.5}},
    "sam": {
        "model": PRETRAINED,
        "ema": {"decay": 0.9}, "optim": {"name": "sgd", "lr": 1e-3, "sam": {}, "l2_sp": 0.01},
    },
    "distill": {
        "model": CNN,
        "ema": {"decay": 0.9},
        "techniques": {
            "distill": {
                "teachers": [{"kind": "ema"}, {"kind": "probe", "backbone": "test_resnet", "weights": "START", "size": 96}],
                "attention": 0.1,
            }
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that stand for pretrained ones: seeded, with running statistics that are not those of a fresh net."""
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=7).train()
    for _ in range(5):
        net(torch.randn(8, 3, 64, 64))
    file = tmp_path_factory.mktemp("start") / "start.safetensors"
    save_file(net.state_dict(), file)
    file.with_name("start.safetensors.json").write_text(json.dumps({"mean": [0.5] * 3, "std": [0.5] * 3}))
    return file


@pytest.mark.parametrize("name", RUNS)
def test_training_equals_the_recorded_run(name: str, boxed: Path, start: Path, tmp_path: Path) -> None:
    now, file = _computed(RUNS[name], boxed, start, tmp_path), HERE / f"{name}.json"
    if os.environ.get("FGVC_WRITE_GOLDEN"):
        file.write_text(json.dumps(now, indent=1) + "\n")
    was = json.loads(file.read_text())
    assert now["tensors"].keys() == was["tensors"].keys()
    assert now["losses"][0] == pytest.approx(was["losses"][0], rel=1e-3)
    if now["made with"] != was["made with"]:  # twenty steps make a rounding error visible, a threshold in a technique at once
        return
    assert now["losses"] == pytest.approx(was["losses"], rel=1e-4)
    for key, (norm, mean, numbers) in was["tensors"].items():
        assert now["tensors"][key][0] == pytest.approx(norm, rel=1e-4, abs=1e-7), key
        assert now["tensors"][key][1] == pytest.approx(mean, abs=1e-4 * norm / numbers**0.5 + 1e-9), key
    assert now["graph"] == was["graph"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Compute in one thread: sums of several are rounded otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(threads)


def _computed(own: dict, boxed: Path, start: Path, place: Path) -> dict:
    tree = {
        "data": {"kind": "cub", "root": str(boxed), "val_fraction": 0.2},
        "image": {"size": 64},
        "train": {"epochs": 4, "max_steps": STEPS, "batch_size": 8, "workers": 0, "device": "cpu", **own.get("train", {})},
        "optim": own.get("optim", {} if "weights" in own["model"] else {"lr": 1e-3}),
        "log": {"every_steps": 1},
    }
    tree = json.loads(json.dumps({**own, **tree}).replace('"START"', json.dumps(str(start))))
    recipe = validate(Recipe, tree, where="golden")
    run = trainer.train(recipe, place / "run")
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert len(losses) == STEPS
    net = build_net(recipe, 3, pretrained=False).step.net
    net.load_state_dict(load_file(run / "ckpt" / "last" / "net.safetensors"))
    facts = {"backbone": recipe.model.backbone, "num_classes": 3, "kwargs": recipe.model.kwargs}
    tensors = strip(net.eval().double(), **facts, dtype=torch.float64).state_dict()
    plain = deployed(strip(net, **facts))
    settings = Export(exporter="torchscript")
    proto = export_onnx(plain, size=(64, 64), exporter=settings.exporter, opset=settings.opset)
    return {
        "made with": {package: version(package) for package in PACKAGES} | {"cpu": _processor()},
        "losses": losses,
        "tensors": {key: _size(value) for key, value in tensors.items() if value.is_floating_point()},
        "graph": canonicalise(proto, weights=None).sha256,
    }


def _processor() -> str:
    """What rounding depends on: the instructions, and whose libraries choose among them."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    vendor = next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
    return f"{torch.backends.cpu.get_cpu_capability()} {vendor}".strip()


def _size(value: torch.Tensor) -> tuple[float, float, int]:
    """Norm, mean and number of elements."""
    return float(value.norm()), float(value.mean()), value.numel()
