"""From a deployed file and a folder of images to a better file, in one command that may be killed."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from fgvc import api
from fgvc.cli.app import main
from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.errors import FgvcError, NoUnseenImagesError, UndecidedError
from fgvc.evaluation.file_stack import FileStack, UndecidedStackError
from fgvc.evaluation.side import open_sides
from fgvc.exporting.deployed import compare_written
from fgvc.improvement.improve import _claimed, run_improvement
from fgvc.improvement.ladder import TAUGHT
from fgvc.improvement.request import Request
from fgvc.improvement.rungs import right_on_choose
from fgvc.improvement.side_by_side import Ended, Job, Workers
from fgvc.improvement.task import look
from fgvc.improvement.view import View
from fgvc.improvement.work import Timing
from fgvc.runs.images import read_index
from fgvc.runtime.bundle import read_preprocess
from fgvc.runtime.description import describe
from tests.improvement.conftest import NAMES, SPEC, planned, request_for
from tests.trained import copied

NETS = ("test_resnet", "test_efficientnet")


def test_a_better_file_is_the_deployed_one_with_other_numbers(better: Path, deployed: Path) -> None:
    verdict = json.loads((better / "verdict.json").read_text())
    assert verdict["better"]
    assert verdict["images"] == 120
    assert verdict["new"] > 0.9 > verdict["old"]
    assert compare_written(better / "bundle" / "model.onnx", deployed).passed
    assert not (better / "candidate").exists()
    assert api.verify(better / "bundle").passed
    page = (better / "report.html").read_text()
    assert "Better: deployed.onnx goes from" in page
    assert "better/bundle/model.onnx" in page
    command = next(line for line in page.splitlines() if line.startswith("fgvc compare"))
    assert api.compare(*command.split()[2:4]).paired.images == 120


def test_each_image_has_one_use(better: Path) -> None:
    """The verdict's figures, anew by onnxruntime and Pillow on the images that images.csv names."""
    rows = list(csv.DictReader((better / "images.csv").read_text().splitlines()))
    root = Path(json.loads((better / "task.json").read_text())["task"]["recipe"]["data"]["root"])
    session = onnxruntime.InferenceSession(better / "bundle" / "model.onnx")
    right = []
    for row in (row for row in rows if row["split"] == "test"):
        image = Image.open(root / row["path"]).resize((8, 8), Image.Resampling.BILINEAR)
        x = (np.asarray(image, np.float32) / 255 - 0.5) / 0.5
        answer = session.run(None, {session.get_inputs()[0].name: x.transpose(2, 0, 1)[None]})[0]
        right.append(NAMES[answer.argmax()] == row["label"])
    assert np.mean(right) == pytest.approx(json.loads((better / "verdict.json").read_text())["new"])
    final = api.load_recipe(better / "recipes" / "final.yaml")
    assert not final.data.hold_out
    rungs = {rung["name"]: rung for rung in json.loads((better / "plan.json").read_text())["rungs"]}
    assert final.train.epochs == rungs["final"]["epochs"]
    assert not len(right_on_choose(better / "runs" / "final"))
    assert len(right_on_choose(better / "runs" / "base")) == 120


