"""Verbs on what ships: export with its proofs, and verification."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from fgvc.config.data import Split
from fgvc.config.exporting import BatchNorm, Export, Exporter
from fgvc.config.loading import validate
from fgvc.config.recipe import Selected
from fgvc.data.index import ImageIndex, spread
from fgvc.data.loader import evaluation_loader
from fgvc.data.unseen import judged
from fgvc.errors import FgvcError
from fgvc.evaluation.calibration import FEWEST, KEEP
from fgvc.evaluation.lone_file import by_its_answers
from fgvc.evaluation.stack_threshold import StackThreshold, measure_threshold, refuse_threshold
from fgvc.evaluation.temperature import RunCalibration, calibration, shipped_calibration
from fgvc.exporting.deployed import DeployedFile, WrittenComparison, compare_written
from fgvc.exporting.proofs import MAX_IMAGES
from fgvc.exporting.prove import Contract, PlainBackbone, ProvedExport
from fgvc.exporting.verify import Comparison, Verification, verify_bundle, verify_files
from fgvc.io.display import Display
from fgvc.io.files import StrPath, as_path
from fgvc.io.progress import ticking
from fgvc.report.exported import PAGE, export_page
from fgvc.runs.folder import read_run, recorded_classes, recorded_preprocess
from fgvc.runs.loaded import LoadedRun, load_run
from fgvc.runs.measured import store_measured
from fgvc.runs.trackers import log_bundle
from fgvc.runtime.bundle import JUDGE, load_bundle, refuse_target, write_bundle
from fgvc.runtime.engine import OnnxSession
from fgvc.runtime.stack import Agreement, Stack, agreement, stack_of
from fgvc.studies.variants import SmallerFile, Variants, left_out, make_variants


@dataclass(frozen=True, slots=True, repr=False)
class Exported(Display):
    """A written bundle, with its proofs, calibration and smaller files."""

    bundle: Path
    select: Selected
    proven: ProvedExport
    calibration: RunCalibration  # the run's; in the bundle where there are FEWEST images or more
    beside: tuple[SmallerFile, ...] = ()
    against: Path | None = None  # the deployed bundle or file that it was compared with
    around: Agreement | None = None  # of its preprocessing and labels with those of the deployed one
    left_out: Mapping[str, str] = field(default_factory=dict)  # wanted files that the opset does not allow, and why
    judges: str = ""  # which images judge it, in words, where it descends from a deployed file
    stack: StackThreshold | None = None  # None: no threshold was given

    @property
    def page_facts(self) -> list[tuple[str, str]]:
        """Rows (name, value) of what was written, for the page of an export into a deployed file."""
        contract, numeric, behavioural = self.proven.contract, self.proven.numeric, self.proven.behavioural
        moved = len(self.proven.written.moved) if self.proven.written is not None else 0
        return [
            ("bundle", str(self.bundle)), ("written into", contract["file"]["name"]), ("weights", self.select),
            ("images", f"to be {self.judges}" if self.judges else "no deployed file's unseen images are known"),
            ("bytes", f"{contract['proofs']['written']['outside']} but for {moved} payloads of weights"),
            ("fold", f"{numeric.folded_float64:.1e} apart in float64, {numeric.shipped_float32:.1e} as shipped"),
            ("onnxruntime", f"{behavioural.worst:.1e} from torch on {behavioural.images} images"),
            ("temperature", self.temperature_words),
        ]  # fmt: skip

    @property
    def temperature_words(self) -> str:
        """Say whether the run's temperature is in the last layer of the deployed file, and if not, why."""
        record = self.proven.contract["temperature"]
        if record["divided_by"] != 1:
            return f"its last layer is divided by {record['divided_by']:.3f}: {self.calibration.source}"
        note = "" if self.calibration.calibration is None else self.calibration.calibration.note
        reason = record["why_not"] or self.calibration.reason or note or "not asked for, or of no effect"
        return f"its last layer is not divided by one: {reason}"

    @property
    def facts(self) -> Mapping[str, object]:
        numeric, behavioural = self.proven.numeric, self.proven.behavioural
        proofs = {"numeric": f"shipped {numeric.shipped_float32:.1e} from the trained net"}
        if self.proven.structural is not None:
            proofs["structural"] = f"{self.proven.contract['backbone']}'s graph, sha256 {self.proven.structural.sha256[:16]}"
        proofs["behavioural"] = f"onnxruntime = torch on {behavioural.images} images, worst {behavioural.worst:.1e}"
        return {"": self.bundle, "weights": self.select, **proofs}

    def __fspath__(self) -> str:
        return str(self.bundle)


