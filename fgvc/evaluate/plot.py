"""Pictures of a run: curves, confusion matrix and localisation, PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from fgvc.cam.localisation import OVERLAPS, THRESHOLDS, Chosen, Found, accuracy
from fgvc.evaluate.font import writable

LABELLED = 60  # classes up to which every row of the matrix is named


def plot_curves(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Training loss, validation loss and accuracy over the epochs of `metrics.csv`."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    left.plot(epochs, [row["loss"] for row in history], marker=".", label="training (with its techniques)")
    scored = [row for row in history if "val_loss" in row]
    if scored:
        left.plot([r["epoch"] for r in scored], [r["val_loss"] for r in scored], marker=".", label="validation")
        for key, name in (("val_top1", "top-1"), ("val_macro_f1", "macro F1")):
            right.plot([r["epoch"] for r in scored], [100 * r[key] for r in scored], marker=".", label=name)
        right.set(xlabel="epoch", ylabel="%", title="validation")
        right.legend()
    else:
        right.plot(epochs, [row["lr"] for row in history], marker=".")
        right.set(xlabel="epoch", ylabel="learning rate", title="schedule (no validation part)")
    left.set(xlabel="epoch", ylabel="loss", title="loss")
    left.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    _save(figure, path)


def plot_localisation(found: Mapping[str, Found], chosen: Mapping[str, Chosen], path: Path, *, title: str) -> None:
    """Share of boxes that are right over the map's threshold, at each IoU, with the threshold that validation chose; and the
    same of a map that knows no image."""
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, overlap in enumerate(OVERLAPS):
        for of, style in (("centre", ":"), ("true", "-")):
            curve = 100 * accuracy(found[of].best, overlap)
            axes.plot(THRESHOLDS, curve, style, color=f"C{number}", alpha=1 if of == "true" else 0.6)
        step = chosen["true"].best[number]
        place = THRESHOLDS[step], float(curve[step])
        axes.plot(*place, "o", color=f"C{number}", markersize=7)
        label = f"IoU ≥ {overlap}: {place[1]:.1f}"
        side = "left" if place[0] < 0.5 else "right"
        axes.annotate(label, place, (0, 7), textcoords="offset points", color=f"C{number}", ha=side, weight="bold")
    axes.set(
        xlabel="threshold of the map",
        ylabel="images with a box that is right, %",
        title=title,
        xlim=(-0.02, 1),
        ylim=(0, 108),
    )
    axes.grid(alpha=0.3)
    for style, name in (
        ("-", "the true class's map"),
        (":", "a round map in the middle"),
        ("o", "chosen on validation"),
    ):
        axes.plot([], [], style, color="0.4", label=name)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    _save(figure, path)


def plot_confusion(confusion: np.ndarray, classes: Sequence[str], path: Path, *, title: str) -> None:
    """Row-normalised confusion matrix (K,K): a row sums to 100 % of a true class."""
    count = len(classes)
    side = min(4 + 0.18 * count, 16)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    image = axes.imshow(100 * share, cmap="magma_r", vmin=0, vmax=100, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="% of the true class", shrink=0.8)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    if count <= LABELLED:
        names, file = writable(classes)
        font = FontProperties(fname=str(file), size=7)
        axes.set_xticks(range(count), names, rotation=90, fontproperties=font)
        axes.set_yticks(range(count), names, fontproperties=font)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)
