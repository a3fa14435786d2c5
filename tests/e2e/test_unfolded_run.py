"""Runs from a file whose norms are folded: trained with scales or with norms of their own, and written back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fgvc import api
from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.data.recipe import resolve_data
from fgvc.errors import FgvcError
from fgvc.models.onnxnet.net import open_onnx
from fgvc.reparam.unfold import NormedConv2d, ScaledConv2d, fit
from fgvc.runs.build import build_net
from fgvc.runs.distributed import process_group
from fgvc.runs.folder import read_run
from fgvc.runs.loaded import load_run
from fgvc.training import trainer
from fgvc.training.session import open_session
from fgvc.training.start import fit_unfolded
from tests.e2e.test_deployed_file import NAMES, outside, saved, tree
from tests.models.onnxnet import small
from tests.models.onnxnet.twins import PIXELS, exported, twin
from tests.trained import Once


@pytest.fixture(scope="session")
def folded_file(once: Once) -> Path:
    return once.made("deployed/plain", lambda folder: saved(small.plain(), folder)) / "deployed.onnx"


def settings(file: Path, pictures: Path, norm: str, **sections: dict[str, Any]) -> dict[str, Any]:
    return tree(file, pictures, model={"onnx": str(file), "batch_norm": norm}, **sections)


@pytest.fixture(scope="session", params=["frozen", "batch", "restore"])
def run(request: pytest.FixtureRequest, once: Once, colours: Path, folded_file: Path) -> tuple[str, Path]:
    tree = settings(folded_file, colours, request.param, ema={"decay": 0.5})
    return request.param, once.run(Recipe.model_validate(tree))


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def test_what_was_fitted_is_recorded_and_opened_again(run: tuple[str, Path]) -> None:
    norm, folder = run
    (fitted,) = events(folder, "unfolded")
    assert (fitted["convolutions"], fitted["norms"]) == (1, 0 if norm == "frozen" else 1)
    assert fitted["images"] > 0
    net = load_run(folder).step.net
    (scaled,) = (module for module in net.modules() if isinstance(module, ScaledConv2d))
    assert not torch.equal(scaled.scale, torch.ones_like(scaled.scale))
    restored = [module for module in net.modules() if isinstance(module, NormedConv2d)]
    assert len(restored) == fitted["norms"]
    start, last = (load_file(folder / "ckpt" / name / "net.safetensors") for name in ("start", "last"))
    for key in [key for key in start if "running_mean" in key]:
        assert not torch.equal(start[key], last[key]), "statistics follow the batches"
        assert torch.equal(start[key], start[key.replace("running_mean", "bias")])
    average = load_file(folder / "ckpt" / "start" / "ema.safetensors")
    assert all(torch.equal(average[key], start[key]) for key in start), "the average begins as the net"


def test_it_is_written_back_and_proved(run: tuple[str, Path], folded_file: Path, tmp_path: Path) -> None:
    _, folder = run
    exported = api.export(folder, tmp_path / "bundle")
    assert exported.proven.written is not None
    assert set(exported.proven.written.moved) == set(small.weights())
    assert outside(tmp_path / "bundle" / "model.onnx") == outside(folded_file)
    api.export(folder, tmp_path / "start", select="start")
    assert (tmp_path / "start" / "model.onnx").read_bytes() == folded_file.read_bytes(), "untrained: bit for bit"


@pytest.mark.parametrize("norm", ["frozen", "restore"])
def test_a_run_that_goes_on_fits_nothing_anew(norm: str, folded_file: Path, colours: Path, tmp_path: Path) -> None:
    def trained(name: str, steps: int) -> dict[str, torch.Tensor]:
        train = {"epochs": 2, "max_steps": steps}
        tree = settings(folded_file, colours, norm, train=train, optim={"l2_sp": 0.01, "lr": 0.02})
        trainer.train(Recipe.model_validate(tree), tmp_path / name)
        return load_file(tmp_path / name / "ckpt" / "last" / "net.safetensors")

    whole = trained("whole", 4)
    trained("parts", 2)
    parts = trained("parts", 4)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert len(events(tmp_path / "parts", "unfolded")) == 1


def test_weights_are_drawn_to_where_they_start(folded_file: Path, colours: Path) -> None:
    """To the values behind the scale, not those that the file has."""
    recipe = resolve_data(Recipe.model_validate(settings(folded_file, colours, "frozen", optim={"l2_sp": 0.01})))
    with process_group(recipe.train) as process, open_session(recipe, process) as session:
        before = {name: start.clone() for name, start in session.starts.items()}
        assert fit_unfolded(session) is not None
        weights = dict(session.step.named_parameters())
        assert all(torch.equal(start, weights[name]) for name, start in session.starts.items())
        assert any(not torch.equal(start, before[name]) for name, start in session.starts.items())


def test_batch_statistics_of_no_norm_are_doubted(colours: Path, tmp_path: Path) -> None:
    """A norm that is written as a product and a sum has none, and is trained as it is."""
    file = saved(small.arithmetic_norm(), tmp_path / "given")
    recipe = resolve_data(Recipe.model_validate(settings(file, colours, "batch")))
    built = build_net(recipe, len(NAMES))
    assert [doubt for doubt in built.weights.doubts if "nothing takes batch statistics" in doubt]
    assert not any(isinstance(module, ScaledConv2d | NormedConv2d) for module in built.step.net.modules())


def test_a_net_that_is_only_opened_is_the_files(folded_file: Path, colours: Path) -> None:
    plain = open_onnx(folded_file)
    for norm in ("frozen", "restore"):
        recipe = resolve_data(Recipe.model_validate(settings(folded_file, colours, norm)))
        net = build_net(recipe, len(NAMES)).step.net
        x = torch.randn(2, 3, small.SIZE, small.SIZE)
        torch.testing.assert_close(net.eval()(x), plain(x), rtol=1e-6, atol=1e-6)


def test_weights_of_the_twin_bring_the_scales_of_their_norms(once: Once, colours: Path, tmp_path: Path) -> None:
    """The weight behind the scale is the twin's own kernel, but for the rounding to powers of two."""
    source, folder = twin("test_resnet"), tmp_path / "given"
    folder.mkdir()
    shutil.copy(exported(once, "test_resnet", "folded"), folder / "net.onnx")
    (folder / "labels.txt").write_text("\n".join(NAMES))
    save_file(source.state_dict(), folder / "net.safetensors")
    tree = settings(folder / "net.onnx", colours, "frozen")
    tree["model"] |= {"weights": str(folder / "net.safetensors"), "head": "timm"}
    built = build_net(resolve_data(Recipe.model_validate(tree)), len(NAMES))
    kernels = [module.weight.detach() for module in source.modules() if isinstance(module, nn.Conv2d)]
    assert len(built.weights.scales) == len(kernels)
    net = built.step.net
    fit(net, [torch.randn(2, 3, PIXELS, PIXELS)], built.weights.scales)
    by_shape: dict[tuple[int, ...], list[torch.Tensor]] = {tuple(kernel.shape): [] for kernel in kernels}
    for kernel in kernels:
        by_shape[tuple(kernel.shape)].append(kernel)
    for module in net.modules():
        if isinstance(module, ScaledConv2d):
            ratios = [(module.weight.detach() / kernel).flatten(1) for kernel in by_shape[tuple(module.weight.shape)]]
            ratio = min(ratios, key=lambda one: float((one - one[:, :1]).abs().max()))
            torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3, atol=1e-4)
            assert ((ratio.abs() > 2**-0.51) & (ratio.abs() < 2**0.51)).all()


