"""Speed as ratios of two things measured in turn in one process (`fgvc bench`), never as seconds alone.

The bare step here is what one writes with torch and timm and nothing else: the same net, batch, optimizer and layout.
"""

from __future__ import annotations

import csv
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, count, cycle, islice
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2

from fgvc.config.recipe import Recipe
from fgvc.config.techniques import Techniques, settings_by_kind
from fgvc.errors import FgvcError
from fgvc.exporting.onnx import Interface, export_onnx
from fgvc.exporting.proofs import MAX_IMAGES
from fgvc.exporting.prove import PlainBackbone
from fgvc.models.backbone import deployed, memory_format, plain_model
from fgvc.models.class_maps import ClassMapper, Method, refusal
from fgvc.models.classifier import as_classifier
from fgvc.models.net import shipped_net
from fgvc.models.weights import load_weights
from fgvc.runs.build import build_net
from fgvc.runs.distributed import process_group
from fgvc.runs.environment import environment
from fgvc.runs.images import read_index
from fgvc.training.batch import Normalise, to_batch
from fgvc.training.forecast import count_images
from fgvc.training.log import Events
from fgvc.training.optimizer_step import optimizer_step
from fgvc.training.session import Session, open_session

WARM_UP = 3
BLOCK = 15  # steps


@dataclass(frozen=True, slots=True)
class Ratio:
    """Ratio of two things timed in turn, A/B/B/A: median of `a / b` over the pairs, with the median's 95 % interval."""

    name: str
    pairs: int
    median: float
    low: float
    high: float
    a_seconds: float  # medians, for orientation
    b_seconds: float
    total: float  # all time of `a` over all time of `b`: where a step is not like the next, what many of them cost
    expected: float | None = None  # where the ratio can be predicted: from the count of forwards and backwards


def interleaved(
    name: str, a: Callable[[], object], b: Callable[[], object], *, pairs: int, warm_up: int = WARM_UP
) -> Ratio:
    """Time `a` and `b` alternately, the order turned round in every other pair, so that drift cancels."""
    for _ in range(warm_up):
        a()
        b()
    seconds: list[tuple[float, float]] = []
    for pair in range(pairs):
        first, second = (a, b) if pair % 2 == 0 else (b, a)
        times = [_timed(first), _timed(second)]
        seconds.append((times[0], times[1]) if pair % 2 == 0 else (times[1], times[0]))
    ratios = sorted(x / y for x, y in seconds)
    low, high = _median_interval(pairs)
    return Ratio(
        name,
        pairs,
        statistics.median(ratios),
        ratios[low],
        ratios[high],
        statistics.median(x for x, _ in seconds),
        statistics.median(y for _, y in seconds),
        sum(x for x, _ in seconds) / sum(y for _, y in seconds),
    )


def bench_train(recipe: Recipe, *, pairs: int = 30) -> Ratio:
    """Time fgvc's step (uint8 batch on the host to updated weights) over a bare step on the ready float batch."""
    with process_group(recipe.train) as process, open_session(recipe, process, teachers="to time") as session:
        raw = next(session.loader.epoch(0))
        ours = step_on_one_batch(session)
        x = Normalise(session.preprocess, process.device, memory_format(session.step.net))(raw.images)
        return interleaved(
            f"step: fgvc / bare ({_about(recipe)})", ours, _bare_step(session, x, raw.labels), pairs=pairs
        )


