"""Studies that are really run, on coloured pictures: they go on, share, fail in parts, and read the test split once."""

from __future__ import annotations

import csv
import fcntl
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from fgvc import api
from fgvc.cli.app import main
from fgvc.errors import FgvcError
from fgvc.io.bits import pack
from fgvc.runs import checkpoint
from fgvc.runs.loaded import load_run
from fgvc.studies import identity, result, run
from fgvc.studies.study import Plan, read_study
from fgvc.studies.table import lines

ARMS = {
    "plain": [{}, {"optim.lr": 0.05}],
    "acb": {"techniques.acb": {}},
    "diverges": {"optim.lr": 1e18},
}


def plan(folder: Path, recipe_tree: dict, arms: dict[str, Any], **keys: Any) -> Plan:
    (folder / "base.yaml").write_text(yaml.safe_dump(recipe_tree))
    quick = {"export.exporter": "torchscript", "train.epochs": 1}
    study = {"base": "base.yaml", "seeds": [0, 1], "arms": arms} | keys
    study["settings"] = quick | study.get("settings", {})
    (folder / "small.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return read_study(folder / "small.yaml")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fgvc.studies.cost.PAIRS", 1)


def read(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "runs.csv").read_text(encoding="utf-8").splitlines()))


def test_a_study_from_estimate_to_test(tmp_path: Path, recipe_tree: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe_tree["techniques"] = {}
    study, out = plan(tmp_path, recipe_tree, ARMS), tmp_path / "out"

    before = run.estimate(study, out)
    assert (before.done, len(before.cells)) == (0, 8)
    assert before.costs["plain"].ratio == 1
    assert before.hours > 0
    assert list((out / "runs").iterdir()) == []

    with pytest.raises(FgvcError, match=r"8 runs are missing, such as plain-1e-s0"):
        run.read_test(study, out)

    # A stranger's one row.
    assert run.ablate(study, out, arms=["acb"], seeds=[1]) == []
    assert [(row["arm"], row["seed"]) for row in read(out)] == [("acb", "1")]

    # Ctrl-C in the second run; what is there is kept.
    real, calls = result.train, []

    def stopped(*arguments: Any, **keys: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **keys)

    monkeypatch.setattr(result, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        run.ablate(study, out)
    assert len(read(out)) == 2

    # On with it: the arm that diverges is named, the others are made, and none that is there is trained again.
    calls.clear()
    monkeypatch.setattr(result, "train", lambda *arguments: calls.append(arguments[1].name) or real(*arguments))
    failures = run.ablate(study, out)
    assert [failure.run for failure in failures] == ["diverges-1e-s0", "diverges-1e-s1"]
    assert "NaN or infinite" in failures[0].reason
    assert sorted(calls) == sorted(
        ["plain.2-1e-s0", "acb-1e-s0", "diverges-1e-s0", "plain-1e-s1", "plain.2-1e-s1", "diverges-1e-s1"]
    )

    # Numbers are those of fgvc eval; one graph, which is the plain net's that fgvc export proves.
    rows = read(out)
    assert len(rows) == 6
    assert float(rows[0]["top1"]) == pytest.approx(api.evaluate(out / "runs/plain-1e-s0", "val").scores.top1, abs=1e-6)
    loaded = load_run(out / "runs/plain-1e-s0")
    answers = loaded.answers(loaded.rows_of("val")[1])
    assert rows[0]["right"] == pack(answers.logits.argmax(1) == answers.labels)
    exported = api.export(out / "runs/acb-1e-s0", tmp_path / "bundle")
    metrics = json.loads((tmp_path / "bundle/metrics.json").read_text())
    assert metrics["val"]["top1"] == pytest.approx(float(lines_of(rows, "acb", seed="0")[0]["top1"]), abs=1e-6)
    assert {row["graph"] for row in rows} == {row["plain"] for row in rows} == {exported.proven.structural.sha256}
    for name in ("table.md", "table.html"):
        text = (out / name).read_text(encoding="utf-8")
        assert "acb" in text
        assert exported.proven.structural.sha256[:12] in text

    # The test split: not before all is there; then by validation's choice, once.
    with pytest.raises(FgvcError, match="2 runs are missing"):
        run.read_test(study, out)
    smaller = plan(tmp_path, recipe_tree, {name: ARMS[name] for name in ("plain", "acb")})
    calls.clear()
    run.read_test(smaller, out)
    assert calls == []
    tested = [row for row in read(out) if row["split"] == "test"]
    validated = {row["trial"]: float(row["top1"]) for row in lines_of(rows, "plain")}
    best = max(validated, key=lambda trial: (validated[trial], -int(trial)))
    assert [(row["arm"], row["trial"]) for row in tested] == [("plain", best)] * 2 + [("acb", "1")] * 2

    monkeypatch.setattr(run, "measure", lambda *_, **__: pytest.fail("the test split was read twice"))
    run.read_test(smaller, out)
    record = out / "test.json"
    other = json.loads(record.read_text())
    other["runs"]["acb-1e-s0"]["recipe"] = "another"
    record.write_text(json.dumps(other))
    with pytest.raises(FgvcError, match="the test split was read on"):
        run.read_test(smaller, out)


def lines_of(rows: list[dict[str, str]], arm: str, seed: str = "") -> list[dict[str, Any]]:
    """Mean top-1 by trial, over all seeds or of one."""
    rows = [row for row in rows if row["arm"] == arm and seed in ("", row["seed"])]
    means = []
    for trial in sorted({row["trial"] for row in rows}):
        mine = [row for row in rows if row["trial"] == trial]
        means.append({"trial": trial, "top1": lines(mine, split="val", budget="epochs")[0].top1})
    return means


def test_the_command_says_what_it_will_take_and_where_the_table_is(
    tmp_path: Path, recipe_tree: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    study = plan(tmp_path, recipe_tree, {"plain": {}, "diverges": ARMS["diverges"]}, seeds=[0]).path
    command = ["ablate", str(study), "optim.warmup_epochs=0", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--estimate"])
    assert not ended.value.code
    assert "0 runs are done, 2 to do" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 1
    captured = capsys.readouterr()
    assert captured.out.strip() == str(tmp_path / "out/table.html")
    assert re.search(r"failed: diverges-1e-s0: .*NaN or infinite", captured.err)
    with pytest.raises(SystemExit) as ended:
        main([*command, "--test", "--seed", "0"])
    assert ended.value.code == 2
    assert "goes without --arm, --seed" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["ablate", "nothing"])
    assert ended.value.code == 2
    assert "cub50-screening" in capsys.readouterr().err


def test_other_settings_under_the_same_name_are_refused_and_lose_nothing(tmp_path: Path, recipe_tree: dict) -> None:
    out = tmp_path / "out"
    run.ablate(plan(tmp_path, recipe_tree, {"plain": {}}, seeds=[0]), out)
    before = (out / "runs/plain-1e-s0/metrics.csv").read_bytes()
    changed = plan(tmp_path, recipe_tree, {"plain": {"optim.lr": 0.5}}, seeds=[0])
    with pytest.raises(
        FgvcError, match=r"plain-1e-s0.val.json: this result is of other settings than the study has now"
    ):
        run.ablate(changed, out)
    (out / "results/plain-1e-s0.val.json").unlink()
    (failure,) = run.ablate(changed, out)
    assert "optim.lr: 0.02 in the run, 0.5 now" in failure.reason
    assert (out / "runs/plain-1e-s0/metrics.csv").read_bytes() == before


def test_what_changes_no_result_may_change_and_what_left_the_study_is_not_in_its_tables(
    tmp_path: Path, recipe_tree: dict
) -> None:
    out = tmp_path / "out"
    arms = {"plain": [{}, {"optim.lr": 0.05}]}
    run.ablate(plan(tmp_path, recipe_tree, arms, seeds=[0]), out)
    stamp = (out / "runs/plain-1e-s0/metrics.csv").stat().st_mtime_ns
    (out / "results/.1.plain-1e-s0.val.json").write_text("{")  # a kill left it
    (out / "results/plain-1e-s0.val.json").unlink()
    more = plan(tmp_path, recipe_tree, arms, seeds=[0], settings={"log.every_steps": 3, "train.workers": 1})
    run.ablate(more, out)
    assert (out / "runs/plain-1e-s0/metrics.csv").stat().st_mtime_ns == stamp
    assert len(read(out)) == 2
    run.ablate(plan(tmp_path, recipe_tree, {"plain": {}}, seeds=[0]), out)
    assert [row["trial"] for row in read(out)] == ["1"]
    again = plan(tmp_path, recipe_tree, {"plain": [{}, {"optim.lr": 0.05}, {"optim.lr": 0.5}]}, seeds=[0])
    assert [cell.name for cell in run.estimate(again, out).cells] == ["plain.3-1e-s0"], (
        "more trials train no old one anew"
    )


def test_a_trial_that_no_training_takes_is_named_and_the_others_go_on(tmp_path: Path, recipe_tree: dict) -> None:
    study = plan(tmp_path, recipe_tree, {"plain": {}, "box": {"techniques.multiscale_head": {"stages": [6, 7]}}}, seeds=[0])
    (failure,) = run.ablate(study, tmp_path / "out")
    assert failure.run == "box"
    assert "stage 6: this backbone has" in failure.reason
    assert [row["arm"] for row in read(tmp_path / "out")] == ["plain"]
    with pytest.raises(FgvcError, match="1 runs are missing, such as box"):
        run.read_test(study, tmp_path / "out")


def test_a_run_that_another_process_has_is_left_to_it(tmp_path: Path, recipe_tree: dict) -> None:
    study, out = plan(tmp_path, recipe_tree, {"plain": {}}, seeds=[0, 1]), tmp_path / "out"
    run.estimate(study, out)
    with (out / "locks/plain-1e-s0").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert run.ablate(study, out) == []
    assert [row["seed"] for row in read(out)] == ["1"]


def test_another_machines_runs_are_not_trained_again(
    tmp_path: Path, recipe_tree: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    run.ablate(plan(tmp_path, recipe_tree, {"plain": {}, "lr": {"optim.lr": 0.05}}, seeds=[0]), there)
    table = there / "runs.csv"
    study = plan(tmp_path, recipe_tree, {"plain": {}, "lr": {"optim.lr": 0.06}}, seeds=[0, 1])
    assert run.import_results(study, here, table) == 1  # the other line is of another rate
    todo = run.estimate(study, here)
    assert (todo.done, [cell.name for cell in todo.cells]) == (1, ["lr-1e-s0", "plain-1e-s1", "lr-1e-s1"])
    before = (there / "results/plain-1e-s0.val.json").read_text()
    assert json.loads((here / "results/plain-1e-s0.val.json").read_text()) == json.loads(before)
    assert run.import_results(study, here, table) == 1

    moved = tmp_path / "moved"
    shutil.copytree(recipe_tree["data"]["root"], moved)
    elsewhere = plan(tmp_path, recipe_tree, {"plain": {}}, seeds=[0], settings={"data.root": str(moved)})
    assert run.import_results(elsewhere, tmp_path / "elsewhere", table) == 1
    next((moved / "train").rglob("*.png")).unlink()
    identity._data.clear()
    assert run.import_results(elsewhere, tmp_path / "fewer", table) == 0

    for text in (
        "arm,part\nplain,val\n",
        "no table\n1\n",
        "arm,trial,part,epochs,seed,recipe,cost\nplain,1,val,one,0,0,1\n",
        "arm,trial,part,epochs,seed,recipe,cost\nplain,1,val,1,0,0,nan\n",
    ):
        table.write_text(text)
        with pytest.raises(FgvcError, match=r"runs.csv: no runs.csv of a study"):
            run.import_results(study, here, table)
    with pytest.raises(FgvcError, match=r"gone.csv: no runs.csv of a study"):
        run.import_results(study, here, tmp_path / "gone.csv")


def test_the_test_part_is_not_read_of_a_run_that_is_not_finished_here(tmp_path: Path, recipe_tree: dict) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    study = plan(tmp_path, recipe_tree, {"plain": {}}, seeds=[0])
    run.ablate(study, there)
    run.import_results(study, here, there / "runs.csv")
    with pytest.raises(FgvcError, match="no finished run is here, only its result; copy"):
        run.read_test(study, here)
    shutil.copytree(there / "runs/plain-1e-s0", here / "runs/plain-1e-s0", symlinks=True)
    state = checkpoint.load(here / "runs/plain-1e-s0/ckpt")
    state.progress.finished = False
    checkpoint.save(here / "runs/plain-1e-s0/ckpt", state)
    with pytest.raises(FgvcError, match="no finished run is here"):
        run.read_test(study, here)
    assert not (here / "test.json").exists()


def test_a_test_part_that_was_read_elsewhere_is_not_read_again(tmp_path: Path, recipe_tree: dict) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    run.ablate(plan(tmp_path, recipe_tree, {"plain": {}}, seeds=[0]), there)
    run.read_test(plan(tmp_path, recipe_tree, {"plain": {}}, seeds=[0]), there)
    study = plan(tmp_path, recipe_tree, {"plain": {}, "lr": {"optim.lr": 0.06}}, seeds=[0])
    assert run.import_results(study, here, there / "runs.csv") == 1
    run.ablate(study, here)
    assert [row["split"] for row in read(here)] == ["val", "val"]  # not before validation has chosen
    run.read_test(study, here)  # of plain's run there is no folder here
    (theirs,) = [row for row in read(there) if row["split"] == "test"]
    mine = {row["arm"]: row for row in read(here) if row["split"] == "test"}
    assert mine["plain"] == {key: theirs.get(key, "") for key in mine["plain"]}
    assert mine["lr"]["right"] != ""


def test_equal_seconds_are_the_other_machines(tmp_path: Path, recipe_tree: dict) -> None:
    study = plan(tmp_path, recipe_tree, {"plain": {}, "acb": {"techniques.acb": {}}}, seeds=[0], budget="seconds",
                 settings={"train.epochs": 2})  # fmt: skip
    there, here = tmp_path / "there", tmp_path / "here"
    run.estimate(study, there)
    costs = json.loads((there / "costs.json").read_text())
    costs["acb"]["ratio"] = 1.9
    (there / "costs.json").write_text(json.dumps(costs))
    run.ablate(study, there)
    assert [(row["arm"], row["epochs"]) for row in read(there)] == [("plain", "2"), ("acb", "1")]
    assert run.import_results(study, here, there / "runs.csv") == 2
    todo = run.estimate(study, here)
    assert (todo.done, todo.cells, todo.costs["acb"].ratio) == (2, [], pytest.approx(1.9))


def test_runs_of_another_study_are_known_by_their_settings_and_cost_over_this_base(
    tmp_path: Path, recipe_tree: dict
) -> None:
    acb = {"techniques.acb": {}}

    def study(arms: dict[str, Any], epochs: int) -> Plan:
        return plan(tmp_path, recipe_tree, arms, seeds=[0], budget="seconds", settings={"train.epochs": epochs})

    there, here = tmp_path / "there", tmp_path / "here"
    short = study({"plain": [{"optim.lr": 0.07}, {}], "acb": acb}, epochs=1)
    run.estimate(short, there)
    costs = json.loads((there / "costs.json").read_text())
    costs["plain.2"]["ratio"], costs["acb"]["ratio"] = 1.25, 1.75
    (there / "costs.json").write_text(json.dumps(costs))
    run.ablate(short, there)
    long = study({"tuned": {}, "branches": acb, "box": {"techniques.multiscale_head": {"stages": [6, 7]}}}, epochs=2)
    assert run.import_results(long, here, there / "runs.csv") == 2
    todo = run.estimate(long, here)
    assert todo.costs["branches"].ratio == pytest.approx(1.4)  # of two epochs of `tuned` it has one
    assert (todo.done, [cell.name for cell in todo.cells]) == (1, ["tuned-2e-s0"])
    run.ablate(long, here)
    (row,) = [row for row in read(here) if row["arm"] == "branches"]
    assert (row["trial"], row["settings"], row["cost"]) == ("1", "techniques.acb={}", "0.7")

    strange = study({"strange": {"optim.lr": 0.08}, "acb": acb}, epochs=2)
    assert run.import_results(strange, tmp_path / "strange", there / "runs.csv") == 1
    assert not (tmp_path / "strange/costs.json").exists()  # what acb costs over this base was not measured there


def test_a_step_that_the_machine_cant_take_leaves_the_others_alone(
    tmp_path: Path, recipe_tree: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    study, out = plan(tmp_path, recipe_tree, {"plain": {}, "acb": {"techniques.acb": {}}}, seeds=[0]), tmp_path / "out"
    run.estimate(study, out, arms=["plain"])
    monkeypatch.setattr("fgvc.studies.cost.interleaved", out_of_memory)
    (failure,) = run.ablate(study, out)
    assert (failure.run, failure.reason) == ("acb", "out of memory")
    assert [row["arm"] for row in read(out)] == ["plain"]
    with pytest.raises(FgvcError, match=r"small.yaml: arms.plain: out of memory"):
        run.ablate(study, tmp_path / "new")


def test_a_folder_of_something_else_is_not_written_to(tmp_path: Path, recipe_tree: dict) -> None:
    study, out = plan(tmp_path, recipe_tree, {"plain": {}}), tmp_path / "study"
    run.estimate(study, out)
    study.path.rename(tmp_path / "other.yaml")
    with pytest.raises(FgvcError, match=r"the folder of another study \(fgvc ablate small\)"):
        run.estimate(read_study(tmp_path / "other.yaml"), out)
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(FgvcError, match="not the folder of a study"):
        run.ablate(plan(tmp_path, recipe_tree, {"plain": {}}), out)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_a_study_needs_images_to_choose_by(tmp_path: Path, boxed_tree: dict) -> None:
    study = plan(tmp_path, boxed_tree, {"plain": {"techniques": {}}}, settings={"data.val_fraction": 0})
    with pytest.raises(FgvcError, match=r"no validation split.*data.val_fraction"):
        run.ablate(study, tmp_path / "out")


def test_arms_and_seeds_that_are_not_there_are_named(tmp_path: Path, recipe_tree: dict) -> None:
    study = plan(tmp_path, recipe_tree, {"plain": {}})
    with pytest.raises(FgvcError, match="--arm fancy: the study has plain"):
        run.estimate(study, tmp_path / "out", arms=["fancy"])
    with pytest.raises(FgvcError, match="--seed 9: the study has 0, 1"):
        run.estimate(study, tmp_path / "out", seeds=[9])


def test_where_there_are_boxes_it_says_where_a_run_looks(
    tmp_path: Path, boxed_tree: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, keys = tmp_path / "out", {"seeds": [0], "settings": {"image.size": 64}}
    assert run.ablate(plan(tmp_path, boxed_tree, {"plain": {}}, localise=False, **keys), out) == []
    assert "max_box_acc_v2" not in read(out)[0]
    study = plan(tmp_path, boxed_tree, {"plain": {}}, **keys)
    monkeypatch.setattr(result, "train", lambda *_: pytest.fail("trained again"))
    assert run.ablate(study, out) == []
    assert run.estimate(study, out).cells == []
    (row,) = read(out)
    true = api.localize(out / "runs/plain-1e-s0", "val").boxes["true"]
    for name in ("box_acc_v2", "max_box_acc_v2"):
        assert float(row[name]) == pytest.approx(getattr(true, name), abs=1e-6)


def test_a_finished_run_is_not_measured_as_one_of_other_images(tmp_path: Path, recipe_tree: dict) -> None:
    root = Path(shutil.copytree(recipe_tree["data"]["root"], tmp_path / "set"))
    tree, out = recipe_tree | {"data": {"kind": "folder", "root": str(root)}}, tmp_path / "out"
    assert run.ablate(plan(tmp_path, tree, {"plain": {}}, seeds=[0]), out) == []
    first = (out / "results/plain-1e-s0.val.json").read_text()
    moved, line = root.rename(tmp_path / "moved"), out / "results/plain-1e-s0.val.json"
    line.unlink()
    tree = tree | {"data": {"kind": "folder", "root": str(moved)}}
    assert run.ablate(plan(tmp_path, tree, {"plain": {}}, seeds=[0]), out) == []
    assert json.loads(line.read_text())["right"] == json.loads(first)["right"], "the same images, wherever they lie"
    line.unlink()
    shutil.copy(moved / "train/red/00.png", moved / "train/red/0new.png")
    identity._data.clear()  # another process
    (failure,) = run.ablate(plan(tmp_path, tree, {"plain": {}}, seeds=[0]), out)
    assert "was trained on other images" in failure.reason
    assert not line.exists()


def test_folds_ask_about_each_image_of_train_once_and_leave_test_alone(
    tmp_path: Path, recipe_tree: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms, out = {"plain": {}, "fast": {"optim.lr": 0.05}}, tmp_path / "out"
    real, calls = result.train, []

    def stopped(*arguments: Any) -> Any:
        calls.append(arguments[1].name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(result, "train", stopped)
    study = plan(tmp_path, recipe_tree, arms, seeds=[0], folds=3)
    with pytest.raises(KeyboardInterrupt):
        run.ablate(study, out)
    assert [(row["arm"], row["fold"]) for row in read(out)] == [("plain", "0"), ("plain", "1"), ("fast", "0")]
    assert run.ablate(study, out) == []
    assert len(calls) == 7, "three were done, one was stopped"

    rows = read(out)
    assert {row["split"] for row in rows} == {"val"}
    assert [(row["arm"], row["fold"], row["folds"]) for row in rows] == [
        (arm, fold, "3") for arm in arms for fold in ("0", "1", "2")
    ]
    paths: list[str] = []
    right = []
    for row in rows[:3]:
        loaded = load_run(out / "runs" / f"plain-1e-s0-f{row['fold']}of3")
        trained, judged = (set(loaded.index.paths[loaded.index.rows(split)].tolist()) for split in ("train", "val"))
        assert not trained & judged
        paths += sorted(judged)
        answers = loaded.answers(loaded.rows_of("val")[1])
        right += (answers.logits.argmax(1) == answers.labels).tolist()
    root = Path(recipe_tree["data"]["root"])
    whole = {file.relative_to(root).as_posix() for split in ("train", "val") for file in root.glob(f"{split}/*/*.png")}
    assert (len(paths), set(paths)) == (len(whole), whole)
    line = lines(rows, split="val", budget="epochs")[0]
    assert (line.images, line.folds) == (60, 3)
    assert line.top1 == pytest.approx(sum(right) / 60)
    for name in ("table.md", "table.html"):
        text = (out / name).read_text(encoding="utf-8")
        assert "Validation, 3 folds of train, pooled: equal epochs" in text
        assert "Test" not in text

    # A study of less folds has the same runs; one that divides otherwise has others.
    two = plan(tmp_path, recipe_tree, arms, seeds=[0], folds=[[1, 2], 3])
    assert run.import_results(two, tmp_path / "two", out / "runs.csv") == 4
    assert run.import_results(plan(tmp_path, recipe_tree, arms, seeds=[0], folds=4), tmp_path / "four", out / "runs.csv") == 0
    assert run.import_results(plan(tmp_path, recipe_tree, arms, seeds=[0]), tmp_path / "none", out / "runs.csv") == 0

    run.read_test(plan(tmp_path, recipe_tree, arms, seeds=[0], folds=3), out)
    tested = [row for row in read(out) if row["split"] == "test"]
    assert [(row["arm"], row["fold"], row["images"]) for row in tested] == [
        (arm, fold, "12") for arm in arms for fold in ("0", "1", "2")
    ]
    assert "Test, mean over the nets of 3 folds: equal epochs" in (out / "table.md").read_text(encoding="utf-8")