def test_restore_needs_a_norm_that_was_folded(colours: Path, tmp_path: Path) -> None:
    file = saved(small.kept_norm(), tmp_path / "kept")
    with pytest.raises(
        FgvcError, match=r"model\.batch_norm: restore: no convolution of .* \(it keeps 1\); set it to frozen"
    ):
        trainer.train(Recipe.model_validate(settings(file, colours, "restore")), tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()
    tree = settings(file, colours, "restore")
    tree["model"] = {"backbone": "resnet18", "batch_norm": "restore"}
    with pytest.raises(FgvcError, match="restore is for the file of model.onnx"):
        validate(Recipe, tree, where="test")


def test_a_file_that_keeps_norms_trains_them_as_they_are(colours: Path, tmp_path: Path) -> None:
    """Kept norms are the file's own in every mode: no statistics are taken of anything."""
    file = saved(small.kept_norm(), tmp_path / "kept")
    for norm in ("frozen", "batch"):
        folder = trainer.train(Recipe.model_validate(settings(file, colours, norm)), tmp_path / norm)
        assert not events(folder, "unfolded")
        assert read_run(folder).model.batch_norm == norm
        start, last = (load_file(folder / "ckpt" / name / "net.safetensors") for name in ("start", "last"))
        moved = {key for key in start if not torch.equal(start[key], last[key])}
        assert any("running_mean" in key for key in moved) == (norm == "batch")
