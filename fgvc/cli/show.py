"""Printing of results on stdout as tables and text, for the command line."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fgvc.config.data import SPLITS
from fgvc.data.quality.checks import Report, clean_rows
from fgvc.evaluation.compared import PairedAnswers
from fgvc.evaluation.evaluate import Evaluation
from fgvc.evaluation.learning_curve import FOLDS, SHARES
from fgvc.evaluation.localize import Localisation
from fgvc.evaluation.paired import beside_floor
from fgvc.evaluation.stack_threshold import Accepted
from fgvc.exporting.deployed import WrittenComparison
from fgvc.exporting.verify import Comparison, Verification
from fgvc.io.times import about
from fgvc.report.localization import COLUMNS
from fgvc.report.localization import table as localisation_table
from fgvc.runtime.engine import calibration_word
from fgvc.studies.advice import advise, points, sides
from fgvc.studies.probe import ProbeResults
from fgvc.studies.run import Estimate
from fgvc.studies.speed import Ratio
from fgvc.training.forecast import Forecast
from fgvc.training.interpolate import Interpolation

console = Console(highlight=False)
CONFUSED = 5  # pairs shown; all are in the run's tables
SUSPECTS = 10  # labels shown; all are in the CSV file


def make_table(*columns: str) -> Table:
    """Make a table with names on the left and numbers on the right; one of two columns is a list of facts."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        justify: Literal["left", "right"] = "left" if number == 0 or len(columns) == 2 else "right"
        table.add_column(column, justify=justify, overflow="fold")  # nothing is cut where a terminal is narrow
    return table


def clean(report: Report, file: Path) -> None:
    """Print what a clean list leaves out, and how it is used."""
    rows, left = clean_rows(report)
    reasons = ", ".join(f"{count} {reason}" for reason, count in left.items()) or "none"
    console.print(f"{len(rows)} of {len(report.index)} images are in the list; left out: {reasons}", soft_wrap=True)
    use = f"data.kind=csv data.root={report.index.root} data.file={file.resolve()}"
    console.print(f"to use it: {use}", markup=False, soft_wrap=True)


def check(report: Report) -> None:
    table = make_table("split", "images", "classes", "smallest class", "largest class")
    for name, counts in zip(SPLITS, report.counts, strict=True):
        if counts.any():
            table.add_row(name, str(counts.sum()), str((counts > 0).sum()), str(counts.min()), str(counts.max()))
    console.print(f"recognised: {report.index.recognised}", markup=False, soft_wrap=True)
    console.print(table)
    _suspects(report)
    for warning in report.warnings:
        console.print(f"warning: {warning}", markup=False, soft_wrap=True)
    for error in report.errors:
        console.print(f"ERROR: {error}", markup=False, soft_wrap=True)
    console.print("ok" if report.ok else "not ok: mend the errors above first")


def _suspects(report: Report) -> None:
    """Print the most suspect labels."""
    index = report.index
    for suspect in report.suspects.listed[:SUSPECTS] if report.suspects else ():
        place = f"{index.paths[suspect.row]} ({SPLITS[index.splits[suspect.row]]})"
        label = f"{index.classes[suspect.label]} {suspect.p_label:.1%}"
        rather = f"{index.classes[suspect.suggested]} {suspect.p_suggested:.1%}"
        console.print(f"suspect: {place}: {label}, rather {rather} (a probe says, not calibrated)", markup=False, soft_wrap=True)


