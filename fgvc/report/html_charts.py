"""Charts of a report: curves, terms of techniques, reliability; small, and legible at the width of a phone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fgvc.evaluation.calibration import BINS, Calibrated, Reliability
from fgvc.evaluation.png_plots import draw_reliability, draw_risk, font_of
from fgvc.images.lettering import writable
from fgvc.report.render import chart
from fgvc.runs.history import History

COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444"]  # Okabe and Ito's, for all eyes
SIZE = 4.6, 3.0  # inches
MARKED = 60  # epochs up to which each has a point


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart with its title; `about`: what a reader must know to read it."""

    title: str
    address: str
    about: str


def curves(names: Sequence[str], histories: Sequence[History]) -> list[Chart]:
    """Chart loss, validation accuracy and learning rate of all runs, each in its own colour. Without validation, no accuracy."""
    pairs = [pair for pair in zip(_with_colours(names), histories, strict=True) if pair[1].epochs]
    if not pairs:
        return []
    single = len(names) == 1
    loss, top1, rate = (_axes() for _ in range(3))
    validated = any("val_top1" in row for _, history in pairs for row in history.epochs)
    for (name, colour), history in pairs:
        rows = history.epochs
        scored = [row for row in rows if "val_top1" in row]
        label = None if single else name
        trained = [row.get("base", row["loss"]) for row in rows]
        _line(loss[1], rows, trained, colour, label=label if not scored else None, dotted=validated)
        if scored:
            _line(loss[1], scored, [row["val_loss"] for row in scored], colour, label=label)
            _line(top1[1], scored, [100 * row["val_top1"] for row in scored], colour, label=label)
        steps = history.rates or tuple((int(row["step"]), row["lr"]) for row in rows)
        rate[1].plot([step for step, _ in steps], [lr for _, lr in steps], color=colour, label=label)
    loss[1].set(xlabel="epoch", ylabel="cross-entropy")
    top1[1].set(xlabel="epoch", ylabel="top-1, %")
    rate[1].set(xlabel="step", ylabel="learning rate")
    rate[1].ticklabel_format(axis="y", scilimits=(-3, 4))
    words = "raining, by its labels as they were smoothed or mixed, without the terms of techniques."
    about = f"Dotted: t{words} Solid: validation." if validated else f"T{words}"
    charts = [_finish(loss, "Loss", about, names)]
    if validated:
        charts.append(_finish(top1, "Validation top-1", "After every epoch that was scored.", names))
    return [*charts, _finish(rate, "Learning rate", "Of the backbone, step by step.", names)]


def terms(history: History) -> list[Chart]:
    """Chart the terms and measures of each technique, epoch by epoch."""
    charts = []
    for technique, columns in history.terms.items():
        figure = _axes()
        for (name, colour), column in zip(_with_colours(columns), columns, strict=True):
            rows = [row for row in history.epochs if column in row]
            _line(figure[1], rows, [row[column] for row in rows], colour, label=name.partition(".")[2] or name)
        figure[1].set(xlabel="epoch")
        charts.append(
            _finish(figure, technique, "Its terms of the loss, before their weights, and what else it counts.", ())
        )
    return charts


def calibration_charts(calibrated: Calibrated) -> list[Chart]:
    """Chart accuracy over confidence, without and with the temperature, and the risk-coverage curve."""
    charts = [_reliability("Reliability", calibrated.before, "as the network says it")]
    if calibrated.calibrated:
        about = f"by {calibrated.source}; measured on images that it was not fitted on"
        charts.append(_reliability("Calibrated", calibrated.after, about))
    figure, axes = _axes()
    draw_risk(axes, calibrated.curve)
    about = f"Area {100 * calibrated.curve.area:.2f} %: the less, the better its confidence tells right from wrong."
    return [*charts, _finish((figure, axes), "Risk and coverage", about, [])]


def _reliability(title: str, side: Reliability, about: str) -> Chart:
    figure = Figure(figsize=(SIZE[0], 4.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.legend(handles=draw_reliability(upper, lower, side), loc="upper left", frameon=False)
    for axes in (upper, lower):
        _style_axes(axes)
    below = f"{BINS} bins, {about}. Error {100 * side.ece:.2f} %. Below the dashed line: more confident than right."
    return Chart(title, chart(figure), below)


def _with_colours(names: Sequence[str]) -> list[tuple[str, str]]:
    shown, _ = writable(names)
    return [(name, COLOURS[at % len(COLOURS)]) for at, name in enumerate(shown)]


def _line(
    axes: Axes,
    rows: Sequence[Mapping[str, float]],
    values: Sequence[float],
    colour: str,
    *,
    label: str | None,
    dotted: bool = False,
) -> None:
    """Plot `values` over the epochs of `rows`."""
    mark = "." if len(rows) <= MARKED else ""
    axes.plot([row["epoch"] for row in rows], values, color=colour, marker=mark, label=label, ls=":" if dotted else "-")


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    return figure, figure.subplots()


def _finish(figure: tuple[Figure, Axes], title: str, about: str, names: Sequence[str]) -> Chart:
    axes = figure[1]
    _style_axes(axes)
    if axes.get_xlabel() == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, prop=font_of(names, size=8))
    return Chart(title, chart(figure[0]), about)


def _style_axes(axes: Axes) -> None:
    axes.grid(color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
