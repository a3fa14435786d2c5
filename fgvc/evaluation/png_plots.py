"""Plots of a run as PNG files: curves, confusion matrix, calibration and localisation.

What a page of `fgvc report` shows as well, in other sizes (`fgvc.report.html_charts`), is drawn here alone: `draw_reliability`,
`draw_risk`, and the font of class names.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from fgvc.evaluation.calibration import BINS, Calibrated, Reliability, RiskCoverage
from fgvc.evaluation.localization import OVERLAPS, THRESHOLDS, MapBoxes, Thresholds, accuracy
from fgvc.images.lettering import writable

LABELLED = 60  # classes up to which every row of the matrix is named


def plot_curves(history: Sequence[Mapping[str, float]]) -> bytes:
    """Plot training loss, validation loss and accuracy over the epochs of `metrics.csv`."""
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
        right.set(xlabel="epoch", ylabel="learning rate", title="schedule (no validation split)")
    left.set(xlabel="epoch", ylabel="loss", title="loss")
    left.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return _png(figure)


def plot_localisation(map_boxes: Mapping[str, MapBoxes], thresholds: Mapping[str, Thresholds], *, title: str) -> bytes:
    """Plot the share of boxes that are right over the map's threshold, at each IoU, with the threshold that validation chose; and
    the same of a map that knows no image."""
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, overlap in enumerate(OVERLAPS):
        for of, style in (("centre", ":"), ("true", "-")):
            curve = 100 * accuracy(map_boxes[of].best, overlap)
            axes.plot(THRESHOLDS, curve, style, color=f"C{number}", alpha=1 if of == "true" else 0.6)
        step = thresholds["true"].best[number]
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
    return _png(figure)


def plot_confusion(confusion: np.ndarray, classes: Sequence[str], *, title: str) -> bytes:
    """Plot the row-normalised confusion matrix (K,K): a row sums to 100 % of a true class."""
    count = len(classes)
    side = min(4 + 0.18 * count, 16)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    image = axes.imshow(100 * share, cmap="magma_r", vmin=0, vmax=100, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="% of the true class", shrink=0.8)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    if count <= LABELLED:
        names, font = writable(classes)[0], font_of(classes, size=7)
        axes.set_xticks(range(count), names, rotation=90, fontproperties=font)
        axes.set_yticks(range(count), names, fontproperties=font)
    return _png(figure)


def plot_calibration(calibrated: Calibrated, *, split: str) -> dict[str, bytes]:
    """Plot `reliability-<split>.png` and `risk-coverage-<split>.png`, by name."""
    return {
        f"reliability-{split}.png": _png(reliability_figure(calibrated, title=split)),
        f"risk-coverage-{split}.png": _png(risk_figure(calibrated, title=split)),
    }


def reliability_figure(calibrated: Calibrated, *, title: str) -> Figure:
    """Plot accuracy and its gap to confidence, bin by bin, before and after the temperature; and the images of each bin."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    upper, lower = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=(3, 1))
    state = f"temperature {calibrated.temperature:.2f}" if calibrated.calibrated else "not calibrated"
    sides = (("as trained", calibrated.before), (state, calibrated.after))
    for over, under, (name, side) in zip(upper, lower, sides, strict=True):
        handles = draw_reliability(over, under, side)
        over.set_title(f"{name}: calibration error {100 * side.ece:.1f} %")
        over.grid(alpha=0.3)
    upper[0].legend(handles=handles, loc="upper left")
    for axes in (upper[1], lower[1]):
        axes.set_ylabel("")
    figure.suptitle(f"{title}: {calibrated.images} images; {calibrated.source}", wrap=True)
    return figure


def draw_reliability(upper: Axes, lower: Axes, side: Reliability) -> tuple[BarContainer, LineCollection]:
    """Draw accuracy and mean confidence of each bin in per cent, and below it the number of images in each bin. Returns what a
    legend explains."""
    left, width = 100 * np.arange(BINS) / BINS, 0.92 * 100 / BINS
    accuracy, confidence = 100 * side.accuracy, 100 * side.confidence
    bars = upper.bar(left, accuracy, width, align="edge", color="#8fb3d9", label="right")
    levels = upper.hlines(confidence, left, left + width, color="#d1495b", linewidth=3, label="confidence")
    upper.vlines(left + width / 2, confidence, accuracy, color="#d1495b", linewidth=1)
    upper.plot([0, 100], [0, 100], color="#1c1c1c", linewidth=1, linestyle="--")
    upper.set(xlim=(0, 100), ylim=(0, 100), ylabel="right %")
    lower.bar(left, side.images, width, align="edge", color="#8a8a8a")
    lower.set(xlabel="confidence %", ylabel="images")
    return bars, levels


def draw_risk(axes: Axes, curve: RiskCoverage, *, label: str | None = None) -> None:
    """Draw the share of wrong answers among the most confident ones over the share that is answered, both in per cent."""
    axes.plot(100 * curve.coverage, 100 * curve.risk, color="#3b6ea5", label=label)
    axes.set(xlabel="answered %, the surest first", ylabel="of these wrong %", xlim=(0, 100), ylim=(0, None))


def font_of(names: Sequence[str], *, size: float) -> FontProperties:
    """The font, of `size` points, that can write these names."""
    return FontProperties(fname=str(writable(names)[1].path), size=size)


def risk_figure(calibrated: Calibrated, *, title: str) -> Figure:
    """Plot the share of wrong answers among the most confident ones over coverage, and the threshold."""
    curve = calibrated.curve
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    draw_risk(axes, curve, label=f"area {100 * curve.area:.2f} %")
    answered = int((curve.confidence >= calibrated.threshold).sum())
    if 0 < answered < calibrated.images:
        axes.plot(
            100 * curve.coverage[answered - 1], 100 * curve.risk[answered - 1], "o", color="#d1495b",
            label=f"threshold {100 * calibrated.threshold:.0f} %, to keep {100 * calibrated.keep:g} % of the right",
        )  # fmt: skip
    axes.set_title(f"{title}: {calibrated.images} images")
    axes.set_ylim(0, None)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()
