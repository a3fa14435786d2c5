"""Choice of exporter, operator set, norms and names under which a net's export is the graph of a deployed file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import onnx
from torch import nn

from fgvc.config.exporting import BatchNorm, Exporter
from fgvc.errors import FgvcError, ProofError
from fgvc.exporting.difference import shortest_account
from fgvc.exporting.onnx import Interface, export_onnx, interface_of, load_onnx
from fgvc.exporting.reference import versions
from fgvc.exporting.spelling import Spelling, Verdict, compare_spelling
from fgvc.exporting.summary import NORM, summary
from fgvc.exporting.ties import nudged
from fgvc.models.backbone import deployed


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A way to export a net, and to write its graph, so that it is that of the deployed file."""

    interface: Interface
    exporter: Exporter
    target: onnx.ModelProto | None = None  # the deployed file
    verdict: Verdict = "identical"  # with the target; without one, with the independent plain net
    spelling: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # rules, and how often each applied to either


def fit(plain: nn.Module, against: Path, *, size: tuple[int, int], num_classes: int) -> Fit:
    """Choose the exporter, operator set, norms and names under which `plain` becomes the graph of a deployed file: an identical
    one if there is one, else one that is equal but for spelling.

    Raises FgvcError where the file is no classifier of this size and these classes; ProofError where nothing fits, with the few
    lines of the nearest and the other way.
    """
    target, where = load_onnx(against), str(against)
    try:
        stated, classes, exporters = interface_of(target, where=where)
    except FgvcError as error:
        raise FgvcError(f"{error}\n{_other_way(where)}") from error
    height, width = (have or want for have, want in zip(stated.size, size, strict=True))  # 0: dynamic
    if (height, width) != size:
        recipe = f"{size[0]}x{size[1]}"
        raise FgvcError(f"{where} takes images of {height}x{width}, the recipe's are {recipe}; set image.size")
    if classes != num_classes:
        raise FgvcError(f"{where} has {classes} classes, the recipe's data has {num_classes}")
    kept = any(node.op_type == NORM for node in target.graph.node)
    norms: Sequence[BatchNorm] = ("keep", "fold") if kept else ("fold",)
    others: list[tuple[Fit, Spelling]] = []
    failed: list[str] = []
    for exporter, norm in ((exporter, norm) for norm in norms for exporter in exporters):
        chosen = replace(stated, size=size, batch_norm=norm)
        # Ties would look like differences here, so they are broken first; what ships is judged by its own proof.
        try:
            proto = export_onnx(deployed(nudged(plain)[0]), exporter=exporter, **asdict(chosen))
        except FgvcError as error:  # the other exporter may have made the file
            failed.append(str(error).partition("\n")[0])
            continue
        spelling = compare_spelling(proto, target)
        made = Fit(
            interface=chosen, exporter=exporter, target=target, verdict=spelling.verdict, spelling=spelling.rules
        )
        if spelling.verdict == "identical":
            return made
        others.append((made, spelling))
    if equal := next((made for made, spelling in others if spelling.verdict != "different"), None):
        return equal
    raise ProofError(_unfit(where, others, failed, stated.opset))


def _unfit(where: str, tried: Sequence[tuple[Fit, Spelling]], failed: Sequence[str], opset: int) -> str:
    """The message where no way fits: the shortest list of differences, and the other way to export."""
    torch = f"torch {versions()['torch']}"
    if not tried:
        reasons = failed or [f"{torch} does not write opset {opset}"]
        return "\n  ".join([f"no drop-in of {where} can be made:", *reasons]) + f"\n{_other_way(where)}"
    accounts = [(made, shortest_account(spelling.forms)) for made, spelling in tried]
    nearest, differences = min(accounts, key=lambda account: len(account[1]))
    title = (
        f"the export is no drop-in replacement of {where}; nearest with the {nearest.exporter} exporter of {torch} and "
        f"export.batch_norm: {nearest.interface.batch_norm}:"
    )
    return "\n  ".join([title, *summary(differences)]) + f"\n{_other_way(where)}"


def _other_way(where: str) -> str:
    return (
        f"Write into its own tensors instead: fgvc export RUN -o OUT --into {where} where it is this net, or train from it with "
        f"model.onnx={where}"
    )
