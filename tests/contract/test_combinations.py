"""A covering array: every permitted pair of techniques and ways to train occurs in one of some dozen short runs."""

from __future__ import annotations

import math
import random
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fgvc.config.conflicts import whole_label_conflicts
from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.config.techniques import Techniques, settings_by_kind
from fgvc.errors import FgvcError
from fgvc.reparam.plain import strip
from fgvc.runs.build import build_net
from fgvc.training import trainer
from tests.trained import copied_at

FALLING = [[0, 1], [1, 0]]  # some steps are left to those that learn from whole labels
SETTINGS: dict[str, list[dict]] = {
    "dcl": [{"grid": 4, "bn": "shared"}, {"grid": 4, "bn": "own"}],
    "ae_psl": [{"rounds": 2}],
    "cam_erasing": [{"source": "current"}, {"source": "previous_epoch", "probability": 0.8}, {"source": "ema"}],
    "attention_crop_drop": [{"maps": 4}, {"maps": 4, "guide": "cam"}, {"maps": 4, "guide": "random"}],
    "acol": [{"heads": 2}, {"shared": True}],
    "mosaic": [{"style": "canvas", "per": "sample"}],
    **{kind: [{"probability": FALLING}] for kind in ("mixup", "snapmix", "saliencymix")},
    "cutmix": [{"pairing": "other_class", "probability": FALLING}],
    "adl": [{"stages": [-2, "features"], "per": "sample"}],
    "distill": [{"attention": 0.1, "hints": 0.1}, {"method": "dkd", "beta": 1.0}],
    "dropblock": [{"stages": [-2, "features"], "rate": 0.2}],
    "multiscale_head": [{"stages": [-3, -2, "features"], "width": 8}],
    # Each its own convolutions, so that every two of them can meet.
    "acb": [{"include": ["conv1.*"]}],
    "dbb": [{"include": ["layer1.*"]}],
    "repvgg": [{"include": ["layer2.*"]}],
    "overparam": [{"include": ["layer[34].*"], "branches": 2}],
}
FACTORS: dict[str, list] = {
    **{kind: [None, *SETTINGS.get(kind, [{}])] for kind in settings_by_kind()},
    "grad_accum_steps": [1, 2],
    "grad_checkpointing": [False, True],
    "ema": [None, {"decay": 0.9}],
    "sam": [None, {"rho": 0.05}],
    "swa": [None, {"start": 0.4}],
    "loss": [{}, {"kind": "focal"}, {"kind": "bce", "class_weights": "balanced"}],
    "sampling": ["uniform", "balanced"],
}

Row = tuple[int, ...]


@cache
def permitted(row: Row) -> bool:
    levels_of = {kind: levels[at] for (kind, levels), at in zip(FACTORS.items(), row, strict=True)}
    chosen = Techniques(**{kind: levels_of[kind] for kind in settings_by_kind()})
    on = [one for kind in settings_by_kind() if (one := getattr(chosen, kind)) is not None]
    refused = [
        any(one.requires.average for one in on) and not levels_of["ema"],
        any(one.requires.cross_entropy for one in on) and levels_of["loss"],
        levels_of["ema"] and levels_of["swa"],
        levels_of["sampling"] == "balanced" and "class_weights" in levels_of["loss"],
    ]
    return not whole_label_conflicts(chosen) and not any(refused)


def pairs_of(row: Row) -> set[tuple[int, int, int, int]]:
    return {(i, row[i], j, row[j]) for i, j in combinations(range(len(row)), 2)}


LEVELS = [len(levels) for levels in FACTORS.values()]
PLAIN = (0,) * len(LEVELS)


def permitted_pairs() -> set[tuple[int, int, int, int]]:
    """The pairs that can occur: with all else off, or with the average of the weights where a technique asks for it."""
    average = list(FACTORS).index("ema")
    pairs = set()
    for i, j in combinations(range(len(LEVELS)), 2):
        for a in range(LEVELS[i]):
            for b in range(LEVELS[j]):
                pair = {i: a, j: b}
                rows = (tuple(({average: e} | pair).get(k, 0) for k in range(len(LEVELS))) for e in (0, 1))
                if any(permitted(row) for row in rows):
                    pairs.add((i, a, j, b))
    return pairs


