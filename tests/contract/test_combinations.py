"""A covering array: every permitted pair of techniques and ways to train occurs in one of some dozen short runs."""

from __future__ import annotations

import math
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fgvc import api
from fgvc.config import validate
from fgvc.export.plain import strip
from fgvc.recipe import Recipe, conflicts
from fgvc.techniques import CONFIGS, Techniques
from fgvc.train.session import build_net

SETTINGS: dict[str, list[dict]] = {"dcl": [{"grid": 4, "bn": "shared"}, {"grid": 4, "bn": "own"}]}
FACTORS: dict[str, list] = {
    **{kind: [None, *SETTINGS.get(kind, [{}])] for kind in CONFIGS},
    "accumulate": [1, 2],
    "recompute": [False, True],
    "ema": [None, {"decay": 0.9}],
    "precision": ["fp32", "bf16"],
}

Row = tuple[int, ...]


def permitted(row: Row) -> bool:
    chosen = {kind: value for (kind, levels), at in zip(FACTORS.items(), row, strict=True) if (value := levels[at])}
    return not conflicts(Techniques(**{kind: value for kind, value in chosen.items() if kind in CONFIGS}))


def pairs_of(row: Row) -> set[tuple[int, int, int, int]]:
    return {(i, row[i], j, row[j]) for i, j in combinations(range(len(row)), 2)}


def covering_array() -> list[Row]:
    """Greedy: always the permitted row that has most pairs that are new."""
    rows = [row for row in product(*(range(len(levels)) for levels in FACTORS.values())) if permitted(row)]
    missing = set().union(*map(pairs_of, rows))
    found: list[Row] = []
    while missing:
        best = max(rows, key=lambda row: len(pairs_of(row) & missing))
        found.append(best)
        missing -= pairs_of(best)
    return found


ROWS = covering_array()


def named(row: Row) -> str:
    said = {key: levels[at] for (key, levels), at in zip(FACTORS.items(), row, strict=True)}
    return "-".join(f"{key}={value}" for key, value in said.items() if value) or "plain"


def test_every_permitted_pair_occurs_and_the_runs_are_few() -> None:
    rows = [row for row in product(*(range(len(levels)) for levels in FACTORS.values())) if permitted(row)]
    assert set().union(*map(pairs_of, rows)) == set().union(*map(pairs_of, ROWS))
    assert len(ROWS) <= 20


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_a_combination_trains_resumes_and_strips(row: Row, tmp_path: Path, recipe_tree: dict) -> None:
    said = {key: levels[at] for (key, levels), at in zip(FACTORS.items(), row, strict=True)}
    tree = recipe_tree | {
        "techniques": {kind: said[kind] for kind in CONFIGS if said[kind] is not None},
        "train": recipe_tree["train"] | {key: said[key] for key in ("accumulate", "recompute", "precision")},
        "ema": said["ema"],
    }
    made = validate(Recipe, tree, where="test")
    part = made.model_copy(update={"train": made.train.model_copy(update={"max_steps": 4})})
    run = api.train(part, tmp_path / "run")
    api.train(made, run)
    whole = api.train(made, tmp_path / "whole")
    for name in ("net", "branches", *(["ema"] if said["ema"] else [])):
        again, once = (load_file(place / "ckpt" / "last" / f"{name}.safetensors") for place in (run, whole))
        assert all(torch.equal(value, again[key]) for key, value in once.items()), name
    assert all(math.isfinite(float(line.split(",")[3])) for line in (run / "metrics.csv").read_text().splitlines()[1:])
    net = build_net(made, 3, pretrained=False).step.net
    net.load_state_dict(load_file(run / "ckpt" / "last" / f"{'ema' if said['ema'] else 'net'}.safetensors"))
    net.eval().double()
    arguments = {"backbone": made.model.backbone, "num_classes": 3, "kwargs": made.model.kwargs}
    exact = strip(net, **arguments, dtype=torch.float64)
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z = net(x)
        assert (exact(x) - z).abs().max() <= 1e-9 * z.abs().max()