def export(
    run: StrPath,
    out: StrPath | None = None,
    *,
    against: StrPath | None = None,
    into: StrPath | None = None,
    labels: StrPath | None = None,
    preprocess: StrPath | None = None,
    select: Selected | None = None,
    keep: float = KEEP,
    overwrite: bool = False,
    variants: Variants | None = None,
    exporter: Exporter | None = None,
    opset: int | None = None,
    batch_norm: BatchNorm | None = None,
    root: StrPath | None = None,
    temperature: bool = True,
    stack_threshold: float | None = None,
) -> Exported:
    """Strip and fuse a run's weights, export them as ONNX, prove the contract and write the bundle.

    `out`: by default `bundle` in the run. A run of `model.onnx` is written into its deployed file: its own copy ("own", the
    default), or `into`, which may be another only in payloads; one of `model.backbone` is written into `into` where that file is
    this net. `against`: the deployed bundle or file that it must be a drop-in for: in its graph, and in how it is fed and read as
    far as that is known, by what lies beside the file or by what `labels` and `preprocess`, files as in a bundle, state of it.
    `keep`: share of the right answers that the threshold for "none of these" keeps, 1 for no threshold; it and the temperature
    are the run's own, see `fgvc.evaluation.temperature`, and checked on the exported file. `variants`: int8 and fp16 files to put
    beside it; one that the opset does not allow is left out. `exporter`, `opset`, `batch_norm`: others than the recipe's,
    where there is no deployed file. `root`: as in `evaluate`. `temperature`: whether the last layer of a deployed file is divided
    by the run's temperature, which leaves its answers; `stack_threshold`: a confidence at which coverage and precision of the old
    file and the new one are measured. Raises ProofError where a proof fails or no export is the deployed
    graph, FgvcError where the deployed stack is known to feed or to read its model otherwise, logits are no numbers, or a file
    that is looked at is not what it was; and writes no bundle.
    """
    folder, place = Path(run), Path(run, "bundle") if out is None else Path(out)
    refuse_target(place, overwrite=overwrite)
    refuse_threshold(stack_threshold)
    if not 0 < keep <= 1:
        raise FgvcError(f"--keep {keep:g}: a share above 0 and up to 1, such as {KEEP}")
    options = {"exporter": exporter, "opset": opset, "batch_norm": batch_norm}
    options = {key: value for key, value in options.items() if value is not None}
    _refuse_two_targets(against, into, options)
    if into is not None:
        _refuse_other_shape(folder)
    stated = as_path(against if into is None or into == "own" else into)
    deployed, around = _deployed_stack(folder, stated, labels=as_path(labels), preprocess=as_path(preprocess))
    loaded = load_run(folder, select, root=as_path(root))
    target = None if deployed is None else deployed.model
    with TemporaryDirectory(prefix="fgvc-export-") as scratch, ticking() as tick:
        tick("strip, fuse, export, prove", 0, 1)
        if stack_threshold is not None and loaded.recipe.model.onnx is None and into is None:
            raise FgvcError("--stack-threshold: is of a file that a run is written into; for all others compare has it")
        contract = _contract(loaded, options, target, into=into, against=against, scratch=Path(scratch))
        if deployed is not None and around is not None:
            around = by_its_answers(loaded, deployed, around, say=lambda line: print(line, file=sys.stderr))
        run_calibration = calibration(loaded, keep=keep)
        if temperature and isinstance(contract, DeployedFile) and contract.classes is None:
            contract = replace(contract, temperature=run_calibration.reliable)
        exported = _export(
            loaded, contract, place, stated, around, run_calibration, overwrite=overwrite, variants=variants,
            threshold=stack_threshold,
        )  # fmt: skip
    if exported.proven.written is not None:
        store_measured(loaded.folder, {PAGE: export_page(exported.page_facts, exported.stack)})
    return exported


def _contract(
    run: LoadedRun,
    options: Mapping[str, object],
    target: Path | None,
    *,
    into: StrPath | None,
    against: StrPath | None,
    scratch: Path,
) -> Contract:
    """What a run ships: timm's net, freshly exported with these options, or a deployed file. Raises FgvcError for options of the
    former where it is the latter."""
    if run.recipe.model.onnx is None and into is None:
        return _plain_backbone(run, _with_options(run.recipe.export, options), target)
    if options or against is not None:
        raise FgvcError(
            f"--exporter, --opset, --batch-norm and --against are of a fresh export, and {run.folder} is written into its "
            "deployed file; leave them out"
        )
    return _deployed_file(run, None if into == "own" else target, scratch)


def _refuse_other_shape(run: Path) -> None:
    if read_run(run).model.classes == "change":
        raise FgvcError(
            f"--into: {run} has a last layer of its own, for {len(recorded_classes(run))} classes (model.classes: change): the "
            "shape of the file's output changes, so that no stack takes it as it took the file. Leave --into out; that export "
            "says what changes"
        )


