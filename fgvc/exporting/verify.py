"""Checks of files alone: one ONNX file against another, and a bundle against its contract."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fgvc.errors import FgvcError
from fgvc.exporting.canonical import canonicalise
from fgvc.exporting.changed import shape_free_sha256
from fgvc.exporting.deployed import as_plain
from fgvc.exporting.difference import Difference, notes, shortest_account
from fgvc.exporting.into import skeleton
from fgvc.exporting.onnx import Interface, load_onnx
from fgvc.exporting.proofs import compare_structure
from fgvc.exporting.reference import Plain, independent_plain, versions
from fgvc.exporting.spelling import CANONICAL, Verdict, compare_spelling
from fgvc.exporting.summary import summary
from fgvc.exporting.variant import differences, structure
from fgvc.io.display import Display, table
from fgvc.models.onnxnet.net import open_onnx
from fgvc.runtime.bundle import DEPLOYED_FILE, OTHER_CLASSES, Bundle, load_bundle
from fgvc.runtime.engine import Engine
from fgvc.runtime.stack import Agreement, agreement, stack_of


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Comparison(Display):
    """Comparison of a file with the deployed one that it is to replace. Notes are differences that do not matter."""

    candidate: Path
    against: Path
    differences: tuple[Difference, ...]  # of the graphs, rules of spelling applied; empty: they are equal
    summary: tuple[str, ...]  # the same in few lines
    spelling: Mapping[str, tuple[int, int]]  # rules without which they are not equal, and how often each applied to either
    notes: tuple[str, ...]
    around: Agreement  # of preprocessing and labels
    strict: bool = False  # whether only identical graphs pass

    @property
    def verdict(self) -> Verdict:
        """Degree of equality of the two graphs."""
        return "different" if self.differences else "equal but for spelling" if self.spelling else "identical"

    @property
    def passed(self) -> bool:
        """Whether nothing is known to differ."""
        same = self.verdict == "identical" or (self.verdict != "different" and not self.strict)
        return same and not self.around.differences

    @property
    def drop_in(self) -> bool:
        """Whether all is known to be the same: graph, preprocessing and labels."""
        return self.passed and not self.around.unproved

    @property
    def facts(self) -> Mapping[str, object]:
        proved = "a drop-in" if self.drop_in else "passed" if self.passed else "NOT a drop-in"
        return {"": self.candidate, "against": self.against, "graphs": self.verdict, "verdict": proved}

    def _repr_html_(self) -> str:
        return table([*self.facts.items(), *((line,) for line in (*self.summary, *self.around.differences, *self.notes))])


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Result of one proof that was repeated."""

    name: str
    passed: bool | None  # None: could not be made here
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Verification(Display):
    """Results of all proofs of a bundle, repeated; it has passed where none failed."""

    folder: Path
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed is not False for check in self.checks)

    @property
    def facts(self) -> Mapping[str, object]:
        return {"": self.folder, "checks": len(self.checks), "verdict": "passed" if self.passed else "FAILED"}

    def _repr_html_(self) -> str:
        marks = {True: "ok", False: "FAIL", None: "skip"}
        return table((marks[check.passed], check.name, check.detail) for check in self.checks)


def verify_files(
    candidate: Path, against: Path, *, labels: Path | None = None, preprocess: Path | None = None, strict: bool = False
) -> Comparison:
    """Compare two bundles or .onnx files: their graphs in canonical form and, unless `strict`, by the rules of spelling
    (`fgvc.exporting.spelling`); and their preprocessing and labels as far as known.

    Every floating-point initializer of rank >= 1 counts as a weight. `labels`, `preprocess`: of `against`, where it has none.
    """
    ours, theirs = stack_of(candidate), stack_of(against, labels=labels, preprocess=preprocess)
    graphs = load_onnx(ours.model), load_onnx(theirs.model)
    spelling = compare_spelling(*graphs)
    differences: tuple[Difference, ...] = ()
    lines: list[str] = []
    if spelling.forms:
        differences = shortest_account(spelling.forms)
        lines = summary(differences)
    return Comparison(
        candidate=candidate,
        against=against,
        differences=differences,
        summary=tuple(lines),
        spelling=spelling.rules,
        notes=tuple(notes(*graphs)),
        around=agreement(ours, theirs),
        strict=strict,
    )


