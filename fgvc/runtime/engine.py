"""Running a bundle's network on onnxruntime: images in, class probabilities out. The same code serves prediction, the server
and the export's own proof."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime

from fgvc.config.runtime import Calibration
from fgvc.errors import FgvcError, NoNumbersError
from fgvc.images.preprocess import preprocess
from fgvc.runtime.bundle import Bundle, Variant

if TYPE_CHECKING:
    from PIL import Image

NONE = "none of these"  # shown for an image whose best class is less probable than the bundle's threshold


@dataclass(frozen=True, slots=True)
class Prediction:
    """One class that an image may be of."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True, slots=True)
class Answer:
    """Classification of one image by a bundle."""

    predictions: tuple[Prediction, ...]  # the most probable classes, best first, whether rejected or not
    rejected: bool  # "none of these": the best is below the bundle's threshold
    calibrated: bool  # whether the probabilities are by a fitted temperature


def load_session(model: Path | bytes, *, threads: int | None = None) -> onnxruntime.InferenceSession:
    """Load any ONNX model on the CPU. `threads`: None for all the CPUs that this process may use. Raises FgvcError where
    onnxruntime can't."""
    options = onnxruntime.SessionOptions()
    # Left alone, onnxruntime takes the host's cores, whatever the container's limits are.
    options.intra_op_num_threads = threads or available_cpus()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    source = model if isinstance(model, bytes) else str(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has its own kinds, without a common base
        reason = (str(error).splitlines() or ["unknown reason"])[0]
        raise FgvcError(f"{_named(model)}: onnxruntime can't load it: {reason}") from error


def _named(model: Path | bytes) -> str:
    return "the model" if isinstance(model, bytes) else str(model)


class OnnxSession:
    """An ONNX classifier: one input (B,3,H,W) float32, the logits (B,K) its first output. Safe to share by threads."""

    def __init__(self, model: Path | bytes, *, threads: int | None = None) -> None:
        """Load a model. `threads`: None for all the CPUs that this process may use. Raises FgvcError for what is no
        such model."""
        self.threads: int = threads or available_cpus()
        self._session = load_session(model, threads=self.threads)
        where = _named(model)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type != "tensor(float)":
            raise FgvcError(f"{where}: expected one input (B,3,H,W) of float32")
        self.input: str = inputs[0].name
        self.outputs: list[str] = [output.name for output in outputs]
        self.shape: tuple[int | None, ...] = tuple(d if isinstance(d, int) else None for d in inputs[0].shape)

    def run(self, x: np.ndarray) -> tuple[np.ndarray, ...]:
        """Run the network: all outputs for x (B,3,H,W) float32, row by row; where the graph fixes its batch, in
        pieces of that size."""
        if any(fixed is not None and fixed != n for fixed, n in zip(self.shape[1:], x.shape[1:], strict=True)):
            raise FgvcError(f"the network takes images of shape {self.shape[1:]}, not {x.shape[1:]}")
        fixed = self.shape[0]
        if fixed is None:
            return tuple(self._session.run(self.outputs, {self.input: x}))
        pieces = []
        for start in range(0, len(x), fixed):
            piece = x[start : start + fixed]
            full = np.concatenate([piece, np.zeros((fixed - len(piece), *x.shape[1:]), x.dtype)])
            pieces.append([output[: len(piece)] for output in self._session.run(self.outputs, {self.input: full})])
        return tuple(np.concatenate(outputs) for outputs in zip(*pieces, strict=True))

    def logits(self, x: np.ndarray) -> np.ndarray:
        """Logits (B,K) float32 for x (B,3,H,W) float32."""
        return self.run(x)[0]


class Engine:
    """Classifier of images by a bundle's own network, preprocessing and labels."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None, variant: Variant = "float") -> None:
        """Load the network. Raises FgvcError where the bundle has no such variant, or it does not fit the size or the labels."""
        self.bundle = bundle
        model = bundle.variant(variant)
        self.session = OnnxSession(model, threads=threads)
        _, *image = self.session.shape
        size = bundle.preprocess.size
        if any(fixed is not None and fixed != n for fixed, n in zip(image, (3, *size), strict=True)):
            raise FgvcError(f"{model}: takes images of {image}, preprocess.json makes {(3, *size)}")
        warm = self.logits(np.zeros((1, 3, *size), np.float32))
        if warm.shape != (1, len(bundle.labels)):
            raise FgvcError(f"{model}: gives {warm.shape[1:]} logits for {len(bundle.labels)} labels")

    def logits(self, x: np.ndarray) -> np.ndarray:
        """Logits (B,K) float32 for preprocessed x (B,3,H,W) float32."""
        return self.session.logits(x)

    def classify(self, images: Sequence[Image.Image], *, top_k: int = 5) -> list[Answer]:
        """Classify RGB images: the `top_k` most probable classes of each, best first; equal ones in the labels' order.

        By the bundle's temperature and threshold, where it has them: an image may be of none of the classes. Raises FgvcError
        where the network gives logits that are no numbers.
        """
        if not images:
            return []
        x = np.stack([preprocess(image, self.bundle.preprocess) for image in images])
        return answers(self.bundle, self.logits(x), top_k=top_k)


def answers(bundle: Bundle, logits: np.ndarray, *, top_k: int = 5) -> list[Answer]:
    """Classifications from logits (B,K), by the bundle's labels and calibration; see `Engine.classify`."""
    refuse_no_numbers(logits, bundle.folder)
    calibration = bundle.calibration
    p = probabilities(logits, calibration)
    best = np.argsort(-p, axis=1, kind="stable")[:, :top_k]
    return [
        Answer(
            tuple(Prediction(bundle.labels[k], int(k), float(row[k])) for k in order),
            rejected=is_rejected(row, calibration),
            calibrated=is_calibrated(calibration),
        )
        for row, order in zip(p, best, strict=True)
    ]


def probabilities(logits: np.ndarray, calibration: Calibration | None) -> np.ndarray:
    """Probabilities p (B,K) float64 of logits (B,K), by the fitted temperature, where there is one."""
    return softmax(logits.astype(np.float64) / (calibration.temperature if calibration else 1.0))


def is_rejected(p: np.ndarray, calibration: Calibration | None) -> bool:
    """"None of these": whether the largest of p (K,) is below the threshold."""
    return calibration is not None and bool(p.max() < calibration.threshold)


def is_calibrated(calibration: Calibration | None) -> bool:
    return calibration is not None and calibration.calibrated


def calibration_word(calibrated: bool) -> str:
    """Words shown beside a probability."""
    return "calibrated" if calibrated else "not calibrated"


def softmax(z: np.ndarray) -> np.ndarray:
    """Softmax p (B,K) float64 of logits z (B,K)."""
    e = np.exp(z.astype(np.float64) - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def refuse_no_numbers(z: np.ndarray, where: Path) -> None:
    """Raise NoNumbersError where logits z (B,K) are not all finite: an arg-max would name a class all the same."""
    if not np.isfinite(z).all():
        raise NoNumbersError(f"{where}: gives logits that are no numbers (NaN or infinite); train or export it again")


def available_cpus(*, root: Path = Path("/")) -> int:
    """Number of CPUs that this process may really use: its affinity, cut by the quota of its control groups (versions 1 and 2).

    At least 1; a quota of 1.5 CPUs counts as 1, because a second thread would be throttled half of the time.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([affinity, *(int(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> list[float]:
    """CPUs allowed by each control group above this process: a limit may sit on any of them."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    quotas = []
    for line in lines:
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            mounts, read = [root / "sys/fs/cgroup"], _quota_v2
        elif "cpu" in controllers.split(","):
            mounts, read = [root / "sys/fs/cgroup" / name for name in dict.fromkeys((controllers, "cpu"))], _quota_v1
        else:
            continue
        names = [name for name in path.split("/") if name and name != ".."]
        # In a container the path may be the host's, of which only the top is mounted: every level that exists counts.
        folders = [mount.joinpath(*names[:depth]) for mount in mounts for depth in range(len(names) + 1)]
        quotas += [quota for folder in folders if (quota := read(folder)) is not None]
    return quotas


def _quota_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _quota_v1(folder: Path) -> float | None:
    try:
        files = (folder / f"cpu.cfs_{name}_us" for name in ("quota", "period"))
        quota, period = (int(file.read_text(encoding="utf-8")) for file in files)
        return quota / period if quota > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
