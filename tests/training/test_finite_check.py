"""No step goes on and no checkpoint is written with values that are not finite, wherever they come from."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
import yaml

from fgvc import api
from fgvc.cli.app import main
from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.errors import FgvcError
from fgvc.models.finite import not_finite, suspicious
from fgvc.runs import checkpoint
from fgvc.runs.step import StepModule
from fgvc.techniques.centre_loss.technique import CentreLoss
from fgvc.training import optimizer_step as training_step
from fgvc.training import trainer as loop
from fgvc.training.finite_check import state_tensors
from fgvc.training.session import Session
from tests.processes import script

NAN, INF = float("nan"), float("inf")


def recipe(tree: dict, **sections: object) -> Recipe:
    merged = tree | {k: (tree.get(k, {}) | v if isinstance(v, dict) else v) for k, v in sections.items()}
    return validate(Recipe, merged, where="test")


def finite(run: Path) -> bool:
    """Whether there are checkpoints, and every one holds numbers alone."""
    states = [state for _, state in checkpoint.intact_checkpoints(run / "ckpt")]
    return bool(states) and not any(not_finite(state_tensors(state)) for state in states)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("size", [(), (3,), (2, 70_000)])
def test_one_value_that_is_not_finite_is_named(value: float, size: tuple[int, ...]) -> None:
    tensors = {"whole": torch.ones(4, 5), "count": torch.tensor(7), "none": torch.zeros(0), "one": torch.ones(size)}
    assert not suspicious(tensors.values())
    assert not_finite(tensors) == []
    tensors["one"].view(-1)[-1] = value
    assert suspicious(tensors.values())
    assert not_finite(tensors) == ["one"]
    assert not suspicious([])


def test_large_finite_numbers_pass() -> None:
    large = {"large": torch.full((3,), -3e38)}
    assert suspicious(large.values())  # their norm overflows: a doubt, which is looked into
    assert not_finite(large) == []


def broken_gradient(session: Session) -> None:
    session.step.net.fc.weight.grad[0, 0] = NAN


def broken_weight(session: Session) -> None:
    session.step.net.fc.weight.data[0, 0] = -INF


def broken_statistic(session: Session) -> None:
    session.step.net.bn1.running_var[0] = INF


def broken_average(session: Session) -> None:
    assert session.ema is not None
    session.ema.module.bn1.running_var[0] = INF


def broken_centre(session: Session) -> None:
    session.step.branches["centre_loss"]["centres"].values[0, 0] = NAN


def broken_momentum(session: Session) -> None:
    next(iter(session.optimizer.state.values()))["momentum_buffer"].fill_(INF)


def break_step_8(monkeypatch: pytest.MonkeyPatch, breaks: Callable[[Session], None]) -> None:
    """Let `breaks` change the session at the end of the eighth step."""
    real = loop.optimizer_step

    def broken(session: Session, *rest: object) -> object:
        result = real(session, *rest)
        if session.progress.step == 7:
            breaks(session)
        return result

    monkeypatch.setattr(loop, "optimizer_step", broken)


@pytest.mark.parametrize(
    ("breaks", "named"),
    [
        (broken_gradient, r"step 8: NaN or infinite, and not saved: the gradient of net\.fc\.weight\."),
        (broken_weight, r"step 8: NaN or infinite, and not saved: net\.fc\.weight\."),
        (broken_statistic, r"step 8: NaN or infinite, and not saved: net\.bn1\.running_var\."),
        (broken_average, r"step 8: NaN or infinite, and not saved: average\.bn1\.running_var\."),
        (broken_centre, r"step 8: NaN or infinite, and not saved: branches\.centre_loss\.centres\.values\."),
        (broken_momentum, r"step 8: NaN or infinite, and not saved: optimizer\.state\.\d+\.momentum_buffer"),
    ],
)
def test_what_breaks_in_a_step_ends_the_run_before_a_checkpoint(
    tmp_path: Path, recipe_tree: dict, monkeypatch: pytest.MonkeyPatch, breaks: Callable[[Session], None], named: str
) -> None:
    break_step_8(monkeypatch, breaks)
    config = recipe(recipe_tree, ema={"decay": 0.5}, techniques={"centre_loss": {}}, checkpoint={"every_steps": 4})
    with pytest.raises(FgvcError, match=named) as error:
        loop.train(config, tmp_path / "run")
    text = str(error.value)
    assert "intact" not in text
    assert ". The newest checkpoint that is finite is" in text
    assert "step-00000006, of step 6; a new run may begin from its weights, model.weights=" in text
    assert "begin anew, in another --out or with --overwrite, with optim.lr=0.002 (it is 0.02)" in text
    assert finite(tmp_path / "run")
    assert checkpoint.load(tmp_path / "run" / "ckpt").progress.step == 6


def test_a_term_that_alone_is_not_finite_is_blamed_and_no_rate(
    tmp_path: Path, recipe_tree: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CentreLoss, "losses", lambda technique, outputs, ctx: {"centre": NAN * outputs["main"].logits.sum()})
    with pytest.raises(FgvcError, match=r"centre_loss\.centre alone is not finite: the classification loss is") as error:
        loop.train(recipe(recipe_tree, techniques={"centre_loss": {}}), tmp_path / "run")
    assert "Mend the technique, or set the weight of that term to 0" in str(error.value)
    assert "optim.lr=" not in str(error.value)


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        (3, r"overflowed fp16 in all 3 steps, so each was skipped and nothing was learnt"),
        (60, r"step 30: the gradients overflow fp16 even at a loss scale of 6\.10352e-05"),
    ],
)
def test_a_run_whose_every_step_fp16_skips_is_no_success(
    tmp_path: Path, recipe_tree: dict, monkeypatch: pytest.MonkeyPatch, steps: int, reason: str
) -> None:
    real = training_step.forward_backward

    def overflowing(session: Session, *arguments: object, **named: object) -> object:
        result = real(session, *arguments, **named)
        session.step.net.fc.weight.grad[0, 0] = INF
        return result

    monkeypatch.setattr(training_step, "forward_backward", overflowing)
    with pytest.raises(FgvcError, match=f"{reason}.*train.precision=bf16"):
        loop.train(recipe(recipe_tree, train={"precision": "fp16", "epochs": 99, "max_steps": steps}), tmp_path / "run")


def test_a_run_that_broke_goes_on_from_its_newest_checkpoint_with_the_same_bits(
    tmp_path: Path, recipe_tree: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_step_8(monkeypatch, broken_statistic)
    with pytest.raises(FgvcError, match="running_var"):
        loop.train(recipe(recipe_tree), tmp_path / "run")
    monkeypatch.undo()
    whole, again = (loop.train(recipe(recipe_tree), tmp_path / name) for name in ("whole", "run"))
    states = [checkpoint.load(run / "ckpt").net for run in (whole, again)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("data", [{}, {"val_fraction": 0.0}])
def test_a_rate_beyond_all_bounds_is_no_success(
    tmp_path: Path, recipe_tree: dict, colours: Path, capsys: pytest.CaptureFixture[str], data: dict
) -> None:
    """Weights of 1e28 are finite, and so is the loss of the only step: what the net then says is not."""
    root = tmp_path / "set"
    root.mkdir()
    (root / "train").symlink_to(colours / "train")  # without a validation split of its own
    tree = recipe_tree | {"data": {"kind": "folder", "root": str(root), **data}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(SystemExit) as ended:
        main(
            ["train", str(tmp_path / "own.yaml"), "optim.lr=1e30", "train.max_steps=1", "--out", str(tmp_path / "run")]
        )
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "logits that are no numbers" in message or "NaN or infinite" in message
    assert "with optim.lr=0.03 (it is 1e+30)" in message
    assert checkpoint.load(tmp_path / "run" / "ckpt").progress.step == 0


@pytest.mark.parametrize("by", ["top1", "ece"])
def test_validation_logits_that_are_no_numbers_are_no_score(
    tmp_path: Path, recipe_tree: dict, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    real = loop.score

    def broken(session: Session, out: Path) -> object:
        if session.progress.step <= 6:
            return real(session, out)
        with session.step.net.fc.register_forward_hook(lambda *call: call[-1].index_fill(0, torch.tensor([0]), NAN)):
            return real(session, out)

    monkeypatch.setattr(loop, "score", broken)
    with pytest.raises(
        FgvcError, match=r"step 12: of validation images, .* no numbers \(NaN or infinite\) for 1 of 12"
    ):
        loop.train(recipe(recipe_tree, select_by=by), tmp_path / "run")
    assert checkpoint.load(tmp_path / "run" / "ckpt").progress.step == 6
    assert checkpoint.load(tmp_path / "run" / "ckpt", "best").progress.step in (0, 6)  # the start is as good here
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 1 + 1


@pytest.mark.parametrize("how", ["precise_bn", "swa"])
def test_statistics_taken_anew_are_looked_at(
    tmp_path: Path, recipe_tree: dict, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    real = Session._reestimate

    def broken(session: Session, net: torch.nn.Module, images: int) -> None:
        real(session, net, images)
        net.bn1.running_var[0] = INF

    monkeypatch.setattr(Session, "_reestimate", broken)
    sections: dict = {"train": {"precise_bn": 8}} if how == "precise_bn" else {"swa": {"start": 0.5}}
    of = "net" if how == "precise_bn" else "average"
    with pytest.raises(FgvcError, match=rf"the end of epoch 2, step 12: .* {of}\.bn1\.running_var"):
        loop.train(recipe(recipe_tree, **sections), tmp_path / "run")
    assert finite(tmp_path / "run")
    assert checkpoint.load(tmp_path / "run" / "ckpt").progress.step == 6


def test_logits_of_an_eval_pass_are_checked(tmp_path: Path, recipe_tree: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    real = StepModule._eval_pass

    def broken(step: StepModule, *rest: object) -> object:
        with step.net.fc.register_forward_hook(lambda *call: call[-1] * INF):
            return real(step, *rest)

    monkeypatch.setattr(StepModule, "_eval_pass", broken)
    with pytest.raises(FgvcError, match=r"step \d+: NaN or infinite, and not saved: logits of eval pass"):
        loop.train(recipe(recipe_tree, image={"size": 64}, techniques={"snapmix": {}}), tmp_path / "run")


def test_a_step_that_the_scaler_skips_is_no_fault(
    tmp_path: Path, recipe_tree: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls, moved = training_step.forward_backward, [0], []

    def overflows(session: Session, *rest: object, **options: object) -> object:
        passed = real(session, *rest, **options)
        calls[0] += 1
        moved.append(session.step.net.fc.weight.detach().clone())
        if calls[0] == 2:
            session.step.net.fc.weight.grad.fill_(INF)
        return passed

    monkeypatch.setattr(training_step, "forward_backward", overflows)
    run = loop.train(recipe(recipe_tree, train={"precision": "fp16", "max_steps": 4}), tmp_path / "run")
    assert torch.equal(moved[1], moved[2]), "the second step was skipped"
    assert not torch.equal(moved[2], moved[3])
    assert finite(run)


def test_a_measure_that_is_no_number_stops_nothing_and_is_left_out_with_one_warning(
    tmp_path: Path, recipe_tree: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = StepModule._losses
    monkeypatch.setattr(
        StepModule, "_losses", lambda step, *rest: real(step, *rest) | {"dcl.location_chance": torch.tensor(NAN)}
    )
    run = loop.train(recipe(recipe_tree), tmp_path / "run")
    assert "nan" not in (run / "metrics.csv").read_text().lower()
    assert "NaN" not in (run / "ckpt/last/meta.json").read_text()
    messages = capsys.readouterr().err
    assert "WARNING: dcl.location_chance: finite in no step of epoch 1: metrics.csv has no value of it" in messages
    assert messages.count("finite in no step") == 1


@pytest.fixture(scope="module")
def sick(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """A run whose last checkpoint holds a running variance that is infinite, as earlier versions saved it."""
    tree = {
        "data": {"kind": "folder", "root": str(colours)}, "image": {"size": 32}, "model": {"backbone": "test_resnet"},
        "train": {"epochs": 2, "batch_size": 8, "workers": 0, "device": "cpu", "max_steps": 2},
        "select": "last",
    }  # fmt: skip
    run = loop.train(recipe(tree), tmp_path_factory.mktemp("sick") / "run")
    state = checkpoint.load(run / "ckpt")
    state.net["bn1.running_var"][0] = INF
    checkpoint.save(run / "ckpt", state, best=True)
    return tree, run


@pytest.mark.parametrize(
    "verb",
    [
        lambda run, out: api.evaluate(run),
        lambda run, out: api.export(run, out),
        lambda run, out: api.explain(run, [run], out),
        lambda run, out: api.localize(run),
        lambda run, out: api.report([run], out),
        lambda run, out: api.compare(run, run),
    ],
)
def test_weights_that_are_not_finite_answer_nothing(
    sick: tuple[dict, Path], tmp_path: Path, verb: Callable[[Path, Path], object]
) -> None:
    """An infinite variance gives finite logits: a score, and a very sure one."""
    with pytest.raises(
        FgvcError, match=r"run: its weights \(last\) hold values that are NaN or infinite.*bn1\.running_var"
    ):
        verb(sick[1], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (sick[1] / "metrics.json").exists()


def test_broken_weights_are_refused_by_resume_and_as_teachers(sick: tuple[dict, Path], tmp_path: Path) -> None:
    tree, run = sick
    longer = recipe(tree, train={"max_steps": 4})
    with pytest.raises(
        FgvcError, match=r"its checkpoint of step 2 holds values that are NaN or infinite: net\.bn1\.running_var"
    ):
        loop.train(longer, run)
    taught = recipe(tree, techniques={"distill": {"teachers": [{"kind": "run", "path": str(run)}]}})
    with pytest.raises(FgvcError, match=r"its weights \(last\) hold values that are NaN"):
        loop.train(taught, tmp_path / "taught")
    weights = tmp_path / "first.pth"
    torch.save(dict(checkpoint.load(run / "ckpt").net), weights)
    with pytest.raises(FgvcError, match=r"model\.weights: .*first\.pth holds values that are NaN or infinite: bn1"):
        loop.train(recipe(tree, model={"weights": str(weights)}), tmp_path / "from")


SCRIPT = """
import torch
from pathlib import Path
from types import SimpleNamespace

