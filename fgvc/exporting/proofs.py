"""The three proofs of an export: numeric, structural and behavioural (docs/design.md)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import onnx
import torch
from torch import nn

from fgvc.errors import FgvcError
from fgvc.exporting.canonical import Merged, canonicalise, shared_initializers
from fgvc.exporting.difference import Difference, compare_graphs
from fgvc.models.backbone import memory_format
from fgvc.runtime.engine import OnnxSession

FOLD_TOLERANCE = 1e-9  # float64, relative to max |logit|
SHIPPED_TOLERANCE = 1e-4  # float32, relative to max |logit|
ONNX_TOLERANCE = 1e-4  # per logit, relative to max(1, |logit|)
BATCH_TOLERANCE = 1e-5
MAX_IMAGES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Numeric:
    """Numeric proof: the trained net with its branches, in float64, against the plain one; max |difference| / max |logit|."""

    folded_float64: float
    shipped_float32: float
    images: int
    bar: float = SHIPPED_TOLERANCE  # of what ships

    @property
    def passed(self) -> bool:
        return self.folded_float64 <= FOLD_TOLERANCE and self.shipped_float32 <= self.bar

    @property
    def failure(self) -> str:
        """Message for a proof that did not pass."""
        return (
            "the plain network does not compute what the trained one does: relative to max |logit| the folded state "
            f"differs by {self.folded_float64:.2g} in float64 (at most {FOLD_TOLERANCE:g}) and by "
            f"{self.shipped_float32:.2g} as shipped (at most {self.bar:g}). Something that acts in eval mode "
            "was not folded, or the weights are far out of scale"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Structural:
    """Structural proof: the canonical hash against the independent plain model's, and where the two graphs differ."""

    sha256: str
    reference_sha256: str
    differences: tuple[Difference, ...] = ()
    merged: tuple[Merged, ...] = ()  # what the exporter merged or dropped because of equal or zero weights

    @property
    def passed(self) -> bool:
        return self.sha256 == self.reference_sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement:
    """An image for which onnxruntime and torch predict different classes."""

    image: int
    torch_class: int
    onnx_class: int
    margin: float  # between torch's two best logits
    excused: bool  # the margin is within twice the tolerance


@dataclass(frozen=True, slots=True, kw_only=True)
class Behavioural:
    """Behavioural proof: onnxruntime against torch on real images. `worst`: max |difference| / max(1, |logit|), or of a deployed
    file over the largest answer."""

    images: int
    worst: float
    worst_batch: float | None  # the same, batch 1 against batch 8; None where the batch is fixed or there is one image
    disagreements: tuple[Disagreement, ...]
    bar: float = ONNX_TOLERANCE

    @property
    def passed(self) -> bool:
        batches = self.worst_batch is None or self.worst_batch <= self.batch_bar
        return batches and self.worst <= self.bar and all(d.excused for d in self.disagreements)

    @property
    def batch_bar(self) -> float:
        """The largest difference allowed between an image alone and the same image in a batch."""
        return BATCH_TOLERANCE * self.bar / ONNX_TOLERANCE

    @property
    def failure(self) -> str:
        """Message for a proof that did not pass."""
        lines = [
            f"onnxruntime does not compute what torch does: the answers to {self.images} images differ by up to "
            f"{self.worst:.2g}, relative to the answers (at most {self.bar:g})"
        ]
        if self.worst_batch is not None:
            lines.append(f"batch 1 and batch 8 differ by {self.worst_batch:.2g} (at most {self.batch_bar:g})")
        lines += [
            f"image {d.image}: class {d.onnx_class} in onnxruntime, {d.torch_class} in torch, by a margin of {d.margin:.2g}"
            for d in self.disagreements
            if not d.excused
        ][:10]
        return "\n  ".join(lines)


def compare_numbers(
    trained: nn.Module, exact: nn.Module, shipped: nn.Module, x: np.ndarray, *, bar: float = SHIPPED_TOLERANCE
) -> Numeric:
    """Numeric proof. `trained` and `exact` are float64, `shipped` float32, all in eval mode; x (B,3,H,W) float32."""
    images = torch.from_numpy(x)
    threads = torch.get_num_threads()
    # torch splits a grouped float64 convolution into one small job a group: with threads lite0 takes 20 s, not 0.4.
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            z = trained(images.double())
            scale = float(z.abs().max().clamp_min(1e-30))
            folded = float((exact(images.double()) - z).abs().max()) / scale
            float32 = float((shipped(images).double() - z).abs().max()) / scale
    finally:
        torch.set_num_threads(threads)
    return Numeric(folded_float64=folded, shipped_float32=float32, images=len(x), bar=bar)