def probe(results: ProbeResults) -> None:
    """Print a net at one size and crop a row, then the advice."""
    data, advice = results.data, advise(results)
    console.print(f"recognised: {data.index.recognised}", markup=False, soft_wrap=True)
    sample = f", a stratified sample of {data.available}" if len(data.rows) < data.available else ""
    groups = "" if data.groups is None else ", by whole groups"
    console.print(
        f"{len(data.rows)} images to learn from{sample}; top-1 in %, by {FOLDS}-fold cross-validation within them{groups}; "
        "the test split is not read",
        soft_wrap=True,
    )
    counts = [str(len(train_rows)) for train_rows in reversed(data.folds[0].train)]
    table = make_table("start", "px", "crop", *counts, "95 %", "ms", "GMAC")
    for result in results.results:
        whole = result.curve.accuracy()
        shares = (f"{100 * result.curve.accuracy(share).value:.1f}" for share in sorted(SHARES))
        mark = "*" * bool(result.trained_images)
        macs = "" if result.macs is None else f"{result.macs / 1e9:.2g}"
        interval = f"{100 * whole.low:.1f}-{100 * whole.high:.1f}"
        name = escape(result.candidate.name) + mark
        table.add_row(name, sides(result.size), f"{result.crop:.3g}", *shares, interval, f"{1000 * result.seconds:.1f}", macs)
    console.print(table)
    legend = f"{', '.join(counts)}: images that a fold learns from; ms: of one image in a batch, {results.device}, "
    legend += f"{results.threads} thread{'s' * (results.threads > 1)}"
    legend += "; *: was trained on the images" * any(result.trained_images > 0 for result in results.results)
    console.print(legend, soft_wrap=True)
    if data.scarce:
        console.print(f"{data.scarce} classes have too few images to hold one out: learned, never judged", soft_wrap=True)
    for note in results.notes:
        console.print(f"warning: {note}", markup=False, soft_wrap=True)
    best = advice.best
    console.print(
        f"best within the deployed net's cost: {best.candidate.name}, {sides(best.size)} px, crop {best.crop:.3g}. "
        "What limits it?",
        markup=False,
        soft_wrap=True,
    )
    for limit in advice.limits:
        answer = {True: "yes", False: "no", None: "?"}[limit.limiting]
        console.print(f"  {limit.what}: {answer}: {limit.text}", markup=False, soft_wrap=True)
    if advice.command:
        console.print(f"to go on:\n  {advice.command}", markup=False, soft_wrap=True)
    else:
        console.print("to go on, name the run or the weights: a bundle has nothing to train from")
    if advice.teacher is not None and advice.teacher_gain is not None:
        console.print(
            f"a teacher, {points(advice.teacher_gain)}; in the recipe's techniques section:\n  {advice.teacher_line}",
            markup=False,
            soft_wrap=True,
        )
    elif advice.larger:
        console.print("no teacher: of the nets that cost more none names more images rightly")


def forecast(costs: Forecast) -> None:
    table = make_table("what", "how much")
    table.add_row("images", ", ".join(f"{count} {split}" for split, count in costs.images.items()))
    table.add_row("steps", str(costs.steps))
    table.add_row("forwards per step", f"{costs.forwards:g}")
    table.add_row("parameters in training", f"{costs.parameters / 1e6:.2f} M")
    table.add_row("step", f"{1000 * costs.step_seconds:.0f} ms")
    table.add_row("all steps", f"{about(3600 * costs.hours)} without loading and validation")
    for part, seconds in costs.parts.items():
        table.add_row(part, about(seconds))
    table.add_row("all in all", f"{about(costs.seconds)}, from the start to the bundle")
    table.add_row("peak memory", f"{costs.peak_bytes / 2**30:.2f} GiB")
    console.print(table)
    for kind, forwards in costs.techniques.items():
        console.print(f"technique {kind}: adds {forwards} forwards a step", markup=False)
    for note in costs.notes:
        console.print(note, markup=False)


def estimate(todo: Estimate) -> None:
    """Print a trial a row."""
    budgets = list(dict.fromkeys(budget for _, budget in todo.epochs))
    table = make_table("trial", "epoch, s", "of the base's", *(f"epochs ({budget})" for budget in budgets))
    for name, cost in todo.costs.items():
        lengths = (str(todo.epochs[name, budget]) for budget in budgets)
        table.add_row(escape(name), f"{cost.epoch:.1f}", f"{cost.ratio:.2f}", *lengths)
    console.print(table)
    console.print(f"{todo.done} runs are done, {len(todo.cells)} to do: {about(3600 * todo.hours)} of training steps")
    console.print(
        "without validation, and without what techniques do between epochs; teachers are asked, whatever is cached"
    )
    for failure in todo.refused:
        console.print(f"refused: {failure.run}: {failure.reason}", markup=False, soft_wrap=True)


def scores(result: Evaluation) -> None:
    table = make_table(
        "split", "weights", "images", "top-1 %", "top-5 %", "macro F1 %", "balanced %", "ECE %", "loss"
    )
    s = result.scores
    shares = (f"{100 * share:.2f}" for share in (s.top1, s.top5, s.macro_f1, s.balanced_accuracy, s.ece))
    table.add_row(result.split, result.select, str(s.images), *shares, f"{s.loss:.4f}")
    console.print(table)
    if result.judged:
        console.print(result.judged, markup=False, soft_wrap=True)
    if (standing := result.over_floor) is not None:
        ways = f"; `fgvc export {result.run} --select floor` ships it" if standing.gain < 0 else ""
        console.print(f"{beside_floor(standing)}{ways}", markup=False, soft_wrap=True)
    pairs = s.confused(result.classes)[:CONFUSED]
    if pairs:
        table = make_table("most confused", "with", "times", "there", "back")
        for pair in pairs:
            table.add_row(*(str(value) for value in pair.values()))
        console.print(table)
    if result.calibrated is not None:
        print_calibration(result.calibrated.numbers(), result.calibrated.curve.area)
    elif result.split not in SPLITS:
        console.print("not calibrated: no temperature is fitted for averaged views")
    if result.stored:
        console.print(f"every class and pair: {result.run / 'tables'}", markup=False)
    for error in result.unreadable:
        console.print(f"skipped: {error}", markup=False, soft_wrap=True)