def test_the_same_command_again_shows_the_same(
    better: Path, deployed: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = copied(better, tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in (mine / "runs").rglob("*.safetensors")}
    result = run_improvement(request_for(deployed, pictures), mine)
    assert result.exit_code == 0
    assert result.bundle == mine / "bundle"
    assert {path: path.stat().st_mtime_ns for path in (mine / "runs").rglob("*.safetensors")} == stamps
    with pytest.raises(FgvcError, match="begun with other words"):
        run_improvement(request_for(deployed, pictures, seed=1), mine)
    assert "Better" in repr(result)


def test_a_verdict_is_of_the_file_that_was_deployed_then(
    better: Path, deployed: Path, pictures: Path, tmp_path: Path
) -> None:
    """The better file is put in the deployed one's place, and the same command runs again next month."""
    mine, out = tmp_path / "mine", tmp_path / "better"
    shutil.copytree(deployed.parent, mine)
    request = request_for(mine / deployed.name, pictures)
    task = look(request, out, lambda line: None)
    shutil.copy(better / "bundle" / "model.onnx", mine / deployed.name)
    with pytest.raises(FgvcError, match="another file than the one that .* was begun with"):
        look(request, out, lambda line: None)
    (mine / deployed.name).unlink()
    assert look(request, out, lambda line: None) == task  # the folder has a copy of its own


def test_a_file_that_nothing_is_better_than(better: Path, pictures: Path, tmp_path: Path) -> None:
    """The better file itself, improved once more: all its answers are right, and exit code 3 says so."""
    (tmp_path / "file").mkdir()
    for name in ("model.onnx", "labels.json", "preprocess.json"):
        shutil.copy(better / "bundle" / name, tmp_path / "file" / name)
    request = request_for(tmp_path / "file" / "model.onnx", pictures)
    out = tmp_path / "better"
    plan = planned(request, out, TAUGHT, step=5)
    assert [rung.name for rung in plan.rungs] == ["probe-deployed", "base", "taught", "student", "final", "plain"]
    result = run_improvement(request, out)
    assert result.exit_code == 3
    assert result.bundle is None
    assert (out / "candidate" / "model.onnx").is_file()
    assert not (out / "bundle").exists()

    record = json.loads((out / "rungs.json").read_text())  # a student learned from the runs before it, each where it is best
    student = api.load_recipe(out / "recipes" / "student.yaml").techniques.distill
    places = [teacher.path.name for teacher in student.teachers]
    at_end = {name: record["outcomes"][name]["share"] == 1 for name in ("base", "taught")}
    assert [place.partition("-")[0] for place in places] == ["base", "taught"]
    assert [place in at_end for place in places] == list(at_end.values())
    done = {name for name, row in record["outcomes"].items() if row["status"] == "done"}
    assert done | {"plain"} == {rung.name for rung in plan.rungs}
    assert len(right_on_choose(out / "runs" / "student")) == 120


def test_a_disk_without_room_for_the_runs_is_said_before_any(
    deployed: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(place: object) -> tuple[int, int, int]:
        return shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)

    monkeypatch.setattr("fgvc.improvement.improve.shutil.disk_usage", full)
    with pytest.raises(FgvcError, match=r"0\.0 GB are free on its disk, and \d runs need about"):
        run_improvement(Request(target=str(deployed), data=pictures, budget=130), tmp_path / "better", dry_run=True)
    assert not (tmp_path / "better" / "plan.json").exists()


def test_a_budget_that_ends_while_steps_are_timed(
    deployed: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No fault of the recipe's: its process was stopped."""

    def run(pool: Workers, jobs: Sequence[Job], *, done: Callable[[Ended], None], **options: object) -> None:
        for job in jobs:
            done(Ended(job, -15, True, 600.0))

    monkeypatch.setattr(Workers, "run", run)
    with pytest.raises(FgvcError, match="--budget: 10 min are over before a single step is timed"):
        run_improvement(request_for(deployed, pictures), tmp_path / "better")
    assert "base is left out: its time was up" in (tmp_path / "better" / "improve.log").read_text()


def test_timing_ends_at_a_quarter_of_the_budget_but_for_the_base(
    deployed: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "better"

    def run(
        pool: Workers, jobs: Sequence[Job], *, done: Callable[[Ended], None], until: Callable[[], bool], **options: object
    ) -> None:
        assert not until()
        timing = Timing(start=5, step=0.01, batch=32, look=0.001, peak_bytes=10**8, device="cpu")
        jobs[0].log.parent.mkdir(parents=True)
        jobs[0].log.write_text(json.dumps(asdict(timing)))
        done(Ended(jobs[0], 0, False, 200.0))
        assert until()
        for job in jobs[1:]:
            done(Ended(job, -15, True, 200.0))

    monkeypatch.setattr(Workers, "run", run)
    out.mkdir()
    (out / "clock.json").write_text('{"seconds": 200}')
    result = run_improvement(request_for(deployed, pictures), out, dry_run=True)
    assert [rung.name for rung in result.plan.rungs] == ["probe-deployed", "base", "final"]


def test_a_preprocessing_that_the_answers_deny_is_no_start(
    better: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the trained file, which knows these pictures. Who insists is believed, and the doubt is kept."""
    wrong = {"input_range": 255, "mean": [128.0] * 3, "std": [40.0] * 3}
    shutil.copy(better / "bundle" / "model.onnx", tmp_path)
    (tmp_path / "labels.txt").write_text("\n".join(NAMES))
    (tmp_path / "preprocess.json").write_text(json.dumps(SPEC | wrong))
    request = request_for(tmp_path / "model.onnx", pictures)
    words = r"(?s)where they are prepared as stated.*input_range 1 for 255.*insist on that: --preprocess"
    with pytest.raises(FgvcError, match=words):
        look(request, tmp_path / "better", lambda line: None)
    found = json.loads((tmp_path / "better" / "preprocess.found.json").read_text())
    assert found["input_range"] == 1
    task = look(replace(request, preprocess=tmp_path / "preprocess.json"), tmp_path / "insisted", lambda line: None)
    assert "where they are prepared as stated" in task.notes[0]


def test_a_flat_folder_is_exit_code_4(deployed: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(NoUnseenImagesError) as error:
        look(request_for(deployed, pictures / "train"), tmp_path / "out", lambda line: None)
    assert error.value.exit_code == 4


def test_all_that_is_missing_is_said_at_once(deployed: Path, tmp_path: Path) -> None:
    request = request_for(deployed, tmp_path / "nowhere", starts=("resnet50=gone.safetensors",), labels=tmp_path / "no.txt")
    with pytest.raises(FgvcError) as error:
        look(request, tmp_path / "out", lambda line: None)
    assert "nowhere" in str(error.value)
    assert "no.txt" in str(error.value)
    assert "gone.safetensors" in str(error.value)


def test_a_folder_is_no_deployed_file(better: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(FgvcError, match="name the deployed file in it: .*bundle/model.onnx"):
        look(request_for(better / "bundle", pictures), tmp_path / "out", lambda line: None)


def test_a_file_in_the_place_of_the_folder(deployed: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "better").touch()
    with pytest.raises(FgvcError, match="can't write"):
        run_improvement(request_for(deployed, pictures), tmp_path / "better" / "one")


def test_a_file_that_ends_with_a_sigmoid_learns_each_class_by_itself(deployed: Path, pictures: Path, tmp_path: Path) -> None:
    model = onnx.load(deployed)
    logits = model.graph.output[0]
    model.graph.node.append(onnx.helper.make_node("Sigmoid", [logits.name], ["probabilities"]))
    logits.name = "probabilities"
    onnx.save(model, tmp_path / "sigmoid.onnx")
    for name in ("labels.txt", "preprocess.json"):
        shutil.copy(deployed.with_name(name), tmp_path)
    request = request_for(tmp_path / "sigmoid.onnx", pictures, preprocess=tmp_path / "preprocess.json")
    task = look(request, tmp_path / "better", lambda line: None)
    assert validate(Recipe, task.recipe, where="test").loss.kind == "bce"


def test_starts_are_told_by_their_files_from_wherever(
    deployed: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest net teaches, whatever was named first."""
    for name in ("test_resnet", "test_efficientnet"):
        save_file(timm.create_model(name).state_dict(), tmp_path / f"{name}.safetensors")
    sizes = {name: sum(p.numel() for p in timm.create_model(name, num_classes=2).parameters()) for name in NETS}
    monkeypatch.chdir(tmp_path)
    smaller, larger = sorted(NETS, key=lambda name: sizes[name])
    starts = tuple(f"{name}={name}.safetensors" for name in (smaller, larger))
    request = request_for(deployed, pictures, starts=starts)
    task = look(request, tmp_path / "better", lambda line: None)
    assert [net["backbone"] for net in task.teachers] == [larger, smaller]
    assert all(Path(net["weights"]).is_absolute() for net in task.teachers)
    monkeypatch.chdir(pictures)
    moved = tuple(f"{name}={tmp_path / f'{name}.safetensors'}" for name in (smaller, larger))
    assert look(replace(request, starts=moved), tmp_path / "better", lambda line: None) == task
    plan = planned(request_for(deployed, pictures, starts=moved), tmp_path / "other", TAUGHT)
    assert plan.left_out == {f"--start {smaller}": "the largest of the nets at hand teaches"}


def test_a_folder_is_no_file_with_the_preprocessing(deployed: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(FgvcError, match="name the file in it"):
        look(request_for(deployed, pictures, preprocess=deployed.parent), tmp_path / "out", lambda line: None)


def test_files_that_can_not_be_improved(deployed: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    shutil.copy(deployed, tmp_path / "file" / "net.onnx")
    shutil.copy(deployed.with_name("preprocess.json"), tmp_path / "file")
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join([*NAMES[:-1], "orange"]))
    with pytest.raises(FgvcError, match="yellow"):
        look(request_for(tmp_path / "file" / "net.onnx", pictures, labels=labels), tmp_path / "a", lambda line: None)
    labels.write_text("\n".join(NAMES[:-1]))
    with pytest.raises(FgvcError, match="5 outputs"):
        look(request_for(tmp_path / "file" / "net.onnx", pictures, labels=labels), tmp_path / "b", lambda line: None)
    (tmp_path / "file" / "bad.onnx").write_bytes(b"no file")
    with pytest.raises(FgvcError, match="not an ONNX file"):
        look(request_for(tmp_path / "file" / "bad.onnx", pictures, labels=labels), tmp_path / "c", lambda line: None)


def test_a_file_for_images_of_any_size(deployed: Path, pictures: Path, tmp_path: Path) -> None:
    model = onnx.load(deployed)
    for number, axis in ((2, "height"), (3, "width")):
        model.graph.input[0].type.tensor_type.shape.dim[number].dim_param = axis
    file, spec = tmp_path / "open.onnx", tmp_path / "fed.json"
    onnx.save(model, file)
    (tmp_path / "labels.txt").write_text("\n".join(NAMES))
    with pytest.raises(FgvcError, match="leaves height and width open.* --size HEIGHTxWIDTH"):
        look(request_for(file, pictures), tmp_path / "better", lambda line: None)
    spec.write_bytes(deployed.with_name("preprocess.json").read_bytes())
    task = look(request_for(file, pictures, preprocess=spec), tmp_path / "better", lambda line: None)
    assert task.size == (8, 8)
    with pytest.raises(FgvcError, match=r"fed.json: makes images of 8x8 pixels, and .*open.onnx is to take 16x8"):
        look(request_for(file, pictures, preprocess=spec, size=(16, 8)), tmp_path / "other", lambda line: None)
    spec.write_text(spec.read_text().replace("[8, 8]", "[16, 8]"))
    with pytest.raises(FgvcError, match="fed.json: makes images of 16x8 pixels, and .*deployed.onnx is to take 8x8"):
        look(request_for(deployed, pictures, preprocess=spec), tmp_path / "other", lambda line: None)


def test_a_file_with_several_outputs(deployed: Path, pictures: Path, tmp_path: Path) -> None:
    """The labels say how many classes there are; where two outputs have as many, the preprocessing says which it is."""
    model = onnx.load(deployed)
    logits, other = model.graph.output[0], onnx.ValueInfoProto()
    other.CopyFrom(logits)
    other.name = "probabilities"
    model.graph.node.append(onnx.helper.make_node("Softmax", [logits.name], ["probabilities"], axis=1))
    features = onnx.helper.make_tensor_value_info(model.graph.node[0].output[0], onnx.TensorProto.FLOAT, ["n", None, None, None])
    model.graph.output.append(features)
    file = tmp_path / "file" / "several.onnx"
    file.parent.mkdir()
    onnx.save(model, file)
    for name in ("labels.txt", "preprocess.json"):
        shutil.copy(deployed.with_name(name), file.parent)
    task = look(request_for(file, pictures), tmp_path / "a", lambda line: None)
    assert task.recipe["model"]["output"] == logits.name
    model.graph.output.append(other)
    onnx.save(model, file)
    with pytest.raises(FgvcError, match="network.output in preprocess.json"):
        look(request_for(file, pictures), tmp_path / "b", lambda line: None)
    spec = json.loads((file.parent / "preprocess.json").read_text())
    spec["network"] = describe(file, output="probabilities").record.model_dump(mode="json")
    (file.parent / "preprocess.json").write_text(json.dumps(spec))
    task = look(request_for(file, pictures), tmp_path / "c", lambda line: None)
    assert task.recipe["model"]["output"] == "probabilities"
    assert json.loads(Path(task.file or "").with_name("preprocess.json").read_text())["network"]["output"] == "probabilities"


def test_labels_that_are_not_beside_the_file(deployed: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    shutil.copy(deployed, tmp_path / "file" / "net.onnx")
    shutil.copy(deployed.with_name("preprocess.json"), tmp_path / "file")
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(NAMES))
    task = look(request_for(tmp_path / "file" / "net.onnx", pictures, labels=labels), tmp_path / "out", lambda line: None)
    assert task.classes == NAMES
    assert task.file is not None
    assert onnx.load(task.file).graph.node
    again = look(request_for(tmp_path / "file" / "net.onnx", pictures, labels=labels), tmp_path / "out", lambda line: None)
    assert (again.classes, again.recipe, again.counts) == (task.classes, task.recipe, task.counts)


def test_labels_in_another_order_than_the_answers(better: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    for name in ("model.onnx", "preprocess.json"):
        shutil.copy(better / "bundle" / name, tmp_path / "file" / name)
    swapped = [NAMES[1], NAMES[0], *NAMES[2:]]
    (tmp_path / "file" / "labels.json").write_text(json.dumps(swapped))
    with pytest.raises(FgvcError, match="another order than .*labels.json says"):
        look(request_for(tmp_path / "file" / "model.onnx", pictures), tmp_path / "out", lambda line: None)
    assert (tmp_path / "out" / "labels.found.txt").read_text().split() == list(NAMES)


def test_what_the_images_leave_open_is_there_to_be_mended(
    deployed: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = read_preprocess(deployed.with_name("preprocess.json"))

    def undecided(*args: object, **options: object) -> FileStack:
        raise UndecidedStackError("these images do not tell", spec)

    monkeypatch.setattr("fgvc.improvement.task.file_stack", undecided)
    found = tmp_path / "out" / "preprocess.found.json"
    with pytest.raises(UndecidedError, match=f"{found} has the likeliest.*--preprocess"):
        look(request_for(deployed, pictures), tmp_path / "out", lambda line: None)
    assert read_preprocess(found) == spec


def test_the_command_on_the_page_asks_for_the_same(deployed: Path, pictures: Path) -> None:
    words = request_for(deployed, pictures, min_gain=0.0, max_negative_flips="0.5%").command(Path("a b")).split("--")
    assert {"min-gain 0.0 ", "max-negative-flips 0.5%"} <= set(words)
    assert "-o 'a b' " in words[1]


def test_a_folder_that_a_kill_left_at_its_first_line_is_no_other(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    with _claimed(tmp_path) as clock:
        assert clock.seconds < 60
    assert (tmp_path / "clock.json").is_file()


def test_a_folder_of_other_files_is_refused(deployed: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as exit_info:
        main(["improve", str(deployed), str(pictures), "--budget", "10m", "-o", str(tmp_path)])
    assert exit_info.value.code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_interrupted_in_a_rung_it_goes_on_and_ends_with_the_same(
    better: Path, deployed: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, request, tick = tmp_path / "better", request_for(deployed, pictures), View.tick
    planned(request, out)

    def interrupted(view: View, running: Sequence[Job]) -> None:
        tick(view, running)
        if (out / "runs" / "base" / "ckpt" / "last").exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(View, "tick", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_improvement(request, out)
    assert "final" not in json.loads((out / "rungs.json").read_text())["outcomes"]
    assert run_improvement(request, out).exit_code == 0
    rungs, verdicts = (
        [json.loads((folder / name).read_text()) for folder in (better, out)] for name in ("rungs.json", "verdict.json")
    )
    assert rungs[0]["choices"] == rungs[1]["choices"]
    assert verdicts[0] == verdicts[1]
    weights = [(folder / "bundle" / "model.onnx").read_bytes() for folder in (better, out)]
    assert weights[0] == weights[1]


def test_a_net_without_a_file_is_chosen_by_all_images_where_they_are_few(few: Path, tmp_path: Path) -> None:
    """Cross-validation: each image is scored once, by a run that has not learned from it; what ships has learned from all."""
    save_file(timm.create_model("test_resnet", num_classes=7).state_dict(), tmp_path / "w.safetensors")
    start = f"test_resnet={tmp_path / 'w.safetensors'}"
    request = Request(target="test_resnet", data=few, budget=600, starts=(start,), size=(32, 32))
    out = tmp_path / "better"
    plan = planned(request, out, step=60)  # so that an epoch or two are planned
    assert [(rung.name, rung.runs) for rung in plan.rungs] == [("base", 3), ("final", 1)]
    result = run_improvement(request, out)
    assert result.verdict is not None
    assert result.verdict.images == 100
    base = json.loads((out / "rungs.json").read_text())["outcomes"]["base"]
    assert (base["status"], base["of"]) == ("done", 60)
    scored = []
    for fold in range(3):
        index = read_index(api.load_recipe(out / "recipes" / f"base-fold{fold}.yaml"))
        assert len(index.rows("val")) == 20
        assert len(index.rows("train")) == 40
        scored += index.paths[index.rows("val")].tolist()
    assert len(set(scored)) == 60
    assert len(read_index(api.load_recipe(out / "recipes" / "final.yaml")).rows("train")) == 60


def test_a_lone_file_is_compared_with_what_was_written_into_it(better: Path, deployed: Path, tmp_path: Path) -> None:
    """The bundle knows the labels and the preprocessing of the file that it was written into; of another file it does not."""
    shutil.copy(deployed, tmp_path / "lone.onnx")
    first, second = open_sides(tmp_path / "lone.onnx", better / "bundle", certain=True)
    assert first.classes == second.classes == NAMES
    assert first.preprocess is not None
    first, _ = open_sides(tmp_path / "lone.onnx", better / "runs" / "base", certain=True)
    assert first.classes == NAMES
    (tmp_path / "other.onnx").write_bytes((better / "bundle" / "model.onnx").read_bytes())
    with pytest.raises(FgvcError, match="--labels"):
        open_sides(tmp_path / "other.onnx", better / "bundle")