def compare_structure(candidate: onnx.ModelProto, reference: onnx.ModelProto, positions: frozenset[int]) -> Structural:
    """Structural proof; `positions`: of the weights among the canonical initializers."""
    ours, theirs = (canonicalise(model, weights=positions) for model in (candidate, reference))
    if ours.sha256 == theirs.sha256:
        return Structural(sha256=ours.sha256, reference_sha256=theirs.sha256)
    # Where positions have shifted they point at other tensors: to list what differs, all weights are left out.
    blank, plain = (canonicalise(model, weights=None) for model in (candidate, reference))
    return Structural(
        sha256=ours.sha256,
        reference_sha256=theirs.sha256,
        differences=tuple(compare_graphs(blank, plain) or compare_graphs(ours, theirs)),
        merged=tuple(shared_initializers(blank, plain)),
    )


def compare_behaviour(model: bytes, shipped: nn.Module, images: Iterable[np.ndarray]) -> Behavioural:
    """Behavioural proof, on at most 256 images in batches (B,3,H,W) float32."""
    session = OnnxSession(model, threads=torch.get_num_threads())
    layout = memory_format(shipped)  # twice as fast for depthwise convolutions
    shipped = copy.deepcopy(shipped).to(memory_format=layout)
    count, worst, disagreements = 0, 0.0, list[Disagreement]()
    worst_batch: float | None = None
    for batch in images:
        x = np.ascontiguousarray(batch[: MAX_IMAGES - count], dtype=np.float32)
        with torch.no_grad():
            expected = shipped(torch.from_numpy(x).contiguous(memory_format=layout)).numpy()
        logits = session.logits(x)
        worst = float(np.maximum(worst, largest_error(logits, expected)))  # unlike max(), never loses a NaN
        disagreements += differing_rows(logits, expected, count)
        if session.shape[0] is None and len(x) > 1 and worst_batch is None:
            together = session.logits(x[:8])
            alone = np.concatenate([session.logits(x[k : k + 1]) for k in range(len(together))])
            worst_batch = largest_error(alone, together)
        count += len(x)
        if count >= MAX_IMAGES:
            break
    return Behavioural(images=count, worst=worst, worst_batch=worst_batch, disagreements=tuple(disagreements))


def largest_error(a: np.ndarray, b: np.ndarray) -> float:
    """Largest |a - b| / max(1, |b|); NaN if there is one."""
    return float((np.abs(a.astype(np.float64) - b) / np.maximum(1.0, np.abs(b))).max())


def differing_rows(
    answers: np.ndarray, expected: np.ndarray, first: int, *, bar: float | None = None
) -> Iterator[Disagreement]:
    """Rows (B,K) whose best class is another, the first of them the image number `first`. One is excused where the margin is
    within twice `bar`; default: ONNX_TOLERANCE of max(1, |logit|)."""
    for row in np.flatnonzero(answers.argmax(1) != expected.argmax(1)):
        second, best = np.sort(expected[row].astype(np.float64))[-2:]
        margin = best - second
        yield Disagreement(
            image=first + int(row),
            torch_class=int(expected[row].argmax()),
            onnx_class=int(answers[row].argmax()),
            margin=float(margin),
            excused=bool(margin <= 2 * (ONNX_TOLERANCE * max(1.0, abs(best)) if bar is None else bar)),
        )


def peek(images: Iterable[np.ndarray]) -> tuple[np.ndarray, Iterable[np.ndarray]]:
    """Read up to 8 images of the first batch that is not empty; returns them, and all batches. Raises FgvcError where there is
    none."""
    batches = iter(images)
    first = next((batch for batch in batches if len(batch)), None)
    if first is None:
        raise FgvcError("no images to prove the export on: give it validation or training images")
    first = np.ascontiguousarray(first, dtype=np.float32)
    return first[:8], chain([first], batches)
