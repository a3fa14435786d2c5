"""Cells of an experiment: short runs that differ in a few settings, each scored on the fold that it did not learn from.

    python benchmarks/base/cells.py benchmarks/base/A-cub50.txt --work cells data.root=CUB50 model.weights=FILE

The file's first line is the recipe (and overrides that all cells share), the second one the folds; each line after that names a
cell and its overrides (`folds=1`: of that fold alone; `learn=norms`: only scale, shift and head learn). Rows go to the CSV of the
same name beside it as they come; those that are there are left alone, so a killed command goes on. The steps are the product's
own; what is measured beside them (the floor, each epoch, the way from start to end, a fresh probe on the tuned net) is read from
the fold alone. The test split is not touched.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import platform
import re
import shlex
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from fgvc import api
from fgvc.config.recipe import Recipe
from fgvc.config.shipped import recipe_file
from fgvc.data.loader import evaluation_loader
from fgvc.evaluation.features import pooled
from fgvc.io.bits import pack
from fgvc.models.probe import fit_probe, linear_head, put_head
from fgvc.runs.distributed import process_group
from fgvc.training.log import Events
from fgvc.training.optimizer_step import optimizer_step
from fgvc.training.session import Session, open_session
from fgvc.training.start import fit_teachers, view_features

SHARES = (0.25, 0.5, 0.75)  # of the way from start to end
_KEPT: dict[tuple[object, ...], list[tuple[torch.Tensor, torch.Tensor]]] = {}
FIELDS = (
    "cell", "fold", "overrides", "learned", "held_out", "seconds", "floor", "start", "epochs", "end", "ema", "interpolated",
    "fresh_probe", "fresh_probe_of_frozen", "change", "train_loss", "floor_right", "end_right", "ema_right", "interpolated_right",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("plan", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="where floors are kept")
    parser.add_argument("--file", action="append", default=[], help="NAME=PATH: of weights, by the name that the plan has")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args()
    text = given.plan.read_text()
    shared, folds, *cells = [line for line in text.splitlines() if line and not line.startswith("#")]
    files = dict(file.split("=", 1) for file in given.file)
    config, *common = shlex.split(shared)
    given.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    out = given.plan.with_suffix(".csv")
    if not out.exists():
        out.write_text(f"# {machine()}\n" + ",".join(FIELDS) + "\n")
    for fold in (int(part) for part in folds.split()):
        for line in cells:
            name, _, own = line.partition(":")
            only = [int(part.removeprefix("folds=")) for part in own.split() if part.startswith("folds=")]
            settings = [part for part in shlex.split(own) if not part.startswith(("folds=", "learn="))]
            if (name, str(fold)) in _done(out) or (only and fold not in only):
                continue
            named = [re.sub(r"\b[A-Z]+[0-9]?\b", lambda word: files.get(word[0], word[0]), part) for part in settings]
            overrides = [*common, *named, f"data.fold=[{fold}, 5]", "train.workers=0", "cache=disk", *given.overrides]
            recipe = api.load_recipe(recipe_file(config), overrides)
            row = {"cell": name, "fold": fold, "overrides": shlex.join(settings)}
            row |= _run(recipe, given.work, norms="learn=norms" in own)
            with out.open("a", newline="") as stream:
                csv.DictWriter(stream, FIELDS).writerow(row)
            print({key: value for key, value in row.items() if "right" not in key}, flush=True)


def _done(out: Path) -> set[tuple[str, str]]:
    with out.open(newline="") as stream:
        rows = csv.DictReader(line for line in stream if not line.startswith("#"))
        return {(row["cell"], row["fold"]) for row in rows}


def _run(recipe: Recipe, work: Path, *, norms: bool) -> dict[str, object]:
    """`norms`: scale and shift of batch norms learn, and the head, but nothing else."""
    with process_group(recipe.train) as process, open_session(recipe, process, out=work) as session:
        net, started = session.step.net, time.perf_counter()
        if norms:
            kept = {id(p) for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()}
            kept |= {id(p) for p in linear_head(net).parameters()}
            for parameter in net.parameters():
                parameter.requires_grad_(id(parameter) in kept)
        weight, bias, floor, frozen_probe = fitted_floor(session, work)
        if recipe.model.head == "probe":
            put_head(net, weight, bias)
            if session.ema is not None:
                session.ema.set(net)
        for teacher, fit in fit_teachers(session).items():
            print(f"{teacher}: {fit}", flush=True)
        first = {key: value.detach().clone() for key, value in net.state_dict().items()}
        at_start, scores, losses = right_of(session, net), [], []
        for loss in epochs(session, work):
            losses.append(loss)
            end, ema = right_of(session, net), right_of(session, session.average)
            scores.append(f"{100 * end.mean():.2f}" + ("" if ema is None else f"/{100 * ema.mean():.2f}"))
        row: dict[str, object] = {
            "learned": len(session.index.rows("train")), "held_out": len(end),
            "floor": percent(floor), "start": percent(at_start), "epochs": " ".join(scores), "end": percent(end),
            "ema": "" if ema is None else percent(ema), "fresh_probe_of_frozen": frozen_probe,
            "train_loss": " ".join(f"{loss:.3f}" for loss in losses),
        }  # fmt: skip
        last = {key: value.detach().clone() for key, value in (session.average or net).state_dict().items()}
        row |= _between(session, first, last, net)
        row |= {"fresh_probe": _fresh_probe(session, net), "seconds": round(time.perf_counter() - started)}
        row |= {"floor_right": pack(floor), "end_right": pack(end), "ema_right": "" if ema is None else pack(ema)}
        return row


def epochs(session: Session, work: Path) -> Iterator[float]:
    """Train, one epoch after the other: the mean loss of each."""
    events = Events(work, session.recipe.log, active=False)
    for epoch in range(session.recipe.train.epochs):
        session.progress.epoch, session.progress.micro = epoch, 0
        micro_batches = session.loader.epoch(epoch)
        total = 0.0
        for _ in range(session.steps_per_epoch):
            session.schedule.step_update(session.progress.step)
            found, _ = optimizer_step(session, micro_batches, events)
            session.progress.step += 1
            total += float(found["loss"])
        yield total / session.steps_per_epoch


def _between(
    session: Session, first: dict[str, torch.Tensor], last: dict[str, torch.Tensor], net: torch.nn.Module
) -> dict[str, object]:
    """Scores on the way from start to end, and how far that is: of all weights but the head's, relative to the start's norm."""
    head = linear_head(net).weight
    name = next(key for key, value in net.named_parameters() if value is head).rpartition(".")[0]
    own = [key for key, value in net.named_parameters() if not key.startswith(name)]
    moved = sum(float((last[key] - first[key]).square().sum()) for key in own)
    change = (moved / sum(float(first[key].square().sum()) for key in own)) ** 0.5
    if session.recipe.model.head != "probe":
        net.load_state_dict(last)
        return {"change": f"{change:.4f}"}
    found = {}
    for share in SHARES:
        net.load_state_dict(
            {key: torch.lerp(first[key], value, share) if value.is_floating_point() else value for key, value in last.items()}
        )
        found[share] = right_of(session, net)
    net.load_state_dict(last)
    best = max(SHARES, key=lambda share: found[share].mean())
    return {
        "change": f"{change:.4f}", "interpolated": " ".join(percent(found[share]) for share in SHARES),
        "interpolated_right": f"{best}:{pack(found[best])}",
    }  # fmt: skip


def fitted_floor(session: Session, work: Path) -> tuple[torch.Tensor, torch.Tensor, np.ndarray, str]:
    """The head that is fitted to the frozen net (with two augmented views), its answers on the fold; and the accuracy of one that
    is fitted to the evaluation view alone, to stand beside the fresh probe."""
    recipe, net, index = session.recipe, session.step.net, session.index
    parts = {"image", "deploy", "augment", "data"}
    told = recipe.model_dump_json(include=parts) + repr((recipe.model.backbone, recipe.model.weights, recipe.model.kwargs))
    file = work / f"floor-{hashlib.sha256(told.encode()).hexdigest()[:12]}.npz"
    if not file.exists():
        net.eval()
        seen = view_features(
            net, session.preprocess, index, index.rows("train"), recipe=recipe, device=session.process.device
        )
        session.step.train()
        vectors, labels, rows = seen.vectors, seen.labels, seen.rows
        classes = len(session.index.classes)
        probe = fit_probe(vectors, labels, classes=classes, groups=rows, seed=recipe.train.seed)
        held, truth = _features(session, session.step.net, "val")
        right = probe.logits(held).argmax(1) == truth
        plain = fit_probe(vectors[: len(rows) // 3], labels[: len(rows) // 3], classes=classes, seed=recipe.train.seed)
        again = (plain.logits(held).argmax(1) == truth).mean()
        np.savez(file, weight=probe.weight, bias=probe.bias, right=right, again=again)
    found = np.load(file)
    return torch.from_numpy(found["weight"]), torch.from_numpy(found["bias"]), found["right"], percent(found["again"])


def _fresh_probe(session: Session, net: torch.nn.Module) -> str:
    vectors, labels = _features(session, net, "train")
    probe = fit_probe(vectors, labels, classes=len(session.index.classes), seed=session.recipe.train.seed)
    held, truth = _features(session, net, "val")
    return percent(probe.logits(held).argmax(1) == truth)


def _features(session: Session, net: torch.nn.Module, split: str) -> tuple[np.ndarray, np.ndarray]:
    net.eval()
    batches = _batches(session, split)
    with torch.inference_mode():
        vectors = [
            pooled(net, x.to(memory_format=session.normalise.memory_format)).flatten(1).float().numpy() for x, _ in batches
        ]
    session.step.train()
    return np.concatenate(vectors), np.concatenate([labels.numpy() for _, labels in batches])


def _batches(session: Session, split: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images as evaluation sees them; those of the last cell's fold are kept."""
    rows = session.index.rows(split)
    key = (split, str(session.index.root), session.preprocess.model_dump_json(), rows.tobytes())
    if key not in _KEPT:
        for old in [old for old in _KEPT if old[0] == split]:
            del _KEPT[old]
        loader = evaluation_loader(session.index, rows, spec=session.preprocess, batch_size=64, workers=0)
        _KEPT[key] = [(batch.images, batch.labels) for batch in loader]
    return _KEPT[key]


def right_of(session: Session, net: torch.nn.Module | None) -> np.ndarray | None:
    """(N,) bool on the fold, in the order of the index."""
    if net is None:
        return None
    vectors, labels = _features(session, net, "val")
    with torch.inference_mode():
        z = linear_head(net)(torch.from_numpy(vectors))
    return z.argmax(1).numpy() == labels


def percent(right: np.ndarray) -> str:
    return f"{100 * right.mean():.2f}"


def machine() -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "scikit-learn"))
    return f"{versions}, {platform.machine()}, one thread a process; test is not read"


if __name__ == "__main__":
    main()
