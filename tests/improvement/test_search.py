"""The search around the winner: its settings are recipes, its first trial is the winner, and the best is what was measured."""

from __future__ import annotations

import json
import time
from pathlib import Path

import optuna
import pytest

from fgvc.config.loading import merge, validate
from fgvc.config.recipe import Recipe
from fgvc.errors import FgvcError
from fgvc.improvement.rungs import right_on_choose
from fgvc.improvement.search import Space, best_trial, join, open_study, scores, search, suggested, winner
from fgvc.improvement.side_by_side import workers


@pytest.fixture
def tree(better: Path) -> dict[str, object]:
    """The recipe of the small improvement."""
    return dict(json.loads((better / "task.json").read_text())["task"]["recipe"])


def test_settings_of_trials_are_recipes(tree: dict[str, object], tmp_path: Path) -> None:
    merge(tree, {"techniques": {"distill": {"kd": 4.0}, "centre_loss": {}, "multiscale_head": {"fused": [[0, 1.0], [1, 0.5]]}}})
    recipe, study = validate(Recipe, tree, where="here"), open_study(tmp_path, 0)
    study.enqueue_trial(winner(recipe))
    recipes = []
    for _ in range(8):
        changed = json.loads(json.dumps(tree))
        merge(changed, suggested(study.ask(), recipe))
        recipes.append(validate(Recipe, changed, where="here"))
    assert recipes[0].optim == recipe.optim
    assert recipes[0].augment.crop_scale == recipe.augment.crop_scale
    assert len({one.optim.lr for one in recipes}) == 8
    for weights in ([one.techniques.distill.kd for one in recipes], [one.techniques.centre_loss.centre for one in recipes]):
        assert len(set(weights)) == 8
        assert all(weights[0] / 4 <= weight <= weights[0] * 4 for weight in weights)
    assert recipes[0].techniques == recipe.techniques
    assert len({str(one.techniques.multiscale_head.fused) for one in recipes}) == 1, "a schedule stays"
    assert all(recipe.optim.lr / 4 <= one.optim.lr <= recipe.optim.lr * 4 for one in recipes)


def test_a_search_runs_trials_and_another_goes_on_with_it(tree: dict[str, object], tmp_path: Path) -> None:
    for folder in ("recipes", "runs", "logs"):
        (tmp_path / folder).mkdir()
    lines: list[str] = []
    with workers() as pool:
        space = Space(recipe=tree, epochs=2, seconds=0.1, deadline=time.time() + 600)

        def look(running: object) -> None:
            if (tmp_path / "runs" / "trial-1" / "ckpt" / "last").exists():
                object.__setattr__(space, "seconds", 1e9)  # enough

        search(tmp_path, space, slots=2, seed=0, pool=pool, tick=look, say=lines.append)
    study = open_study(tmp_path, 0)
    values = {trial.number: trial.value for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE}
    assert set(values) == {0, 1}
    for number, value in values.items():
        run = tmp_path / "runs" / f"trial-{number}"
        assert value == pytest.approx(right_on_choose(run).mean())
        assert [epoch for epoch, _ in scores(run)] == [1, 2]
    best = best_trial(tmp_path, 0)
    assert best is not None
    assert values[int(best[0].removeprefix("trial-"))] == max(v for v in values.values() if v is not None)
    assert any(line.startswith("trial-0: ") for line in lines)


def test_a_trial_that_was_stopped_is_not_the_best(tmp_path: Path) -> None:
    study = open_study(tmp_path, 0)
    for value, state in ((0.9, optuna.trial.TrialState.PRUNED), (0.5, None)):
        trial = study.ask()
        trial.set_user_attr("settings", {})
        trial.report(value, 1)
        study.tell(trial, value if state is None else None, state=state)
    assert best_trial(tmp_path, 0) == ("trial-1", {})


def test_nobody_waits_for_the_search_of_a_process_that_was_killed(tmp_path: Path) -> None:
    with workers() as pool, pytest.raises(FgvcError, match="the same command goes on"):
        join(tmp_path, slots=1, seed=0, pool=pool, say=lambda line: None)
