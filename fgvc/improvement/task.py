"""Definition of an improvement: a deployed file or a net of timm's, the images in three splits, and the recipe that all rungs
share.

Decided once and recorded: `task.json`, `images.csv`, and `deployed/` with the file, its labels and its preprocessing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fgvc.config.images import Preprocess
from fgvc.config.loading import merge, read_tree
from fgvc.config.models import Model
from fgvc.config.shipped import DEFAULT, recipe_file
from fgvc.data.deployed import PREPROCESS
from fgvc.errors import FgvcError, UndecidedError
from fgvc.evaluation.file_stack import DeniedStackError, OtherOrderError, UndecidedStackError, file_stack
from fgvc.exporting.inspect import Inspection, inspect_file
from fgvc.images.preprocess import described
from fgvc.improvement.images import Divided, divide, refuse_faulty
from fgvc.improvement.recipes import recipe_of
from fgvc.improvement.request import Request, refuse_other_words
from fgvc.improvement.unlabelled import list_unlabelled
from fgvc.improvement.verdict import least_gain
from fgvc.io.files import as_json, make_folder, write_atomic
from fgvc.io.names import few
from fgvc.models.backbone import plain_model, pretrained_cfg, refuse_unknown
from fgvc.models.weights import is_packaged
from fgvc.runs import deployed
from fgvc.runtime.bundle import bundle_with_judge, read_json, read_labels, read_preprocess
from fgvc.runtime.description import describe
from fgvc.runtime.labels import Labels, labels_of
from fgvc.studies.candidate import start_model

LARGE_GAIN = 0.02  # share in [0,1]: where no smaller gain can be shown there is a warning
PREPROCESS_SHARE = 1 / 8  # of the budget, for the search of a preprocessing that nobody remembers
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Definition of an improvement; `recipe`: the tree of settings that all rungs share."""

    name: str  # of the file, or of the net
    file: str | None  # the kept copy of the deployed file; None: a net of timm's
    twin: str | None  # timm's name of the file's net, where it is one
    classes: tuple[str, ...]
    counts: Mapping[str, int]  # images by split
    rule: str  # which images choose and judge
    recipe: Mapping[str, Any]
    starts: tuple[Mapping[str, Any], ...]  # other weights for this net: name -> keys of model
    teachers: tuple[Mapping[str, Any], ...]  # other nets at hand, which may teach: backbone, weights, kwargs
    keeps_answers: bool = False  # whether the deployed file teaches, too, so that fewer of its right answers are lost
    unlabelled: tuple[str, ...] = ()  # paths of more images, that a teacher names
    notes: tuple[str, ...] = field(default=())
    folds: int = 1  # of the images to learn from, which choose in turn: a rung is a run for each; 1: val chooses

    @property
    def chooses(self) -> bool:
        """Whether there are images that choose between rungs."""
        return self.counts["val"] > 0 or self.folds > 1

    @property
    def to_learn(self) -> int:
        """Images that a run learns from before the choice."""
        return self.counts["train"] - self.to_choose if self.folds > 1 else self.counts["train"]

    @property
    def to_choose(self) -> int:
        """Images that score such a run."""
        return self.counts["train"] // self.folds if self.folds > 1 else self.counts["val"]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the network's input."""
        height, width = self.recipe["image"]["size"]
        return height, width

    def lines(self) -> list[str]:
        height, width = self.size
        twin = f", a {self.twin} of timm's" if self.twin else ""
        what = f"{self.name}, {len(self.classes)} classes, at {height} x {width} pixels"
        what += " (--size for others)" if self.file is None else twin
        choose = f"which choose in {self.folds} folds" if self.folds > 1 else f"{self.counts['val']} choose"
        counts = f"{self.counts['train']} images to learn from, {choose}, {self.counts['test']} judge"
        least = least_gain(self.counts["test"])
        few_judge = f"so few images that judge can show no gain below {100 * least:.1f} points"
        doubts = [*self.notes, *([few_judge] if least > LARGE_GAIN else [])]
        return [what, f"{counts}: {self.rule}", *(f"warning: {doubt}" for doubt in doubts)]


