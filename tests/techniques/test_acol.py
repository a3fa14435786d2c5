"""ACoL's erased classifiers against loops in float64."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgvc.errors import FgvcError
from fgvc.runs.step import StepModule
from fgvc.techniques.acol.settings import AcolSettings
from fgvc.techniques.api import Batch, Draws
from fgvc.techniques.mixup.settings import MixupSettings
from fgvc.techniques.registry import build_technique

CLASSES, SIZE, CELLS = 5, (128, 128), 4
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # losses are taken in float32


class Pooled(nn.Module):
    """A net whose features are the image itself, in cells of 8 pixels: the class map of label k is channel k."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        with torch.no_grad():
            self.fc.weight.copy_(torch.eye(3))

    def forward_features(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 8)

    def forward_head(self, f: Tensor, pre_logits: bool = False) -> Tensor:
        return f.mean((2, 3)) if pre_logits else self.fc(f.mean((2, 3)))

    def get_classifier(self) -> nn.Module:
        return self.fc


def net(name: str = "test_resnet", **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=CLASSES, **kwargs).double()


def batch(size: int = 3) -> Batch:
    x = torch.randn(size, 3, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = (torch.arange(size) * 2) % CLASSES
    return Batch(x=x, target=[(y, None)], x_clean=x, labels=y, index=y, geometry=torch.zeros(size, 2, 3))


def painted(cells: Tensor) -> Batch:
    """Images for `Pooled` of label 0 whose map is `cells` (B,h,w)."""
    x = torch.zeros(len(cells), 3, *(8 * side for side in cells.shape[1:]), dtype=torch.float64)
    x[:, 0] = cells.repeat_interleave(8, 1).repeat_interleave(8, 2)
    y = torch.zeros(len(cells), dtype=torch.int64)
    return Batch(x=x, target=[(y, None)], x_clean=x, labels=y, index=y, geometry=torch.zeros(len(y), 2, 3))


def run_step(model: nn.Module, data: Batch, **settings: object) -> tuple[StepModule, dict[str, Tensor]]:
    size = (data.x.shape[2], data.x.shape[3])
    step = StepModule(model, {"acol": build_technique(AcolSettings(**settings))}, size=size).double().train()
    return step, step(data, Draws(0.0))[0]


def erased(cells: list[list[float]], visible: list[list[bool]], *, value: float = 0.6, most: float = 0.7) -> set:
    """Cells at `value` of the highest seen one or above, of the min-max normalised map, at most the `most` first of all."""
    low, high = min(map(min, cells)), max(map(max, cells))
    side = len(cells)
    scaled = {
        (i, j): (cells[i][j] - low) / (high - low) * visible[i][j] if high > low else 0.0
        for i in range(side)
        for j in range(side)
    }
    peak = max(scaled.values())
    order = sorted(scaled, key=lambda cell: -scaled[cell])[: int(most * side * side)]
    return {cell for cell in order if peak > 0 and scaled[cell] >= value * peak}


def expected(model: nn.Module, data: Batch, heads: list[nn.Module] | None, chain: int = 1) -> tuple[float, float]:
    """The term and the share that the last classifier does not see; heads None: the deployed classifier itself."""
    model = model.train()
    with torch.no_grad():
        features = model.forward_features(data.x)
        weight = model.get_classifier().weight
        total, hidden = 0.0, 0
        for b, f in enumerate(features):
            side = f.shape[1]
            parts = [(int(y[b]), 1.0 if w is None else float(w[b])) for y, w in data.target]
            label = max(parts, key=lambda part: part[1])[0]
            visible = [[True] * side for _ in range(side)]
            cam = [[float(weight[label] @ f[:, i, j]) for j in range(side)] for i in range(side)]
            for number in range(chain):
                for i, j in erased(cam, visible):
                    visible[i][j] = False
                rest = f * torch.tensor(visible)
                if heads is None:
                    z = model.forward_head(rest[None])[0]
                    cam = [[float(weight[label] @ rest[:, i, j]) for j in range(side)] for i in range(side)]
                else:
                    kernel, bias = heads[number].weight[:, :, 0, 0], heads[number].bias
                    cell_logits = [[kernel @ rest[:, i, j] + bias for j in range(side)] for i in range(side)]
                    z = sum(cell for row in cell_logits for cell in row) / side**2
                    cam = [[float(cell[label]) for cell in row] for row in cell_logits]
                log_sum = math.log(sum(math.exp(float(v)) for v in z))
                total += sum(w * (log_sum - float(z[y])) for y, w in parts) / len(features) / chain
            hidden += side * side - sum(map(sum, visible))
    return total, hidden / (len(features) * side * side)


@pytest.mark.parametrize("chain", [1, 2, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_the_term_is_its_formula(shared: bool, chain: int) -> None:
    step, losses = run_step(net(), batch(), heads=chain, shared=shared, erased=0.5)
    heads = None if shared else [step.branches["acol"][f"head{i}"] for i in range(chain)]
    term, area = expected(net(), batch(), heads, chain)
    assert float(losses["acol.erased"].detach()) == pytest.approx(term, rel=1e-5)
    assert float(losses["acol.area"]) == pytest.approx(area, abs=1e-6)
    assert 0 < area < 1
    torch.testing.assert_close(losses["loss"], losses["base"] + 0.5 * losses["acol.erased"])
    assert ("acol" in step.branches) != shared


def test_by_hand_the_highest_cells_go_and_no_more_than_the_bound() -> None:
    cells = torch.tensor([[[10.0, 8, 7.9, 2], [0, 0, 0, 0], [0, 0, 6, 0], [0, 0, 0, 5.9]]], dtype=torch.float64)
    step, losses = run_step(Pooled(), painted(cells))
    assert step.contexts["acol"].shown["erased"][1][0].nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [2, 2]]
    assert float(losses["acol.area"]) == pytest.approx(4 / 16)
    step, losses = run_step(Pooled(), painted(cells), region={"value": 0.1, "area": (0.0, 0.13)})
    assert step.contexts["acol"].shown["erased"][1][0].nonzero().tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize("shared", [False, True])
def test_a_flat_map_erases_nothing(shared: bool) -> None:
    data = painted(torch.full((2, 4, 4), 3.0, dtype=torch.float64))
    step, losses = run_step(Pooled(), data, shared=shared)
    assert float(losses["acol.area"]) == 0
    if shared:
        torch.testing.assert_close(losses["acol.erased"], losses["base"])
    else:
        z = step.branches["acol"]["head0"](step.net.forward_features(data.x)).mean((2, 3))
        torch.testing.assert_close(losses["acol.erased"].double(), F.cross_entropy(z, data.labels), **CLOSE)


def test_a_batch_of_one_is_like_any_other() -> None:
    step, losses = run_step(net(), batch(1))
    term, area = expected(net(), batch(1), [step.branches["acol"]["head0"]])
    assert float(losses["acol.erased"].detach()) == pytest.approx(term, rel=1e-5)
    assert float(losses["acol.area"]) == pytest.approx(area, abs=1e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_it_teaches_the_backbone_and_its_own_head(shared: bool) -> None:
    step, losses = run_step(net(), batch(), shared=shared, heads=2)
    losses["acol.erased"].backward()
    assert next(step.net.parameters()).grad.abs().max() > 0
    assert (step.net.get_classifier().weight.grad is not None) == shared
    assert all(parameter.grad.abs().max() > 0 for parameter in step.branches.parameters())
    assert len(list(step.branches.parameters())) == (0 if shared else 4)


def test_of_a_mixed_image_the_label_of_most_weight_says_what_is_erased() -> None:
    data = batch(4)
    y, other, share = data.labels, data.labels.flip(0), torch.tensor([0.8, 0.3, 0.6, 0.1])
    data.target = [(y, share), (other, 1 - share)]
    step, losses = run_step(net(), data, heads=2)
    term, area = expected(net(), data, list(step.branches["acol"].children()), 2)
    assert float(losses["acol.erased"].detach()) == pytest.approx(term, rel=1e-5)
    assert float(losses["acol.area"]) == pytest.approx(area, abs=1e-6)


def test_it_goes_with_mixup() -> None:
    techniques = {"mixup": build_technique(MixupSettings(alpha=1.0)), "acol": build_technique(AcolSettings())}
    step = StepModule(net(), techniques, size=SIZE).double().train()
    losses, views = step(batch(4), step.draw(batch(4), 0.0, seed=1, step=2))
    mixed = batch(4)
    mixed.x, mixed.target = views[0].x, views[0].target
    assert len(mixed.target) == 2
    assert not torch.equal(mixed.x, batch(4).x)
    term, _ = expected(net(), mixed, [step.branches["acol"]["head0"]])
    assert float(losses["acol.erased"].detach()) == pytest.approx(term, rel=1e-5)


def test_hidden_gives_the_papers_classifier_and_none_is_shared() -> None:
    step, losses = run_step(net(), batch(), hidden=7)
    shapes = [tuple(p.shape) for p in step.branches["acol"]["head0"].parameters() if p.ndim == 4]
    channels = step.net.num_features
    assert shapes == [(7, channels, 3, 3), (7, 7, 3, 3), (CLASSES, 7, 1, 1)]
    assert torch.isfinite(losses["acol.erased"])
    with pytest.raises(ValueError, match="with shared: true there are none"):
        AcolSettings(shared=True, hidden=7)


def test_a_net_without_class_maps_is_refused_by_name() -> None:
    vit = timm.create_model("test_vit", num_classes=CLASSES, img_size=32)
    with pytest.raises(FgvcError, match=r"techniques\.acol: no auto map: .*class token alone"):
        StepModule(vit, {"acol": build_technique(AcolSettings())}, size=(32, 32))


def test_a_weight_of_zero_makes_no_term() -> None:
    _, losses = run_step(net(), batch(), erased=((0.0, 0.0), (1.0, 1.0)))
    assert set(losses) == {"base", "loss"}


def test_something_is_left_for_the_last_classifier() -> None:
    cells = torch.tensor([[[10.0, 9, 1, 1], [9, 9, 1, 1], [9, 9, 9, 9], [9, 1, 0, 0]]], dtype=torch.float64)
    step = StepModule(Pooled(), {"acol": build_technique(AcolSettings(heads=2))}, size=(32, 32)).double().train()
    with torch.no_grad():  # head0 likes whatever is left alike
        step.branches["acol"]["head0"].weight.zero_()
        step.branches["acol"]["head0"].weight[0, 0] = 1.0
        step.branches["acol"]["head0"].weight[0, 1] = 100.0
    data = painted(cells)
    data.x[:, 1] = 1.0
    assert float(step(data, Draws(0.0))[0]["acol.area"]) < 1