def bench_each(recipe: Recipe, *, pairs: int = 30, warm_up: int = WARM_UP) -> list[Ratio]:
    """Time every technique's step over the step without any, and that step over itself as a measure of the noise.

    With the recipe's settings of a technique, or its defaults. Expected is (forwards + 2 backwards) / 3, in images through
    the backbone over images of the batch: a backward costs about two forwards; a teacher's answer is timed by itself, in a
    row before. Techniques that refuse are left out.
    """
    train = recipe.train.model_copy(update={"workers": 0})
    none = {kind: None for kind in settings_by_kind()}
    ratios = []
    for kind in (None, *settings_by_kind()):
        gc.collect()  # nets lie in cycles that nothing else would break soon: 7 GB in the end
        techniques = none if kind is None else none | {kind: getattr(recipe.techniques, kind) or settings_by_kind()[kind]()}
        arms = [
            recipe.model_copy(update={"train": train, "techniques": recipe.techniques.model_copy(update=update)})
            for update in (techniques, none)
        ]
        try:
            with process_group(train) as process, ExitStack() as stack:
                sessions = [stack.enter_context(open_session(arm, process, teachers="to time")) for arm in arms]
                steps = [step_on_one_batch(session) for session in sessions]
                passes = count_images(sessions[0].step.net, *sessions[0].step.attachments.average)
                name = f"step: {kind or 'plain'} / plain ({_about(recipe)})"
                ratio = interleaved(name, steps[0], steps[1], pairs=pairs, warm_up=warm_up)
                teacher_ratios = _bench_teachers(sessions[0], steps[1], pairs=pairs, warm_up=warm_up)
        except FgvcError as error:
            if kind is None or f"techniques.{kind}" not in str(error):
                raise
            continue
        images = sessions[0].batch * (pairs + warm_up)
        forwards = sum(rows for rows, _ in passes) / images
        backwards = sum(rows for rows, follows in passes if follows) / images
        answers = sum(teacher.median for teacher in teacher_ratios)
        ratios += [*teacher_ratios, replace(ratio, expected=(forwards + 2 * backwards) / 3 + answers)]
    return ratios


def _bench_teachers(session: Session, plain: Callable[[], None], *, pairs: int, warm_up: int) -> list[Ratio]:
    """Time each teacher's forward of a batch, other than the moving average's, over a plain step of that batch."""
    batch = to_batch(next(session.loader.epoch(0)), session.normalise, session.train_size)
    return [
        interleaved(
            f"teacher: {teacher.name} / plain step", partial(teacher, batch.x, batch.finest), plain, pairs=pairs, warm_up=warm_up
        )
        for teacher in session.step.attachments.teachers
        if teacher.size is not None
    ]


def bench_maps(recipe: Recipe, *, pairs: int = 30) -> list[Ratio]:
    """Time each kind of class map, from given features, over a plain step of the same batch: 0.03 is the limit."""
    none = Techniques()
    train = recipe.train.model_copy(update={"workers": 0})
    plain = recipe.model_copy(update={"train": train, "techniques": none})
    ratios = []
    with process_group(train) as process, open_session(plain, process) as session:
        step, net = step_on_one_batch(session), session.step.net
        batch = to_batch(next(session.loader.epoch(0)), session.normalise, session.train_size)
        with torch.no_grad():
            features = as_classifier(net).forward_features(batch.x)
        for method in get_args(Method):
            if refusal(net, recipe.image.size, method) is None:
                make = partial(ClassMapper(net), features, batch.target, method, batch.x.shape[2:])
                name = f"map: {method} / plain step ({_about(recipe)})"
                ratios.append(interleaved(name, make, step, pairs=pairs))
    return ratios