def look(request: Request, out: Path, say: Say) -> Task:
    """Inspect the file and the images and define the task; or read the task that an earlier session recorded.

    Raises FgvcError with everything that is wrong or missing at once, and where a resumed command asks for something else.
    """
    record = out / "task.json"
    if record.is_file():
        refuse_other_words(request, out)
        task = _task(read_json(record, dict)["task"])
        _refuse_replaced(request, task, out)
        return task
    places = (
        ("", request.file), ("", request.data), ("--labels ", request.labels), ("--preprocess ", request.preprocess),
        ("--unseen ", request.unseen), ("--unlabelled ", request.unlabelled),
    )  # fmt: skip
    checks = [partial(_refuse_absent, *place) for place in places]
    if request.file is None:
        checks.append(partial(_refuse_no_net, request.target))
    models = _several(*checks, *(partial(start_model, text) for text in request.absolute_starts))[len(checks) :]
    task = _of_file(request, request.file, models, out, say) if request.file is not None else _of_name(request, models, out, say)
    write_atomic(record, as_json({"request": request.record, "task": asdict(task)}))
    return task


def _refuse_replaced(request: Request, task: Task, out: Path) -> None:
    """Raise FgvcError where another file lies in the deployed one's place, such as the better one: its verdict is not known."""
    if task.file is None or request.file is None or not request.file.is_file():
        return
    if deployed.record_of(request.file) != deployed.record_of(Path(task.file)):
        raise FgvcError(
            f"{request.file}: is another file than the one that {out} was begun with ({task.file}); choose another --out for it, "
            "or put that one back to go on"
        )


def _task(stored: dict[str, Any]) -> Task:
    return Task(**stored | {key: tuple(stored[key]) for key in ("classes", "starts", "teachers", "unlabelled", "notes")})


def _several(*checks: Callable[[], Any]) -> list[Any]:
    """Run several checks and return their results. Raises FgvcError with the messages of all that fail."""
    results, errors = list[Any](), list[FgvcError]()
    for one in checks:
        try:
            results.append(one())
        except FgvcError as error:
            errors.append(error)
    if errors:
        kinds = {type(error) for error in errors}
        raise (kinds.pop() if len(kinds) == 1 else FgvcError)("\n".join(str(error) for error in errors))
    return results


def _refuse_absent(option: str, path: Path | None) -> None:
    if path is not None and not path.expanduser().exists():
        raise FgvcError(f"{option}{path}: no such file or folder")
    if path is not None and option in ("--labels ", "--preprocess ") and path.is_dir():
        raise FgvcError(f"{option}{path}: is a folder; name the file in it")


def _refuse_no_net(target: str) -> None:
    """Raise FgvcError where what is no file is no name of a net either."""
    if (folder := Path(target).expanduser()).is_dir():
        model = folder / "model.onnx"
        raise FgvcError(f"{target}: is a folder; name the deployed file in it" + f": {model}" * model.is_file())
    refuse_unknown(target)


def _of_file(request: Request, file: Path, models: Sequence[Model], out: Path, say: Say) -> Task:
    say(f"looking at {file.name} and {request.data}")
    stated = labels_of(file)
    if request.labels is not None and stated is not None and read_labels(request.labels) != stated.names:
        raise FgvcError(f"--labels {request.labels}: {stated.source} says otherwise; leave the option out, or mend that")
    labels = Labels(read_labels(request.labels), f"--labels {request.labels}") if request.labels is not None else stated
    divided, (fed, inspection) = _several(
        lambda: divide(request.data, deployed=True, seen=request.seen, unseen=request.unseen, bundle=bundle_with_judge(file)),
        lambda: _inspected(request, file, labels),
    )
    if not inspection.agrees:
        raise FgvcError(f"{file}: torch's answers are not onnxruntime's, so it can't be trained here; `fgvc inspect` tells more")
    _, warnings = _several(
        lambda: _refuse_names(labels, divided, inspection.classes, file), lambda: refuse_faulty(divided)
    )
    spec, names, doubts = _stack(request, file, labels, fed, inspection, divided, out, say)
    deployed.keep_file(out, file, names)
    kept = (out / deployed.FOLDER / file.name).absolute()
    description = describe(file, output=inspection.output)
    spec = spec.model_copy(update={"network": description.record})
    write_atomic(kept.with_name(PREPROCESS), as_json(spec.model_dump(mode="json")))
    twin = next((net["name"] for net in inspection.timm["nets"]), None)
    settings = {
        "model": {"onnx": str(kept), "weights": "deployed"}
        | ({"output": inspection.output} if description.others else {}),
        "image": {"size": list(spec.size)},
        "deploy": {"resize": spec.resize, "seen": "train"},
    }
    if description.ending == "sigmoid":
        settings["loss"] = {"kind": "bce"}
    say(f"it is fed by {described(spec)}")
    unlabelled = _unlabelled(request, divided, say)
    return Task(
        name=file.name,
        file=str(kept),
        twin=twin,
        classes=names,
        counts=divided.counts,
        rule=divided.rule,
        recipe=_recipe(settings, divided, out, request.seed),
        starts=_starts(model for model in models if _is_of(model, twin)),
        teachers=_teachers(model for model in models if not _is_of(model, twin)),
        keeps_answers=request.max_negative_flips is not None,
        unlabelled=unlabelled,
        notes=(*doubts, *warnings),
    )


