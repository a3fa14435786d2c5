"""A study's file: how settings are put together, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fgvc.config.loading import leaves, merge
from fgvc.errors import FgvcError
from fgvc.studies.cost import Cost, epochs_by_budget, training_hours
from fgvc.studies.study import cells, read_study

trees = st.recursive(
    st.integers(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=8
).filter(lambda tree: isinstance(tree, dict))


@pytest.fixture
def write(tmp_path: Path, recipe_tree: dict):
    """Writes a study of the coloured pictures, with other keys if asked."""

    def written(**keys: Any) -> Path:
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(recipe_tree))
        study = {"base": "base.yaml", "arms": {"plain": {}, "mixup": {"techniques.mixup.alpha": 0.3}}} | keys
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump(study, sort_keys=False))
        return path

    return written


@given(tree=trees, settings=trees)
def test_merged_settings_are_in_the_tree_and_nothing_else_is_lost(tree: dict, settings: dict) -> None:
    before = copy.deepcopy(tree)
    merge(tree, settings)
    after, changes = dict(leaves(tree)), dict(leaves(settings))
    for key, value in changes.items():
        if value == {}:  # a section: it is there, and keeps what it held
            at: Any = tree
            for part in key.split("."):
                at = at[part]
            assert isinstance(at, dict)
        else:
            assert after[key] == value
    for key, value in leaves(before):
        overlaps = any(key == k or key.startswith(f"{k}.") or k.startswith(f"{key}.") for k in changes)
        assert overlaps or after[key] == value


@given(tree=trees, settings=trees)
def test_dotted_keys_say_the_same_as_sections(tree: dict, settings: dict) -> None:
    nested, flat = copy.deepcopy(tree), copy.deepcopy(tree)
    merge(nested, settings)
    merge(flat, dict(leaves(settings)))
    assert nested == flat


def test_settings_go_from_base_to_study_to_command_line_to_arm(write: Any) -> None:
    path = write(settings={"optim": {"lr": 0.5, "momentum": 0.5}}, arms={"plain": {}, "own": {"optim.lr": 0.125}})
    plain, own = read_study(path, ["optim.momentum=0.25"]).trials
    assert (plain.recipe.optim.lr, plain.recipe.optim.momentum) == (0.5, 0.25)
    assert (own.recipe.optim.lr, own.recipe.optim.momentum) == (0.125, 0.25)
    assert plain.recipe.optim.warmup_epochs == 0.5  # the base recipe's
    assert own.settings == {"optim.lr": 0.125}


def test_trials_are_numbered_and_cells_go_seed_by_seed(write: Any) -> None:
    path = write(seeds=[3, 4], arms={"plain": [{}, {"optim.lr": 0.5}], "mixup": {"techniques.mixup": {}}})
    plan = read_study(path)
    assert [trial.name for trial in plan.trials] == ["plain", "plain.2", "mixup"]
    costs = {trial.name: Cost(1.0, 20.0) for trial in plan.trials}
    planned = cells(plan, epochs_by_budget(plan, costs))
    assert [cell.name for cell in planned] == [f"{name}-2e-s{seed}" for seed in (3, 4) for name in costs]
    assert planned[-1].recipe.train.seed == 4
    assert training_hours(planned, costs) == pytest.approx(6 * 2 * 10 * 2.0 / 3600)


def test_equal_seconds_give_a_dear_arm_fewer_epochs_and_share_runs(write: Any) -> None:
    plan = read_study(write(seeds=[0], budget=["epochs", "seconds"], settings={"train.epochs": 12}))
    # The base: 12 epochs of 20 s are 240 s. mixup: an epoch takes 50 s, so 4.8 epochs: 5.
    planned = cells(plan, epochs_by_budget(plan, {"plain": Cost(1.0, 20.0), "mixup": Cost(2.5, 50.0)}))
    assert [(cell.name, cell.budgets) for cell in planned] == [
        ("plain-12e-s0", ("epochs", "seconds")),
        ("mixup-12e-s0", ("epochs",)),
        ("mixup-5e-s0", ("seconds",)),
    ]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"arms": {"plain": {}, "bad": {"optim.lrr": 1}}},
            r"small.yaml: arms.bad: optim.lrr: unknown key; did you mean 'lr'",
        ),
        ({"arms": {"plain": {}, "bad": {"data.val_fraction": 0.5}}}, "arms.bad: data differs"),
        ({"arms": {"plain": {}, "bad": {"image.size": 64}}}, "arms.bad: another graph"),
        (
            {"arms": {"plain": {}, "long": {"train.epochs": 9}}},
            "arms.long: sets train.epochs, which goes with budget: own",
        ),
        ({"arms": {"plain": {}, "short": {"train.max_steps": 9}}}, "arms.short: train.max_steps"),
        ({"arms": {"plain": {}, "a/b": {}}}, "arms: 'a/b': a name of letters"),
        ({"arms": {"plain": []}}, "plain: no trial"),
        ({"arms": {"plain": {}, "seeded": {"train.seed": 9}}}, "arms.seeded: sets train.seed"),
        ({"arms": {"plain": {}, "picked": {"select": "best"}}}, "arms.picked: select: best lets validation choose"),
        ({"seeds": [1, 1]}, "seeds: each once"),
        ({"budget": "minutes"}, "budget"),
        ({"folds": 1}, "folds: how many there are, 2 or more"),
        ({"folds": [[0, 5], 5]}, "folds: how many there are"),
        ({"folds": [[0, 0], 5]}, "folds: how many there are"),
        ({"folds": [[], 5]}, "folds: how many there are"),
        ({"folds": 5, "settings": {"data.fold": [0, 5]}}, "arms.plain: data.fold says what validates"),
        ({"folds": 5, "arms": {"plain": {}, "odd": {"data": {"fold": [0, 5]}}}}, "arms.odd: data.fold says what validates"),
        ({"base": "nowhere"}, "nowhere: no such file, nor a recipe's id"),
    ],
)
def test_what_is_no_study_is_refused_by_file_and_arm(write: Any, keys: dict, message: str) -> None:
    with pytest.raises(FgvcError, match=message):
        read_study(write(**keys))


def test_epochs_of_their_own_are_a_budget(write: Any) -> None:
    plan = read_study(write(budget="own", seeds=[0], arms={"plain": {}, "long": {"train.epochs": 9}}))
    costs = {trial.name: Cost(1.0, 20.0) for trial in plan.trials}
    assert [cell.name for cell in cells(plan, epochs_by_budget(plan, costs))] == ["plain-2e-s0", "long-9e-s0"]


@pytest.mark.parametrize(("folds", "parts"), [(3, [(0, 3), (1, 3), (2, 3)]), ([[2, 0], 5], [(2, 5), (0, 5)])])
def test_every_run_is_made_once_a_fold(write: Any, folds: Any, parts: list[tuple[int, int]]) -> None:
    plan = read_study(write(seeds=[3, 4], folds=folds))
    costs = {trial.name: Cost(1.0, 20.0) for trial in plan.trials}
    planned = cells(plan, epochs_by_budget(plan, costs))
    assert [(cell.seed, cell.fold, cell.trial.arm) for cell in planned] == [
        (seed, part, arm) for seed in (3, 4) for part in parts for arm in ("plain", "mixup")
    ]
    assert all(cell.recipe.data.fold == cell.fold for cell in planned)
    assert planned[0].name == f"plain-2e-s3-f{parts[0][0]}of{parts[0][1]}"
    assert len({cell.name for cell in planned}) == len(planned)
    assert all(trial.recipe.data.fold == parts[0] for trial in plan.trials)