def _refuse_two_targets(against: object, into: object, options: Mapping[str, object]) -> None:
    if against is not None and options:
        raise FgvcError("--exporter, --opset, --batch-norm: the deployed file that --against names has its own; leave them out")
    if against is not None and into is not None:
        raise FgvcError("--against asks for a fresh export with the graph of a file, --into for that file: give one of the two")


def _plain_backbone(run: LoadedRun, export: Export, against: Path | None) -> PlainBackbone:
    model = run.recipe.model
    assert model.backbone is not None
    return PlainBackbone(
        backbone=model.backbone, num_classes=len(run.classes), kwargs=model.kwargs, size=run.recipe.image.size, export=export,
        against=against,
    )  # fmt: skip


def _deployed_file(run: LoadedRun, into: Path | None, scratch: Path) -> DeployedFile:
    """The contract of a run that is written into a file: its own copy, or `into`. Raises FgvcError where `into` is another graph,
    or missing for a run of a net of timm's."""
    model = run.recipe.model
    if model.onnx is None:
        if into is None:
            raise FgvcError(f"{run.folder}: is a run of {model.name}, which has no file of its own: name one, --into FILE")
        backbone = _plain_backbone(run, run.recipe.export, None)
        return DeployedFile(file=into, size=run.recipe.image.size, output=None, scratch=scratch, backbone=backbone)
    if model.classes == "change":
        return DeployedFile(
            file=model.onnx, size=run.recipe.image.size, output=model.output, scratch=scratch, classes=len(run.classes)
        )
    if into is not None and (differences := _written_differences(run, into)):
        raise FgvcError(
            f"{into}: is not the file that {run.folder} was trained from, whose copy is {model.onnx}, but for weights:\n  "
            + "\n  ".join(differences)
        )
    return DeployedFile(file=into or model.onnx, size=run.recipe.image.size, output=model.output, scratch=scratch)


def _written_differences(run: LoadedRun, into: Path) -> tuple[str, ...]:
    model = run.recipe.model
    assert model.onnx is not None
    return compare_written(into, model.onnx, size=run.recipe.image.size, output=model.output).differences


def _export(
    loaded: LoadedRun,
    contract: Contract,
    out: Path,
    against: Path | None,
    around: Agreement | None,
    run_calibration: RunCalibration,
    *,
    overwrite: bool,
    variants: Variants | None,
    threshold: float | None,
) -> Exported:
    """Prove a run by its contract, make what lies beside the model, and write the bundle."""
    index, select_name = loaded.index, loaded.select
    proven = contract.prove(loaded.step.net, _proof_images(loaded))
    session = OnnxSession(proven.source, output=loaded.preprocess.output, classes=len(index.classes))
    metrics, judges = loaded.measured("metrics.json"), _judge(index, table=loaded.recipe.data.kind == "csv")
    files: dict[str, Any] = {
        "model.onnx": proven.model,
        "labels.json": list(index.classes),
        "preprocess.json": loaded.preprocess.model_copy(update={"network": session.file.record}),
        "contract.json": dict(proven.contract) | {"deployed": around.numbers if around is not None else None},
        "metrics.json": {
            key.partition(".")[0]: row
            for key, row in sorted(metrics.items())
            if key in (f"val.{select_name}", f"test.{select_name}")
        }
        | judges.metrics,
        **judges.files,
    }
    if proven.explain is not None:
        files["explain.onnx"] = proven.explain
    shipped = shipped_calibration(loaded, run_calibration, session, divided_by=proven.divided_by)
    if shipped is not None and shipped.images >= FEWEST:
        files["calibration.json"] = shipped
    stack = None if threshold is None else _stack_threshold(loaded, contract, session, threshold, divided_by=proven.divided_by)
    files["metrics.json"] |= {} if stack is None else {"stack_threshold": stack.numbers()}
    beside = make_variants(loaded, proven, session, variants or Variants(), shipped)
    files |= {smaller.file: smaller.variant_file.model for smaller in beside}
    files["contract.json"] |= {smaller.variant_file.variant: smaller.section for smaller in beside}
    if omitted := left_out(proven, variants or Variants()):
        files["contract.json"] |= {"left_out": omitted}
    write_bundle(out, files=files, data=proven.data, overwrite=overwrite)
    log_bundle(loaded.folder, loaded.recipe, out, say=lambda line: print(line, file=sys.stderr))
    words = judged(index, "test", len(index.rows("test")))
    return Exported(out, select_name, proven, run_calibration, tuple(beside), against, around, omitted, words, stack)


DRAWN = "the test split that fgvc drew"
LISTED = "the test split of its table"


@dataclass(frozen=True, slots=True)
class _Judge:
    """What the bundle records of the images that judge it; empty where the folder of these images itself has them as its test
    split."""

    metrics: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)