def _refuse_names(labels: Labels | None, divided: Divided, outputs: int, file: Path) -> None:
    """Raise FgvcError where the stated names of the outputs, or where none are stated their number, do not fit the images."""
    classes = divided.index.classes
    if labels is None:
        if len(classes) != outputs:
            raise FgvcError(
                f"{file}: has {outputs} outputs, and the images are of {len(classes)} classes: which output is which? "
                "--labels FILE, a class a line"
            )
        return
    if len(labels.names) != outputs:
        raise FgvcError(f"{file}: has {outputs} outputs, and its labels name {len(labels.names)} classes; give --labels FILE")
    if unknown := sorted(set(classes) - set(labels.names)):
        raise FgvcError(f"{divided.index.root}: has classes that the file does not know: {few(unknown)}")


def _beside(request: Request, file: Path) -> Path:
    """The file that may say how the deployed one is fed."""
    return request.preprocess if request.preprocess is not None else file.with_name(PREPROCESS)


def _inspected(request: Request, file: Path, labels: Labels | None) -> tuple[Preprocess | None, Inspection]:
    """Read the stated preprocessing (None: none is stated), and inspect the file. Which of several outputs has the classes
    follows from the former, or from the number of the labels."""
    fed = read_preprocess(beside) if (beside := _beside(request, file)).is_file() else None
    output = None if fed is None else fed.output
    if output is None and labels is not None:
        output = describe(file, classes=len(labels.names)).output
    lone = not file.with_name(PREPROCESS).is_file()  # else the option says otherwise than what lies beside, and holds
    return fed, inspect_file(file, request.size, output=output, preprocess=request.preprocess if lone else None)


def _left(file: Path, text: str) -> Path:
    """A file for the user to look at and to mend."""
    make_folder(file.parent)
    write_atomic(file, text)
    return file


def _stack(
    request: Request, file: Path, labels: Labels | None, fed: Preprocess | None, inspection: Inspection, divided: Divided,
    out: Path, say: Say,
) -> tuple[Preprocess, tuple[str, ...], tuple[str, ...]]:
    """Determine preprocessing and labels, and the doubts about the former: as stated (`fed`, `labels`), else by the file's
    answers about images that do not judge. Raises FgvcError where these leave it open, or contradict what is stated."""
    if fed is not None and fed.size != inspection.size:
        ours, theirs = ("x".join(map(str, sides)) for sides in (fed.size, inspection.size))
        raise FgvcError(
            f"{_beside(request, file)}: makes images of {ours} pixels, and {file} is to take {theirs}: mend it, or --size"
        )
    try:
        stack = file_stack(
            file, request.data, index=divided.unjudged, labels=labels, preprocess=fed, size=request.size,
            output=inspection.output, insisted=request.preprocess is not None,
            seconds=min(100.0, PREPROCESS_SHARE * request.budget),
        )  # fmt: skip
    except DeniedStackError as error:
        likeliest = _left(out / "preprocess.found.json", as_json(error.spec.model_dump(mode="json")))
        beside = file.with_name(PREPROCESS)
        raise FgvcError(
            f"{error}\n{likeliest} has the latter; mend {beside} by it, or insist on that: --preprocess {beside}"
        ) from error
    except UndecidedStackError as error:
        likeliest = _left(out / "preprocess.found.json", as_json(error.spec.model_dump(mode="json")))
        raise UndecidedError(
            f"{error}\n{likeliest} has the likeliest; look at it, mend it where it is wrong, and give it as --preprocess"
        ) from error
    except OtherOrderError as error:
        likeliest = _left(out / "labels.found.txt", "".join(f"{name}\n" for name in error.labels))
        advice = "give it as --labels" if labels is None or request.labels is not None else f"mend {labels.source} by it"
        raise FgvcError(f"{error}\n{likeliest} has the likeliest order of the labels; look at it, and {advice}") from error
    if stack.search is not None:
        say("\n".join(stack.search.lines()))
    elif labels is None:
        say(f"labels: nothing states their order; by its answers: {few(stack.labels)}")
    return stack.preprocess, stack.labels, stack.doubts