from fgvc.evaluation.metrics import evaluate
from fgvc.training.optim import Optim
from fgvc.runs.distributed import ProcessGroup
from fgvc.training.finite_check import refuse_not_finite
from fgvc.errors import FgvcError


def known(rank, world):
    process, said = ProcessGroup(torch.device("cpu"), rank, world, "fp32"), []
    recipe = SimpleNamespace(optim=Optim(), train=SimpleNamespace(precision="fp32"))
    for name, value in (("well", 1.0), ("sick", float("nan") if rank else 1.0)):
        try:
            refuse_not_finite({name: torch.tensor(value)}, when="now", out=Path("x"), recipe=recipe, process=process)
            said.append("")
        except FgvcError as error:
            said.append(str(error))
    z = torch.full((4, 3), float("inf") if rank else 1.0)
    try:
        evaluate(lambda x: x, [(z, torch.zeros(4).long())], classes=3, device=torch.device("cpu"))
    except FgvcError as error:
        said.append(str(error))
    return said
"""


def test_all_ranks_end_together(tmp_path: Path, two_ranks: Callable[[str, Path], AbstractContextManager[Path]]) -> None:
    with two_ranks(SCRIPT, tmp_path):
        pass
    both = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert both[0] == both[1]
    well, sick, score = both[0]
    assert well == ""
    assert "now: NaN or infinite, and not saved: sick." in sick
    assert "for 4 of 8 images" in score


RECIPE = """
data: {{kind: folder, root: {root}}}
image: {{size: 32}}
model: {{backbone: test_resnet}}
train: {{epochs: 500, batch_size: 8, workers: 0, device: cpu}}
checkpoint: {{every_steps: 2}}
"""


# As torchrun starts it, but that the two meet in a file: the session of pytest has no sockets.
RANK = """
import os
from functools import partial
from torch import distributed
from fgvc.cli.app import main
meet = {"init_method": f"file://{os.getcwd()}/meet", "rank": int(os.environ["RANK"]), "world_size": 2}
distributed.init_process_group = partial(distributed.init_process_group, **meet)
main(["train", "recipe.yaml", "--out", "run"])
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_what_ends_one_rank_ends_all_and_the_run_goes_on(tmp_path: Path, colours: Path, sent: int) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(root=colours))
    (tmp_path / "rank.py").write_text(RANK)
    env = {"WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        script(tmp_path / rank, tmp_path / "rank.py", env=env | {"RANK": rank, "LOCAL_RANK": rank}, cwd=tmp_path)
        for rank in "01"
    ]
    try:
        while not list((tmp_path / "run" / "ckpt").glob("step-*/meta.json")):  # it trains
            assert all(rank.returncode is None for rank in ranks)
            time.sleep(0.05)
        ranks[1].send_signal(sent)
        errors = [rank.wait().stderr for rank in ranks]
    finally:
        for rank in ranks:
            rank.process.kill()
            rank.wait()
    step = checkpoint.load(tmp_path / "run" / "ckpt").progress.step
    if sent == signal.SIGINT:
        assert [rank.returncode for rank in ranks] == [130, 130]
        assert all(f"saved at step {step}" in text for text in errors)
    else:
        assert ranks[0].returncode == 2
        assert "another process of this launch has ended" in errors[0]
        assert "Traceback" not in errors[0]


def test_no_file_of_a_run_holds_a_bare_nan(tmp_path: Path, recipe_tree: dict) -> None:
    run = loop.train(recipe(recipe_tree, train={"max_steps": 2}), tmp_path / "run")
    api.evaluate(run)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    for path in run.rglob("*.json"):
        json.loads(path.read_text(), parse_constant=refuse)
    for line in (run / "events.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