def interpolation(result: Interpolation) -> None:
    """Print a share a row, the chosen one marked."""
    table = make_table("share", "top-1 %", "macro F1 %", "balanced %", "calibration error %", "loss", "")
    for share, s in result.scores.items():
        shares = () if s is None else (s.top1, s.macro_f1, s.balanced_accuracy, s.ece)
        cells = ["no numbers", "", "", "", ""] if s is None else [*(f"{100 * score:.2f}" for score in shares), f"{s.loss:.4f}"]
        table.add_row(f"{share:g}", *cells, "chosen" if share == result.share else "")
    if result.scores:
        images = next(s.images for s in result.scores.values() if s is not None)
        console.print(f"validation, {images} images; 0: {result.run / 'ckpt' / 'start'}, 1: {result.select}", markup=False)
        console.print(table)
        why = f"the best {result.by} on validation, the smallest of equals: too good by the choice itself"
    else:
        why = "given; not scored"
    console.print(f"share {result.share:g} ({why})", markup=False, soft_wrap=True)
    if result.doubt is not None:
        console.print(f"warning: {result.doubt}", markup=False, soft_wrap=True)
    for error in result.unreadable:
        console.print(f"skipped: {error}", markup=False, soft_wrap=True)
    command = shlex.join(["fgvc", "export", str(result.out), "-o", f"{result.out}-bundle"])
    console.print(f"{result.out}: a run like others; next: {command}", markup=False, soft_wrap=True)


def localisation(result: Localisation) -> None:
    """Print a measure a row, a kind of map a column."""
    table = localisation_table(f"{result.split}.{result.select}.{result.method}", result.numbers())
    printed = make_table("in %", *COLUMNS)
    for text, cells in table.rows:
        printed.add_row(text, *cells)
    console.print(f"{table.title}: {table.about}")
    console.print(printed)
    for note in table.notes:
        console.print(note)
    if result.stored:
        console.print(f"every class and part: {result.run / 'tables'}", markup=False)
    for error in result.unreadable:
        console.print(f"skipped: {error}", markup=False, soft_wrap=True)


def print_calibration(numbers: Mapping[str, Any], area: float | None = None) -> None:
    """Print `numbers`, as of `Calibrated.numbers`. `area`: under the risk-coverage curve."""
    table = make_table("calibration", "result")
    origin = f"{numbers['temperature']:.3f}, fitted on {numbers['fitted_images']} {numbers['fitted_on']} images"
    words = filter(None, [origin if numbers["calibrated"] else "not calibrated", numbers["note"]])
    table.add_row("temperature", escape("; ".join(words)))
    before, after = (f"{100 * numbers[name]:.1f} %" for name in ("ece_before", "ece_after"))
    held_out = " (on images that it was not fitted on)"
    table.add_row("calibration error", f"{before}, with it {after}{held_out}" if numbers["calibrated"] else before)
    table.add_row("none of these", f"below {100 * numbers['threshold']:.1f} %" if numbers["threshold"] else "never")
    if numbers["threshold"]:
        share_kept = f"keeps {100 * numbers['kept']:.1f} % of the right answers"
        table.add_row("", f"{share_kept}; {100 * numbers['accuracy']:.1f} % of those given are right")
    if area is not None:
        table.add_row("risk-coverage area", f"{100 * area:.2f} %")
    console.print(table)


def accepted(title: str, files: Mapping[str, Accepted]) -> None:
    """Print what a stack's threshold accepts, a file a row."""
    table = make_table(title, "coverage", "precision")
    for name, row in files.items():
        table.add_row(name, *row.words)
    console.print(table)