def covering_array() -> list[Row]:
    """Rows that cover all pairs, greedily: of some that have a pair that is missing, the one with most new pairs."""
    missing, rng = permitted_pairs(), random.Random(5)  # of a few seeds the one with the fewest rows
    rows: list[Row] = []
    while missing:
        ordered = sorted(missing)
        candidates = [completed(*rng.choice(ordered), missing, rng) for _ in range(20)]
        rows.append(max(candidates, key=lambda row: len(pairs_of(row) & missing)))
        missing -= pairs_of(rows[-1])
    return rows


def completed(i: int, a: int, j: int, b: int, missing: set[tuple[int, int, int, int]], rng: random.Random) -> Row:
    row = list(PLAIN)
    row[i], row[j] = a, b
    average = list(FACTORS).index("ema")
    if average not in (i, j) and not permitted(tuple(row)):
        row[average] = 1
    rest = [k for k in range(len(LEVELS)) if k not in (i, j)]
    rng.shuffle(rest)
    for k in rest:
        choices = [(*row[:k], level, *row[k + 1 :]) for level in range(LEVELS[k])]
        choices.sort(key=lambda choice: (new_pairs(choice, k, missing), rng.random()), reverse=True)
        row = list(next(filter(permitted, choices)))
    return tuple(row)


def new_pairs(row: Row, k: int, missing: set[tuple[int, int, int, int]]) -> int:
    """How many missing pairs the level of factor k adds: all others are the same whatever it is."""
    before = sum((i, row[i], k, row[k]) in missing for i in range(k))
    return before + sum((k, row[k], i, row[i]) in missing for i in range(k + 1, len(row)))


ROWS = covering_array()


@pytest.fixture
def boxed_tree(boxed_tree: dict, boxed_fewest: Path) -> dict:
    """A recipe of 12 train pictures in two steps an epoch, and 3 for validation."""
    data = {"kind": "cub", "root": str(boxed_fewest), "val_fraction": 0.2}
    return boxed_tree | {"data": data, "train": boxed_tree["train"] | {"batch_size": 6}}


NONSENSE = [
    ("adl", {"drop_rate": 5}, "a share is at most 1"),
    ("adl", {"threshold": [[0, 0.9], [1, 7]]}, "a share is at most 1"),
    ("adl", {"stages": ["features", "features"]}, "each stage once"),
    ("adl", {"stages": []}, "at least 1 item"),
    ("dropblock", {"rate": 5}, "at most 0.9"),
    ("acol", {"region": {"value": 5}}, "value: 5 of a share: at most 1"),
    ("cam_erasing", {"region": {"area": [0, 0]}}, "two shares in"),
    ("cam_erasing", {"source": "previous_epoch", "weight": 0}, "weight is of the view that source: current adds"),
    ("cam_erasing", {"probability": 1.5}, "must be at most 1 "),
    ("ae_psl", {"region": {"rule": "quantile", "value": 2}}, "at most 1"),
    ("attention_crop_drop", {"crop_threshold": [0.6, 0.4]}, "the smaller first"),
    ("attention_crop_drop", {"drop_threshold": [-3, -1]}, "two shares above 0"),
    ("attention_crop_drop", {"pooled": 0, "centre": 0}, "nothing trains the maps"),
    ("cutmix", {"probability": 2}, "a share is at most 1"),
    ("mosaic", {"split": [0.3, 1.0]}, "all four have a cell"),
    ("mosaic", {"scale": [0.1, 1.0]}, "from 0.5 to 2"),
    ("centre_loss", {"rate": 1.5}, "must be at most 1 "),
    ("centre_loss", {"centre": -1}, "must be at least 0 "),
    ("similar_smoothing", {"similar": 1.5}, "a share is at most 1"),
    ("similar_smoothing", {"temperature": 0}, "must be above 0 "),
    ("cutout", {"holes": 5000}, "must be at most 64 "),
    ("multiscale_head", {"stages": [-1]}, "two or more"),
    ("multiscale_head", {"stages": [-2, -1], "level": -3}, "not one of stages"),
    ("box_head", {"box": 0}, "nothing trains the box"),
    ("box_head", {"visible": 0}, "must be above 0 "),
    ("distill", {"teachers": []}, r"give at least one, for example \[\{kind: run"),
    ("distill", {}, "needs the moving average of the weights, and there is no `ema:` section"),
    ("distill", {"teachers": [{"kind": "run", "path": "x", "weight": 0}]}, r"teachers\.0\.weight: .*must be above 0 "),
    ("distill", {"teachers": [{"kind": "run", "paht": "x"}]}, r"teachers\.0\.paht: unknown key; did you mean 'path'"),
    ("distill", {"teachers": [{"kind": "timm", "backbone": "resnet18", "weights": "none"}]}, "has nothing to teach"),
    ("distill", {"temperature": 0}, "must be above 0 "),
]