def verify_bundle(folder: Path) -> Verification:
    """Check a bundle: its bytes against its manifest, its graph against its contract's hash and, where the versions that made it
    are installed, against a new independent plain model.

    Raises FgvcError where the bundle can't be loaded at all, a changed byte among the reasons.
    """
    bundle = load_bundle(folder)
    contract = bundle.contract
    if contract.get("contract") in (DEPLOYED_FILE, OTHER_CLASSES):
        return Verification(folder=folder, checks=tuple(_written_checks(bundle)))
    if contract.get("canonical", 1) not in (1, CANONICAL):
        raise FgvcError(
            f"{folder / 'contract.json'}: canonical: {contract['canonical']}, of a later version of fgvc; verify it with that one"
        )
    try:
        stored, then = str(contract["sha256"]), dict(contract["versions"])
        positions = frozenset(int(k) for k in contract["weights"])
        recipe = {key: contract[key] for key in ("backbone", "num_classes", "kwargs", "exporter")}
        fields = dict(contract["interface"])
        fields["axes"] = {int(dim): str(name) for dim, name in fields["axes"].items()}
        interface = Interface(**fields | {key: tuple(fields[key]) for key in ("size", "output_names")})
        at_export = _at_export(contract)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FgvcError(f"{folder / 'contract.json'}: not a contract of this version of fgvc ({error!r})") from error
    proto = load_onnx(bundle.model)
    sha256 = canonicalise(proto, weights=positions).sha256
    Engine(bundle)
    checks = [
        Check(name="manifest", passed=True, detail=f"{len(bundle.files)} files are those that were exported"),
        Check(name="loads", passed=True, detail="onnxruntime runs the model at the bundle's size, with its labels"),
        Check(name="contract", passed=sha256 == stored, detail=f"structure {sha256[:16]}, in the contract {stored[:16]}"),
        *at_export,
    ]
    now = versions()
    shaping = ("torch", "timm", "onnx", "onnxscript")
    mismatches = [f"{name} {now[name]}, was {then.get(name)}" for name in shaping if then.get(name) != now[name]]
    reference: Plain | None = None
    if mismatches:
        checks.append(Check(name="independent plain", passed=None, detail=f"not compared: {'; '.join(mismatches)}"))
    else:
        plain_proto, expected = independent_plain(**recipe, interface=interface)
        reference = Plain(plain_proto, expected, interface.size)
        structural = compare_structure(proto, plain_proto, expected)
        lines = [str(difference) for difference in structural.differences]
        if expected != positions:
            lines.append("the contract counts other initializers as weights")
        plain = f"a plain {recipe['backbone']}, made anew, has the same graph"
        checks.append(Check(name="independent plain", passed=not lines, detail="; ".join(lines) or plain))
    exported = Plain(proto, positions, interface.size)
    same_tool = now["onnxruntime"] == then.get("onnxruntime")  # its quantiser shapes these graphs
    for variant in ("int8", "fp16"):
        if f"model.{variant}.onnx" in bundle.files:
            checks.append(_variant(bundle, variant, exported, reference if same_tool else None))
    return Verification(folder=folder, checks=tuple(checks))


def _at_export(contract: Mapping[str, Any]) -> list[Check]:
    """The verdict on the deployed file that the graph was compared with; none of canonical 1, or where there was no such file."""
    if contract.get("canonical", 1) == 1 or not contract["against"]:
        return []
    verdict, rules = contract["verdict"], ", ".join(contract["spelling"])
    detail = f"when exported, the graph was {verdict}" + (f" ({rules})" if rules else "") + f"; {contract['against'][:16]}"
    return [Check(name="deployed file", passed=verdict in ("identical", "equal but for spelling"), detail=detail)]


def _written_checks(bundle: Bundle) -> Iterator[Check]:
    """Checks of a bundle that was written into a deployed file: all of its bytes but the listed payloads are the file's."""
    contract = bundle.contract
    try:
        file, moved = contract["file"], [str(name) for name in contract["moved"]]
        outside, parsed = str(file["outside_sha256"]), bool(contract["reencoded"])
        whole, name, others = str(file["skeleton_sha256"]), str(file["name"]), len(contract["kept"])
        last, output = list(map(str, contract.get("last", ()))), str(contract["output"]["name"])
    except (KeyError, TypeError, ValueError) as error:
        raise FgvcError(f"{bundle.folder / 'contract.json'}: not a contract of this version of fgvc ({error!r})") from error
    yield Check(name="manifest", passed=True, detail=f"{len(bundle.files)} files are those that were exported")
    Engine(bundle)
    yield Check(name="loads", passed=True, detail="onnxruntime runs the model at the bundle's size, with its labels")
    mine = shape_free_sha256(bundle.model, moved, last, output) if last else skeleton(bundle.model, moved, parsed=parsed)
    same = mine == outside and (parsed or skeleton(bundle.model) == whole)
    what = "each message" if parsed else "every byte"
    what = "each message, the shape of the output apart," if last else what
    detail = f"{what} but the {len(moved)} payloads that moved is that of {name} ({outside[:16]}); {others} weights did not move"
    if not same:
        detail = f"{mine[:16]} without the {len(moved)} payloads that moved, {outside[:16]} in {name}: more than weights differ"
    yield Check(name="written into", passed=same, detail=detail)
    variants: tuple[Literal["int8", "fp16"], ...] = ("int8", "fp16")
    for variant in variants:
        if f"model.{variant}.onnx" in bundle.files:
            net = open_onnx(bundle.model, bundle.preprocess.size, output=contract["output"]["name"])
            yield _variant(bundle, variant, as_plain(bundle.model, net), None)


def _variant(bundle: Bundle, variant: Literal["int8", "fp16"], exported: Plain, reference: Plain | None) -> Check:
    """Check whether a smaller file runs, is the graph that its contract names and, with `reference`, what a plain model becomes.

    Its agreement needs the images: only what was measured at export is repeated.
    """
    Engine(bundle, variant=variant)
    proto, contract = load_onnx(bundle.variant(variant)), bundle.contract.get(variant, {})
    try:
        stored, measured = str(contract["sha256"]), contract["agreement"]
        share, images, bar = float(measured["share"]), int(measured["images"]), float(measured["bars"]["agreement"])
    except (KeyError, TypeError, ValueError) as error:
        return Check(name=variant, passed=False, detail=f"contract.json has no entry for it ({error!r})")
    sha256 = structure(proto, exported).sha256
    faults = [] if sha256 == stored else [f"structure {sha256[:16]}, in the contract {stored[:16]}"]
    if reference is not None:
        faults += differences(variant, proto, exported, reference, contract)
    if share < bar:
        faults.append(f"agrees on {100 * share:.2f} % of the images, below its bar of {100 * bar:g} %")
    again = "as a plain model's becomes" if reference is not None else "not compared with a plain model's (versions)"
    fine = (
        f"structure {sha256[:16]}, {again}; at export {100 * share:.2f} % of {images} images had the float file's answer"
    )
    return Check(name=variant, passed=not faults, detail="; ".join(faults) or fine)