def bench_export(recipe: Recipe, *, pairs: int = 3) -> Ratio:
    """Time the export with all proofs, on up to 256 images of noise, over torch's bare export of the same net. Raises FgvcError
    for a recipe of a deployed file."""
    torch.manual_seed(recipe.train.seed)
    index = read_index(recipe)
    if recipe.model.backbone is None:
        raise FgvcError("bench export compares with torch's own export, and a deployed file is not exported: give model.backbone")
    net = build_net(recipe, len(index.classes), pretrained=False).step.net.eval()
    bare = deployed(plain_model(recipe.model.backbone, len(index.classes), recipe.model.kwargs))
    images = [torch.randn(32, 3, *recipe.image.size).numpy() for _ in range(MAX_IMAGES // 32)]
    settings = recipe.export
    contract = PlainBackbone(
        backbone=recipe.model.backbone, num_classes=len(index.classes), kwargs=recipe.model.kwargs, size=recipe.image.size,
        export=settings,
    )  # fmt: skip

    def proven_export() -> None:
        contract.prove(net, images)

    def bare_export() -> None:
        export_onnx(bare, exporter=settings.exporter, **asdict(Interface.of(settings, recipe.image.size)))

    name = f"export: with all proofs / bare ({recipe.model.backbone}, {recipe.image.size[0]} px, {settings.exporter})"
    return interleaved(name, proven_export, bare_export, pairs=pairs, warm_up=1)


def bench_load(recipe: Recipe, *, workers: int, pairs: int = 12) -> Ratio:
    """Time steps with loading and augmenting over as many steps on batches in memory: 1 / 0.95 is the limit.

    In blocks of BLOCK steps, through epochs as they come. The loader is a few batches ahead at both ends of a block.
    """
    train = recipe.train.model_copy(update={"workers": workers})
    recipe = recipe.model_copy(update={"train": train})
    with process_group(train) as process, open_session(recipe, process, teachers="to time") as session:
        quiet = Events(Path(), recipe.log, active=False)
        batches_in_memory = cycle(list(islice(session.loader.epoch(0), BLOCK)))
        batches = chain.from_iterable(session.loader.epoch(number) for number in count(1))

        def loaded() -> None:
            for _ in range(BLOCK):
                optimizer_step(session, batches, quiet)

        def step_alone() -> None:
            for _ in range(BLOCK):
                optimizer_step(session, batches_in_memory, quiet)

        name = f"loaded steps / steps alone, {workers} workers, cache {recipe.cache} ({_about(recipe)})"
        return interleaved(name, loaded, step_alone, pairs=pairs, warm_up=1)


def write_csv(path: Path, ratios: Sequence[Ratio]) -> None:
    """Write the ratios as CSV, one a line with machine and versions."""
    env = environment()
    about = {key: env[key] for key in ("cpu", "cores", "torch", "timm")}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        columns = ["median", "low", "high", "a_seconds", "b_seconds"]
        if any(r.expected is not None for r in ratios):
            columns.append("expected")
        writer.writerow(["name", "pairs", *columns, *about])
        for r in ratios:
            numbers = [getattr(r, column) for column in columns]
            values = ["" if number is None else f"{number:.4f}" for number in numbers]
            writer.writerow([r.name, r.pairs, *values, *about.values()])


def step_on_one_batch(session: Session) -> Callable[[], None]:
    """Make a function that takes the run's own step on one batch in memory; schedules are half way, and random numbers are drawn
    anew for each step."""
    raw = list(islice(session.loader.epoch(0), session.recipe.train.grad_accum_steps))
    quiet = Events(Path(), session.recipe.log, active=False)
    session.progress.epoch = session.recipe.train.epochs // 2
    numbers = cycle(range(session.total_steps // 2, session.total_steps))

    def step() -> None:
        session.progress.step = next(numbers)
        optimizer_step(session, iter(raw), quiet)

    return step


def _bare_step(session: Session, x: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    recipe, device = session.recipe, session.process.device
    if recipe.train.grad_accum_steps > 1 or session.process.world > 1:
        raise FgvcError("bench: the bare step has no accumulation and one process")
    if recipe.optim.sam is not None or recipe.loss.kind != "cross_entropy":
        raise FgvcError("bench: the bare step knows neither SAM nor other losses than cross-entropy")
    torch.manual_seed(recipe.train.seed)
    net = shipped_net(recipe.model, len(session.index.classes), recipe.image.size)
    load_weights(net, recipe.model)
    net = net.to(device).to(memory_format=memory_format(net)).train()
    optimizer = create_optimizer_v2(
        net, opt=recipe.optim.name, lr=recipe.optim.lr, momentum=recipe.optim.momentum,
        weight_decay=recipe.optim.weight_decay, filter_bias_and_bn=True,
    )  # fmt: skip
    criterion = LabelSmoothingCrossEntropy(recipe.loss.label_smoothing)
    y = labels.to(device)

    def step() -> None:
        loss = criterion(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _timed(do: Callable[[], object]) -> float:
    started = time.perf_counter()
    do()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _median_interval(count: int) -> tuple[int, int]:
    """Positions in the sorted sample between which the median lies with at least 95 % (binomial, distribution-free)."""
    draws = np.cumsum([_binomial(count, k) for k in range(count + 1)])
    low = max(int(np.searchsorted(draws, 0.025, side="right")) - 1, 0)
    return low, count - 1 - low


def _binomial(count: int, k: int) -> float:
    return math.comb(count, k) / 2.0**count


def _about(recipe: Recipe) -> str:
    return f"{recipe.model.name}, {recipe.image.size[0]} px, batch {recipe.train.batch_size}"