def comparison(answers: PairedAnswers, failures: Sequence[str], stack_threshold: float | None = None) -> None:
    pair = answers.paired
    sides = (("A", answers.a, pair.a_right), ("B", answers.b, pair.b_right))
    rejecting = any(side.threshold for _, side, _ in sides)
    extra_columns = ("none of these", "right of those") if rejecting else ()
    table = make_table(f"{answers.split}: {pair.images} images", "top-1 %", "right", *extra_columns)
    for (name, side, right), counts in zip(sides, answers.rejections(), strict=True):
        rejected_cells = ([str(n) for n in counts] if side.threshold else ["", ""]) if rejecting else []
        table.add_row(escape(f"{name} {side.path}"), f"{100 * right.mean():.2f}", str(int(right.sum())), *rejected_cells)
    console.print(table)
    if answers.judged:
        console.print(answers.judged, markup=False, soft_wrap=True)
    if rejecting:
        console.print('gain, flips and gates are of the classes named, those that "none of these" holds back included')
    words = (f"{name} {calibration_word(side.calibrated)}" for name, side, _ in sides)
    console.print(f"probabilities: {', '.join(words)}")
    table = make_table("B against A", "result")
    low, high = 100 * pair.low, 100 * pair.high
    table.add_row("gain", f"{100 * pair.gain:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}")
    table.add_row("chance", f"p = {pair.p:.2g} (McNemar, exact)")
    share = 100 * pair.negative_flip_rate
    table.add_row("negative flips", f"{int(pair.negative.sum())} ({share:.2f} %): was right, now wrong")
    table.add_row("positive flips", f"{int(pair.positive.sum())}: was wrong, now right")
    console.print(table)
    if stack_threshold is not None:
        accepted(f"accepted from {stack_threshold:g} on", dict(zip("AB", answers.accepted(stack_threshold), strict=True)))
    changed = [row for row in pair.by_class(answers.classes) if row["change"]]
    if changed:
        table = make_table("most changed", "images", "A %", "B %", "change", "lost", "won")
        for row in sorted(changed, key=lambda row: -abs(row["change"]))[:CONFUSED]:
            shares = (f"{100 * row['a_recall']:.1f}", f"{100 * row['b_recall']:.1f}", f"{100 * row['change']:+.1f}")
            flips = str(row["negative_flips"]), str(row["positive_flips"])
            table.add_row(escape(row["class"]), str(row["images"]), *shares, *flips)
        console.print(table)
    for error in answers.unreadable:
        console.print(f"skipped: {error}", markup=False, soft_wrap=True)
    for note in answers.notes:
        console.print(f"warning: {note}", markup=False, soft_wrap=True)
    if answers.differences:
        console.print("B is not a drop-in for A; A's against B's:")
    for line in answers.differences:
        console.print(f"  {line}", markup=False, soft_wrap=True)
    for line in failures:
        console.print(f"FAIL: {line}", markup=False)
    if any("negative flips" in line for line in failures):
        console.print(answers.fewer_flips, markup=False, soft_wrap=True)


def verification(result: Comparison | WrittenComparison | Verification) -> None:
    if isinstance(result, Verification):
        for item in result.checks:
            mark = {True: "ok  ", False: "FAIL", None: "skip"}[item.passed]
            console.print(f"{mark} {item.name}: {item.detail}", markup=False)
        passed, failed = (sum(item.passed is value for item in result.checks) for value in (True, False))
        console.print(f"{passed} checks passed, {failed} failed")
        return
    if isinstance(result, WrittenComparison):
        for line in result.differences:
            console.print(line, markup=False, soft_wrap=True)
        verdict = f"written into it: {len(result.moved)} payloads of weights differ, and nothing else"
        console.print(f"{result.candidate} and {result.into}: " + (verdict if result.passed else "NOT one graph"), soft_wrap=True)
        return
    for difference in (*result.summary, *result.around.differences):
        console.print(str(difference), markup=False, soft_wrap=True)
    for rule, (ours, theirs) in result.spelling.items():
        console.print(f"written in another way: {rule} ({ours} here, {theirs} there)", markup=False, soft_wrap=True)
    for note in result.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    if result.around.unproved:
        console.print(result.around.unproved, markup=False, soft_wrap=True)
    console.print(f"{result.candidate} against {result.against}: {_verdict(result)}", markup=False, soft_wrap=True)


def _verdict(result: Comparison) -> str:
    graphs = "the graphs are identical" if result.verdict == "identical" else "the graphs are equal but for spelling"
    if result.drop_in:
        return f"a drop-in replacement: {graphs}, preprocessing and labels are the same"
    if result.passed:
        return f"{graphs}; whether it is a drop-in was not proved"
    parts = {
        "graph": result.verdict == "different",
        "spelling of the graph (--strict)": result.strict and result.verdict == "equal but for spelling",
        "preprocessing": result.around.preprocess == "other",
        "labels": result.around.labels == "other",
    }
    return f"NOT a drop-in: other {', '.join(part for part, differs in parts.items() if differs)}"


def ratios(measured: Sequence[Ratio]) -> None:
    table = make_table("ratio", "median", "95 % interval", "expected", "pairs", "seconds")
    for r in measured:
        seconds = f"{r.a_seconds:.3f} / {r.b_seconds:.3f}"
        expected = "" if r.expected is None else f"{r.expected:.3f}"
        table.add_row(r.name, f"{r.median:.3f}", f"{r.low:.3f} to {r.high:.3f}", expected, str(r.pairs), seconds)
    console.print(table)
