"""Printing of an export's proofs, calibration and judges, for the command line."""

from __future__ import annotations

from fgvc.api import Exported
from fgvc.cli.show import accepted, console, make_table, print_calibration
from fgvc.evaluation.calibration import FEWEST
from fgvc.studies.variants import SmallerFile


def contract(exported: Exported) -> None:
    numeric, behavioural, facts = exported.proven.numeric, exported.proven.behavioural, exported.proven.contract
    table = make_table("proof", "result")
    table.add_row(
        "numeric", f"fold {numeric.folded_float64:.1e} (float64), shipped {numeric.shipped_float32:.1e} (float32)"
    )
    if exported.proven.structural is not None:
        nodes = facts["proofs"]["structural"]["nodes"]
        table.add_row(
            "structural", f"{nodes} nodes, sha256 {exported.proven.structural.sha256[:16]} = the plain {facts['backbone']}'s"
        )
    if (written := exported.proven.written) is not None:
        what = "each message" if written.reencoded else "every byte"
        what = "each message, the shape of the output apart," if "last" in facts else what
        table.add_row("bytes", f"{what} but {len(written.moved)} payloads of weights is that of {facts['file']['name']}")
    table.add_row("behavioural", f"onnxruntime = torch on {behavioural.images} images, worst {behavioural.worst:.1e}")
    for smaller in exported.beside:
        table.add_row(smaller.variant_file.variant, _smaller_file(smaller))
    console.print(table)
    run_calibration = exported.calibration
    if run_calibration.calibration is None or run_calibration.calibration.images < FEWEST:
        console.print(f"not calibrated: {run_calibration.reason}", markup=False, soft_wrap=True)
    else:
        calibration = run_calibration.calibration
        print_calibration(calibration.model_dump() | {"calibrated": calibration.calibrated, "fitted_images": calibration.images})
    if exported.proven.written is not None and "last" not in facts:
        console.print(exported.temperature_words, markup=False, soft_wrap=True)
    if exported.stack is not None:
        accepted(f"accepted from {exported.stack.threshold:g} on", exported.stack.files)
        console.print(exported.stack.which, markup=False, soft_wrap=True)
    for warning in (*exported.proven.warnings, *(f"no {file}: it {why}" for file, why in exported.left_out.items())):
        console.print(f"warning: {warning}", markup=False)
    if exported.around is not None and exported.around.unproved:
        console.print(exported.around.unproved, markup=False, soft_wrap=True)
    graph = f"the graph of the plain {facts['backbone']}" if exported.proven.written is None else facts["file"]["name"]
    if exported.proven.written is not None:
        graph = f"{graph} with {len(exported.proven.written.moved)} of its tensors trained"
    elif exported.around is not None:
        graph = f"the graph of {exported.against}, {facts['verdict']}; whether it is a drop-in was not proved"
        if not exported.around.unproved:
            verdict = "the same" if facts["verdict"] == "identical" else f"{facts['verdict']} ({', '.join(facts['spelling'])})"
            graph = f"a drop-in replacement of {exported.against}: the graph is {verdict}, preprocessing and labels are the same"
            graph += f", {exported.around.answers}" if exported.around.answers else ""
    console.print(f"{exported.bundle}: {exported.select} weights, {graph}", markup=False, soft_wrap=True)
    if exported.judges:
        console.print(f"to be {exported.judges}: fgvc compare OLD {exported.bundle} --data SET", markup=False, soft_wrap=True)


def _smaller_file(smaller: SmallerFile) -> str:
    agreement, contract = smaller.agreement, smaller.variant_file.contract
    sizes = f"{contract['bytes'] / 1e6:.2f} of {contract['float_bytes'] / 1e6:.2f} MB"
    same = f"{100 * agreement.share:.2f} % ({100 * agreement.low:.1f} to {100 * agreement.high:.1f})"
    return (
        f"{sizes}; same answer for {same} of {agreement.images} {agreement.split} images, "
        f"top-1 {100 * agreement.top1:.2f} for {100 * agreement.top1_float:.2f} %"
    )