def _of_name(request: Request, models: Sequence[Model], out: Path, say: Say) -> Task:
    say(f"looking at {request.target} and {request.data}")
    if request.labels is not None or request.preprocess is not None or request.seen != "train":
        raise FgvcError("--labels, --preprocess and --seen are of a deployed file, and the first argument is a net's name")
    if request.unseen is not None:
        raise FgvcError("--unseen: is of a deployed file; no weights have seen these images")
    in_folds = request.unlabelled is None and not request.search  # which need one division
    divided = divide(request.data, deployed=False, in_folds=in_folds)
    warnings = refuse_faulty(divided)
    own = next((model for model in models if _is_of(model, request.target)), None)
    weights = own.weights if own is not None else "packaged" if is_packaged(request.target) else "hub"
    size = request.size or pretrained_cfg(plain_model(request.target, 2))["input_size"][1:]
    settings = {
        "model": {"backbone": request.target, "weights": weights, "kwargs": {} if own is None else dict(own.kwargs)},
        "image": {"size": list(size)},
    }
    make_folder(out)
    return Task(
        name=request.target,
        file=None,
        twin=request.target,
        classes=divided.index.classes,
        counts=divided.counts,
        rule=divided.rule,
        recipe=_recipe(settings, divided, out, request.seed),
        starts=(),
        teachers=_teachers(model for model in models if model is not own),
        unlabelled=_unlabelled(request, divided, say),
        notes=warnings,
        folds=divided.folds,
    )


def _unlabelled(request: Request, divided: Divided, say: Say) -> tuple[str, ...]:
    """Images that a teacher may name."""
    if request.unlabelled is None:
        return ()
    if not divided.counts["val"]:
        say(f"{request.unlabelled}: left out, as no image chooses the teacher that would name them")
        return ()
    listed = list_unlabelled(request.unlabelled, divided, seed=request.seed)
    say(f"{request.unlabelled}: {listed}")
    return listed.paths


def _starts(models: Iterable[Model]) -> tuple[Mapping[str, Any], ...]:
    """Other first weights of one net, by names of their own."""
    return tuple(
        {"name": model.backbone if n == 1 else f"{model.backbone}-{n}", "weights": model.weights}
        for n, model in enumerate(models, 1)
    )


def _is_of(model: Model, net: str | None) -> bool:
    """Whether weights are of this net of timm's, those of a file whatever their tag (`resnet50.a1_in1k`)."""
    if net is None or model.weights in ("hub", "packaged"):  # which weights these are is what the tag says
        return model.backbone == net
    return str(model.backbone).partition(".")[0] == net.partition(".")[0]


def _teachers(models: Iterable[Model]) -> tuple[Mapping[str, Any], ...]:
    """Nets that may teach, the largest first."""
    nets = list(models)
    if len(nets) > 1:
        nets.sort(key=_parameters, reverse=True)
    return tuple({"backbone": net.backbone, "weights": net.weights, "kwargs": dict(net.kwargs)} for net in nets)


def _parameters(model: Model) -> int:
    return sum(parameter.numel() for parameter in plain_model(str(model.backbone), 2, model.kwargs).parameters())


def _recipe(settings: Mapping[str, Any], divided: Divided, out: Path, seed: int) -> dict[str, Any]:
    """The tree of DEFAULT with this net and these images, which are written to `images.csv`."""
    table = (out / "images.csv").absolute()
    write_atomic(table, divided.table())
    tree = recipe_of(read_tree(recipe_file(DEFAULT)).tree, settings)
    tree["data"] = {"kind": "csv", "root": str(divided.index.root.absolute()), "file": str(table)}
    merge(tree, {"select": "ema", "train.seed": seed, "train.workers": 0, "train.floor": False})
    if not divided.counts["val"]:
        tree["data"]["val_fraction"] = 0.0
    return tree