@pytest.mark.parametrize(("kind", "settings", "message"), NONSENSE)
def test_nonsense_is_refused_before_training(kind: str, settings: dict, message: str, recipe_tree: dict) -> None:
    with pytest.raises(FgvcError, match=message):
        validate(Recipe, recipe_tree | {"techniques": {kind: settings}}, where="test")


@pytest.mark.parametrize("kind", ["box_head", "centre_loss", "similar_smoothing"])
def test_some_steps_must_be_left_to_those_that_learn_from_whole_labels(kind: str, boxed_tree: dict) -> None:
    def validated(**mixers: dict) -> Recipe:
        return validate(Recipe, boxed_tree | {"techniques": {kind: {}, **mixers}}, where="test")

    message = (
        rf"techniques\.{kind}: .* mixed in every step leave none; give, for example, techniques\.m\w+\.probability=0\.5"
    )
    for mixers in (
        {"mixup": {}},
        {"mixup": {"probability": 0.5}, "cutmix": {"probability": [[0, 0.5], [1, 0.9]]}},
        {"mosaic": {"until": 1}},
    ):
        with pytest.raises(FgvcError, match=message):
            validated(**mixers)
    validated(mosaic={})
    validated(mixup={"probability": 0.5}, cutmix={"probability": 0.4})
    validated(mixup={"probability": [[0, 1], [0.5, 1], [1, 0]]})


def named(row: Row) -> str:
    chosen = {key: levels[at] for (key, levels), at in zip(FACTORS.items(), row, strict=True)}
    return "-".join(f"{key}={value}" for key, value in chosen.items() if value and value != "uniform") or "plain"


def test_every_permitted_pair_occurs_and_the_runs_are_few() -> None:
    assert all(permitted(row) for row in ROWS)
    assert permitted_pairs() <= set().union(*map(pairs_of, ROWS))
    assert len(ROWS) <= 25


# Processors without bfloat16 emulate it, at up to ten times the time.
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("row", ROWS, ids=named)
def test_a_combination_trains_resumes_and_strips(row: Row, precision: str, tmp_path: Path, boxed_tree: dict) -> None:
    chosen = {key: levels[at] for (key, levels), at in zip(FACTORS.items(), row, strict=True)}
    tree = boxed_tree | {
        "image": {"size": 64},  # two by two cells: class maps of one cell say nothing
        "techniques": {kind: chosen[kind] for kind in settings_by_kind() if chosen[kind] is not None},
        "train": boxed_tree["train"]
        | {key: chosen[key] for key in ("grad_accum_steps", "grad_checkpointing", "sampling")}
        | {"precision": precision},
        "checkpoint": {"every_steps": 3},  # within the second epoch
        **{key: chosen[key] for key in ("ema", "swa", "loss")},
        "optim": boxed_tree["optim"] | {"sam": chosen["sam"]},
    }
    recipe = validate(Recipe, tree, where="test")
    with copied_at(3, tmp_path / "killed"):
        whole = trainer.train(recipe, tmp_path / "whole")
    run = trainer.train(recipe, tmp_path / "killed")
    average = ["ema"] if chosen["ema"] or chosen["swa"] else []
    for name in ("net", "branches", *average):
        again, once = (load_file(place / "ckpt" / "last" / f"{name}.safetensors") for place in (run, whole))
        assert all(torch.equal(value, again[key]) for key, value in once.items()), name
    assert all(math.isfinite(float(line.split(",")[3])) for line in (run / "metrics.csv").read_text().splitlines()[1:])
    net = build_net(recipe, 3, pretrained=False).step.net
    net.load_state_dict(load_file(run / "ckpt" / "last" / f"{[*average, 'net'][0]}.safetensors"))
    net.eval().double()
    arguments = {"backbone": recipe.model.backbone, "num_classes": 3, "kwargs": recipe.model.kwargs}
    exact = strip(net, **arguments, dtype=torch.float64)
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z = net(x)
        assert (exact(x) - z).abs().max() <= 1e-9 * z.abs().max()
