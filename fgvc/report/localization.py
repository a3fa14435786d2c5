"""Tables of localisation scores (`fgvc localize`), with the notes that a reader needs: on the terminal and in reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fgvc.errors import FgvcError
from fgvc.evaluation.localize import MAPS
from fgvc.runs.loaded import LoadedRun

COLUMNS = ("true class's map", "predicted class's", "middle", "chance")  # those of MAPS, and chance
MEASURES = {
    "gt_known_loc": "GT-known Loc", "top1_loc": "Top-1 Loc",
    "iou": "mean IoU", "giou": "mean GIoU", "diou": "mean DIoU", "ciou": "mean CIoU",
    "box_acc_v2": "BoxAccV2", "max_box_acc": "MaxBoxAcc (oracle)", "max_box_acc_v2": "MaxBoxAccV2 (oracle)",
    "max_box_acc_v2_30": "  IoU 0.3", "max_box_acc_v2_50": "  IoU 0.5", "max_box_acc_v2_70": "  IoU 0.7",
}  # fmt: skip

HALF_OPEN = (
    "MaxBoxAcc and V2 are 1 to 3 points below wsolevaluation's for the same maps: boxes are half-open here (a pixel smaller), at "
    "100 thresholds"
)


@dataclass(frozen=True, slots=True)
class Table:
    """Scores of one split, one selection of weights and one method; shares in per cent."""

    title: str
    about: str  # images, boxes and parts that were scored
    rows: tuple[tuple[str, tuple[str, ...]], ...]  # a measure, and a cell for each of COLUMNS
    notes: tuple[str, ...]


def localisation(run: LoadedRun) -> list[Table] | None:
    """Read the tables of `<run>/localisation.json`; None where there is no such file. Raises FgvcError where it is broken."""
    try:
        return [table(key, numbers) for key, numbers in run.measured("localisation.json").items()] or None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        path = run.folder / "localisation.json"
        raise FgvcError(f"{path}: not as fgvc wrote it ({error!r}); remove it and localize again") from error


def table(key: str, numbers: Mapping[str, Any]) -> Table:
    """Make the table of a key `<split>.<select>.<method>` and the numbers of a `fgvc.evaluation.localize.Localisation`."""
    split, select, method = key.split(".")
    boxes, parts = numbers["boxes"], numbers["parts"]
    rows = [
        (name, (*(f"{100 * boxes[of][measure]:.1f}" for of in MAPS), "")) for measure, name in MEASURES.items()
    ]  # fmt: skip
    if parts is not None:
        for chance, of_map, middle in zip(parts["uniform"], parts["map"], parts["centre"], strict=True):
            cells = (f"{100 * of_map:.1f}", "", f"{100 * middle:.1f}", f"{100 * chance:.1f}")
            rows.append((f"parts in the top {100 * chance:.0f} %", cells))
    objects, tau = f"{boxes['true']['images']} boxes", boxes["true"]["tau"]
    objects += ", no parts" if parts is None else f", {parts['visible']} parts"
    same = ": these very images" if split == numbers["chosen_from"] else ""
    notes = [
        "middle: a round map that knows no image; chance: any area of that size",
        "oracle: at the thresholds that suit the images best, as the papers define it",
        HALF_OPEN,
        f"the rest: at the threshold that was chosen on {numbers['chosen_from']} ({tau:.2f}; BoxAccV2: one an IoU){same}",
    ]
    if parts is None:
        notes.append("the data name no parts that can be seen: no coverage")
    if numbers["left_out"]:
        notes.append(f"left out: {numbers['left_out']} images without a box in what evaluation sees of them")
    if numbers["silent"]:
        notes.append(f"{numbers['silent']} maps are empty (flat, or nowhere above 0) and find nothing")
    return Table(
        title=f"{split}, {select}, {method}",
        about=f"{numbers['images']} images, top-1 {100 * numbers['top1']:.2f} %, {objects}",
        rows=tuple(rows),
        notes=tuple(notes),
    )
