"""Two processes of half a batch each know what one process of the whole batch knows."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from fgvc.techniques.ranks import gathered

# `known` runs here, too.
SCRIPT = '''
import torch
from torch import nn
from torch.nn import functional as F

from fgvc.techniques.attention_crop_drop.attention import BilinearAttention
from fgvc.techniques.ranks import gathered
from fgvc.techniques.attention_crop_drop.settings import AttentionCropDropSettings
from fgvc.techniques.cam_erasing.settings import CamErasingSettings
from fgvc.techniques.centre_loss.settings import CentreLossSettings
from fgvc.techniques.mixup.settings import MixupSettings
from fgvc.techniques.similar_smoothing.settings import SimilarSmoothingSettings
from fgvc.runs.step import StepModule
from fgvc.techniques.api import Batch
from fgvc.techniques.registry import build_technique


class Pooled(nn.Module):
    """Without batch norm: halves of a batch say what they say together."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward_features(self, x):
        return F.avg_pool2d(x, 8)

    def forward_head(self, f, pre_logits=False):
        return f.mean((2, 3)) if pre_logits else self.fc(f.mean((2, 3)))

    def get_classifier(self):
        return self.fc


def batch(number, rank, world):
    rng = torch.Generator().manual_seed(number)
    x = torch.rand(8, 3, 32, 32, generator=rng)
    y = torch.randint(0, 2, (8,), generator=rng)
    index = torch.randperm(20, generator=rng)[:8]
    geometry = torch.eye(3)[:2].expand(8, 2, 3) * (1 + index[:, None, None])
    rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
    x, y, index, geometry = (part[rows] for part in (x, y, index, geometry))
    return Batch(x=x, target=[(y, None)], x_clean=x, labels=y, index=index, geometry=geometry)


def known(rank, world):
    """What is known after four steps, of which the third is mixed, and after one update by given vectors."""
    torch.manual_seed(0)
    crop, erase = AttentionCropDropSettings(maps=2, centre_rate=0.3), CamErasingSettings(source="previous_epoch", probability=0)
    settings = (erase, MixupSettings(), crop, CentreLossSettings(), SimilarSmoothingSettings())
    techniques = {technique.kind: build_technique(technique) for technique in settings}
    step = StepModule(Pooled(), techniques, size=(32, 32)).train()
    step.branches.eval()
    for number in range(4):
        data = batch(number, rank, world)
        draws = step.draw(data, 0.0, seed=0, step=number, rank=rank)
        draws.of["mixup"] = (torch.ones(len(data.x)), torch.arange(len(data.x))) if number == 2 else None
        step(data, draws)
        for kind, after in step.hooks("after_step"):
            after(step.contexts[kind])
    branch = BilinearAttention(3, 2, 4)
    rng = torch.Generator().manual_seed(9)
    v, y = torch.randn(8, 6, generator=rng), torch.tensor([1, 2, 1, -1, 2, 2, -1, 3])
    rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
    branch.follow(gathered(v[rows]), gathered(y[rows]), rate=0.5)
    store = techniques["cam_erasing"].state_dict()
    centres = step.branches["attention_crop_drop"]["attention"].centres
    drawn_to, alike = step.branches["centre_loss"]["centres"].values, step.branches["similar_smoothing"]["means"].values
    store |= {"drawn to": drawn_to, "alike": alike}
    return {"centres": centres, "given": branch.centres, "rows": gathered(batch(0, rank, world).index), **store}
'''


def test_one_process_gathers_its_own_rows() -> None:
    for values in (torch.rand(3, 2), torch.arange(3), torch.tensor([True, False])):
        assert gathered(values) is values


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, two_ranks: Callable[[str, Path], AbstractContextManager[Path]]
) -> list[dict[str, torch.Tensor]]:
    """What one process knows, and what each of two does."""
    place = tmp_path_factory.mktemp("ranks")
    with two_ranks(SCRIPT, place) as script:
        one = runpy.run_path(str(script))["known"](0, 1)
    return [one, *(torch.load(place / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))]


def test_rows_come_in_the_order_of_the_ranks(runs: list[dict[str, torch.Tensor]]) -> None:
    one, *both = runs
    assert all(torch.equal(rank["rows"], one["rows"]) for rank in both)


@pytest.mark.parametrize("name", ["centres", "given", "drawn to", "alike"])
def test_centres_are_those_of_the_whole_batch(runs: list[dict[str, torch.Tensor]], name: str) -> None:
    one, *both = runs
    assert torch.equal(both[0][name], both[1][name])
    torch.testing.assert_close(both[0][name], one[name], rtol=1e-5, atol=1e-6)
    assert one[name].abs().sum(1).count_nonzero() == (3 if name == "given" else 2)


def test_given_vectors_move_the_centres_by_their_means(runs: list[dict[str, torch.Tensor]]) -> None:
    v = torch.nn.functional.normalize(torch.randn(8, 6, generator=torch.Generator().manual_seed(9)))
    expected = torch.stack([torch.zeros(6), (v[0] + v[2]) / 2, (v[1] + v[4] + v[5]) / 3, v[7]]) / 2
    for run in runs:
        torch.testing.assert_close(run["given"], expected)


def test_every_rank_keeps_the_maps_of_all(runs: list[dict[str, torch.Tensor]]) -> None:
    one, *both = runs
    for name in ("maps", "to_image"):
        assert torch.equal(both[0][name], both[1][name])
        assert len(both[0][name]) == len(one[name])
    assert torch.equal(both[0]["to_image"], one["to_image"])
    apart = (both[0]["maps"].int() - one["maps"].int()).abs().max()
    assert apart <= 1, "one grey level may be lost in rounding"
    assert (one["to_image"].abs().sum((1, 2)) > 0).sum() > 8
