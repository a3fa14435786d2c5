"""What the benches count and write; how fast anything is, is no matter for a test."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.config.techniques import settings_by_kind
from fgvc.runs.distributed import process_group
from fgvc.studies import speed as bench
from fgvc.training.session import open_session
from tests.trained import Once


def recipe(tree: dict, **sections: object) -> Recipe:
    return validate(Recipe, tree | sections, where="test")


def test_the_interval_of_a_median_holds_at_least_95_percent() -> None:
    for count in (6, 14, 30, 40):
        low, high = bench._median_interval(count)
        inside = sum(bench._binomial(count, k) for k in range(low + 1, high + 1))
        narrower = sum(bench._binomial(count, k) for k in range(low + 2, high))
        assert inside >= 0.95 > narrower
        assert low + high == count - 1


def test_pairs_are_timed_in_turn_and_the_order_is_turned_round() -> None:
    calls: list[str] = []
    ratio = bench.interleaved("x", lambda: calls.append("a"), lambda: calls.append("b"), pairs=4, warm_up=1)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab" + "ba"
    assert ratio.low <= ratio.median <= ratio.high


def test_what_happens_in_some_steps_happens_in_some_that_are_timed(recipe_tree: dict) -> None:
    half = {"mixup": {"probability": 0.5}}
    half_mixed = recipe(recipe_tree, techniques=half, train=recipe_tree["train"] | {"epochs": 40})
    mixed = []
    with process_group(half_mixed.train) as process, open_session(half_mixed, process) as session:
        step = bench.step_on_one_batch(session)
        real = session.step.forward

        def recording(*arguments: Any) -> Any:
            losses, views = real(*arguments)
            mixed.append(len(views[0].target) == 2)
            return losses, views

        session.step.forward = recording
        for _ in range(20):
            step()
    assert set(mixed) == {True, False}


def test_each_technique_is_set_beside_the_passes_it_should_cost(tmp_path: Path, boxed_tree: dict) -> None:
    train = boxed_tree["train"] | {"grad_accum_steps": 2}
    sections = {"train": train, "image": {"size": 64}, "ema": {"decay": 0.9}}
    chosen = {"dcl": {"grid": 4, "bn": "own"}, "cam_erasing": {"source": "ema"}}
    ratios = bench.bench_each(recipe(boxed_tree, **sections, techniques=chosen), pairs=1, warm_up=0)
    expected = {ratio.name.split()[1]: ratio.expected for ratio in ratios}
    more = {"dcl": 2, "cam_erasing": 4 / 3, "snapmix": 4 / 3, "distill": 4 / 3, "attention_crop_drop": 3}
    assert expected == {kind: pytest.approx(more.get(kind, 1)) for kind in ("plain", *settings_by_kind())}
    bench.write_csv(tmp_path / "each.csv", ratios)
    with (tmp_path / "each.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["expected"]) for row in rows] == pytest.approx(list(expected.values()), abs=1e-4)
    assert {"cpu", "cores", "torch", "timm"} <= set(rows[0])


def test_a_teacher_is_timed_by_itself_and_expected_on_top(
    recipe_tree: dict, once: Once, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = {"distill": settings_by_kind()["distill"]}
    monkeypatch.setattr(bench, "settings_by_kind", lambda: only)
    run = once.run(recipe(recipe_tree))
    teachers = {"distill": {"teachers": [{"kind": "run", "path": str(run)}]}}
    ratios = bench.bench_each(recipe(recipe_tree, techniques=teachers), pairs=1, warm_up=0)
    rows = {ratio.name.partition(" ")[2]: ratio for ratio in ratios}
    (answer,) = (ratio for ratio in ratios if ratio.name.startswith("teacher: "))
    assert str(run) in answer.name
    (step,) = (ratio for name, ratio in rows.items() if name.startswith("distill"))
    assert step.expected == pytest.approx(1 + answer.median)


def test_maps_that_the_net_has_are_set_beside_a_step(tmp_path: Path, recipe_tree: dict) -> None:
    ratios = bench.bench_maps(recipe(recipe_tree), pairs=2)
    assert [ratio.name.split(" /")[0] for ratio in ratios] == ["map: cam", "map: gradcam", "map: gradcam++"]
    bench.write_csv(tmp_path / "maps.csv", [replace(ratios[0], expected=1.0), *ratios[1:]])
    with (tmp_path / "maps.csv").open() as file:
        assert [row["expected"] for row in csv.DictReader(file)] == ["1.0000", "", ""]
    none = bench.bench_maps(recipe(recipe_tree, model={"backbone": "test_vit", "kwargs": {"img_size": 32}}), pairs=2)
    assert none == []


def test_step_loader_and_export_are_timed_against_their_bare_forms(tmp_path: Path, recipe_tree: dict) -> None:
    torchscript = recipe(recipe_tree, export={"exporter": "torchscript"})
    names = [
        bench.bench_train(torchscript, pairs=6).name,
        bench.bench_load(torchscript, workers=0, pairs=2).name,
        bench.bench_export(torchscript, pairs=1).name,
    ]
    assert [name.split(" (")[0] for name in names] == [
        "step: fgvc / bare",
        "loaded steps / steps alone, 0 workers, cache none",
        "export: with all proofs / bare",
    ]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"grad_accum_steps": 2}}, "no accumulation"),
        ({"optim": {"sam": {}}}, "neither SAM"),
        ({"loss": {"kind": "bce"}}, "other losses"),
    ],
)
def test_the_bare_step_is_no_more_than_that(recipe_tree: dict, sections: dict, message: str) -> None:
    tree = recipe_tree | {key: recipe_tree.get(key, {}) | value for key, value in sections.items()}
    with pytest.raises(bench.FgvcError, match=message):
        bench.bench_train(recipe(tree), pairs=1)
