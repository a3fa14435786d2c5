"""The tables of a study as files: `runs.csv`, `table.md` and `table.html`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from fgvc.io.files import write_atomic
from fgvc.io.tables import as_csv
from fgvc.report.render import chart, render
from fgvc.studies.result import Result
from fgvc.studies.study import Plan, Study
from fgvc.studies.table import Line, has_boxes, has_floors, lines, markdown, points, training_count

NAMES = {"val": "Validation", "test": "Test"}
BUDGETS = {
    "epochs": "equal epochs",
    "seconds": "equal seconds of training steps",
    "own": "as many epochs as each arm asks for",
}


@dataclass(frozen=True, slots=True)
class Section:
    """A table's place: one split under one budget."""

    title: str
    lines: list[Line]
    forest: str  # the differences as a picture, an address; "" where there are none

    @property
    def boxes(self) -> bool:
        return has_boxes(self.lines)

    @property
    def floored(self) -> bool:
        return has_floors(self.lines)


def write_tables(plan: Plan, out: Path, results: Sequence[Result]) -> None:
    """Rewrite the study's three files. `results`: of runs of this plan, one a run and split."""
    order = {(trial.arm, trial.number): number for number, trial in enumerate(plan.trials)}

    def place(row: Result) -> tuple[int, ...]:
        arm, fold = order[row["arm"], row["trial"]], row.get("fold", 0)
        return list(NAMES).index(row["split"]), arm, row["epochs"], row["seed"], fold

    rows = sorted(results, key=place)
    write_atomic(out / "runs.csv", as_csv(rows))
    base = plan.base.arm
    sections = [
        Section(
            f"{_split_title(split, plan.study)}: {BUDGETS[budget]}", table, chart(figure) if (figure := forest(table)) else ""
        )
        for split in reversed(NAMES)
        for budget in plan.study.budget
        if (table := lines(rows, split=split, budget=budget, base=base))
    ]
    text = "".join(f"## {section.title}\n\n{markdown(section.lines)}\n" for section in sections)
    graphs = sorted({row["graph"] for row in rows})
    feeds = _feeds(rows)
    arms_by_feed = "".join(f"- {fed}: {', '.join(arms)}\n" for fed, arms in feeds.items()) if len(feeds) > 1 else ""
    warning = f"The arms are not fed alike, so they are no drop-ins for one another:\n\n{arms_by_feed}\n" if arms_by_feed else ""
    write_atomic(out / "table.md", f"# {plan.name}\n\n{warning}{text}")
    page = render(
        "ablate.html", title=plan.name, base=base, sections=sections, graphs=graphs, feeds=feeds, nan=math.isnan,
        points=points, training_count=training_count,
    )  # fmt: skip
    write_atomic(out / "table.html", page)


def _split_title(split: str, study: Study) -> str:
    """Title of a split, with the folds where the study has any."""
    if study.folds is None:
        return NAMES[split]
    numbers, count = study.folds
    folds = f"{count} folds" if len(numbers) == count else f"{len(numbers)} ({', '.join(map(str, numbers))}) of {count} folds"
    return f"{NAMES[split]}, {folds} of train, pooled" if split == "val" else f"{NAMES[split]}, mean over the nets of {folds}"


def _feeds(rows: Sequence[Result]) -> dict[str, list[str]]:
    """Arms by their preprocessing: what `deploy` does not state is that of an arm's own weights."""
    arms_by_feed: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.get("fed"):  # lines of older versions do not say
            arms_by_feed.setdefault(str(row["fed"]), {})[str(row["arm"])] = None
    return {fed: list(arms) for fed, arms in arms_by_feed.items()}


def forest(table: Sequence[Line]) -> Figure | None:
    """Plot the differences to the base arm in points with their intervals, the largest on top. None: there are none."""
    differences = sorted(
        ((line.arm, line.to_base) for line in table if line.to_base is not None), key=lambda pair: pair[1].mean
    )
    if not differences:
        return None
    figure = Figure(figsize=(7, 0.9 + 0.28 * len(differences)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color="#666666", linewidth=0.8)
    for height, (_, difference) in enumerate(differences):
        colour = {"gain": "#0072b2", "loss": "#d55e00", "unclear": "#777777"}[difference.verdict]
        for interval, width, alpha in ((difference.over_images, 6, 0.3), (difference.over_seeds, 1.5, 1)):
            if interval is not None:
                low, high = interval
                axes.hlines(height, 100 * low, 100 * high, color=colour, linewidth=width, alpha=alpha)
        axes.plot(100 * difference.mean, height, "o", color=colour, markersize=5)
    axes.set_yticks(range(len(differences)), [name for name, _ in differences])
    axes.set_ylim(-0.7, len(differences) - 0.3)
    axes.set_xlabel("top-1 minus the base's, points; 95 %: line over seeds, band over images")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    return figure