def _judge(index: ImageIndex, *, table: bool) -> _Judge:
    """Make the record of the images that judge. `table`: whether the splits are those of a table, which whoever has the images
    may not have."""
    rows = index.rows("test")
    if not len(rows) or (not index.unseen and not table and "test" in index.given_splits):
        return _Judge()
    which = index.unseen or (LISTED if "test" in index.given_splits else DRAWN)
    metrics = {"judge": {"split": "test", "images": len(rows), "which": f"unseen images of {which}"}}
    if index.contents is not None:  # in tables: no paths that another set could have
        return _Judge(metrics)
    images = {str(index.paths[row]): index.classes[index.labels[row]] for row in rows}
    return _Judge(metrics, {JUDGE: {"unseen": which, "images": images}})


def _stack_threshold(
    run: LoadedRun, contract: Contract, session: OnnxSession, threshold: float, *, divided_by: float
) -> StackThreshold:
    """What a threshold accepts of the deployed file, and of what is written into it (`session`). Raises FgvcError where these
    have other classes."""
    assert isinstance(contract, DeployedFile)
    if contract.classes is not None:
        raise FgvcError("--stack-threshold: model.classes: change: the deployed file knows other classes, and is no comparison")
    return measure_threshold(run, contract.file, session, threshold, divided_by=divided_by)


def _with_options(export: Export, options: Mapping[str, object]) -> Export:
    return validate(Export, export.model_dump() | dict(options), where="fgvc export")


def _deployed_stack(
    run: Path, against: Path | None, *, labels: Path | None, preprocess: Path | None
) -> tuple[Stack | None, Agreement | None]:
    """Find the deployed file with what is around it, and compare its preprocessing and labels with the run's. Raises FgvcError
    where they differ: before the net is opened, and the long work of an export."""
    if against is None:
        if labels is not None or preprocess is not None:
            raise FgvcError(
                "--labels and --preprocess tell how a deployed model is read and fed: name it with --against or --into"
            )
        return None, None
    read_run(run)
    deployed = stack_of(against, labels=labels, preprocess=preprocess)
    stack = Stack(path=run, preprocess=recorded_preprocess(run), labels=recorded_classes(run))
    stack_agreement = agreement(stack, deployed)
    if stack_agreement.differences:
        raise FgvcError(
            f"{run} is not a drop-in for {against}, the run's against the deployed:\n  "
            + "\n  ".join(stack_agreement.differences)
            + "\nTrain it as it will be fed and read (the recipe's deploy section, image.size and deploy.labels), or deploy the "
            "bundle with a preprocessing and labels of its own: export without --against"
        )
    return deployed, stack_agreement


def verify(
    path: StrPath,
    *,
    against: StrPath | None = None,
    into: StrPath | None = None,
    labels: StrPath | None = None,
    preprocess: StrPath | None = None,
    strict: bool = False,
) -> Comparison | WrittenComparison | Verification:
    """Compare a bundle or an .onnx file with the deployed one (`against`: their graphs; `into`: their bytes, which may differ in
    weights alone), or prove a bundle again. `passed`: all is well. `labels`, `preprocess`: of `against`, where that is a file and
    has none beside it; `strict`: graphs that are equal but for spelling don't pass."""
    file = Path(path)
    if strict and against is None:
        raise FgvcError("--strict is of two graphs: name the deployed one with --against")
    if into is not None:
        if against is not None or labels is not None or preprocess is not None:
            raise FgvcError("--into compares bytes alone: give it without --against, --labels and --preprocess")
        output = load_bundle(file).contract.get("output", {}).get("name") if file.is_dir() else None
        return compare_written(file, Path(into), output=output)
    if against is not None:
        return verify_files(file, Path(against), labels=as_path(labels), preprocess=as_path(preprocess), strict=strict)
    if labels is not None or preprocess is not None:
        raise FgvcError("--labels and --preprocess tell how a deployed model is read and fed: name it with --against")
    if file.is_dir():
        return verify_bundle(file)
    raise FgvcError(f"{file}: compare it with what? Give --against deployed.onnx, or a bundle instead of a file")


def _proof_images(run: LoadedRun) -> Iterable[np.ndarray]:
    """Yield up to 256 validation images, spread over the classes; training images where none of those can be read."""
    splits: tuple[Split, ...] = ("val", "train")
    for split in splits:
        rows, last = run.rows(split), split == splits[-1]
        any_read, some = False, spread(rows, MAX_IMAGES)
        for batch in evaluation_loader(run.index, some, spec=run.preprocess, batch_size=32, workers=0, some=last, what="proofs"):
            any_read = True
            yield batch.images.numpy()
        if any_read:
            return
