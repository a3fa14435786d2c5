"""Running a classifier's file on onnxruntime: images in, class probabilities out. The same code serves prediction, the server,
the comparison and the export's own proof."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime

from fgvc.config.calibration import Calibration
from fgvc.config.images import Ending, NetworkFile, Preprocess
from fgvc.errors import FgvcError, NoNumbersError
from fgvc.images.address import picture
from fgvc.images.decode import decode
from fgvc.images.preprocess import keeps_pixels, preprocess
from fgvc.io.display import Display, figure
from fgvc.io.places import what_it_is
from fgvc.runtime.bundle import Bundle, Variant
from fgvc.runtime.description import Description, describe

if TYPE_CHECKING:
    from PIL import Image

NONE = "none of these"  # shown for an image whose best class is less probable than the bundle's threshold


@dataclass(frozen=True, slots=True)
class Prediction:
    """A class with its probability."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True, slots=True, repr=False)
class Answer(Display):
    """Classification of one image by a bundle."""

    predictions: tuple[Prediction, ...]  # the most probable classes, best first, whether rejected or not
    rejected: bool  # "none of these": the best is below the bundle's threshold
    calibrated: bool  # whether the probabilities are by a fitted temperature
    image: str = ""  # its path, or another name; empty: it was given without

    @property
    def label(self) -> str:
        """The most probable class, rejected or not."""
        return self.predictions[0].label

    @property
    def probability(self) -> float:
        """Probability of the most probable class."""
        return self.predictions[0].probability

    @property
    def facts(self) -> Mapping[str, object]:
        shares = {one.label: f"{100 * one.probability:.1f} %" for one in self.predictions}
        rejected = {"rejected": NONE} if self.rejected else {}
        return {"": self.image} | rejected | shares | {"probabilities": calibration_word(self.calibrated)}

    def _repr_html_(self) -> str:
        shares = [f"{one.label} {100 * one.probability:.1f} %" for one in self.predictions[:3]]
        best = f"{NONE} ({shares[0]})" if self.rejected else shares[0]
        caption = f"{best}, {calibration_word(self.calibrated)}; {'; '.join([*shares[1:], Path(self.image).name])}"
        return figure([picture(decode(Path(self.image)))] if Path(self.image).is_file() else [], caption)


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
        place = what_it_is(Path(source)) if isinstance(source, str) else ""
        reason = (str(error).splitlines() or ["unknown reason"])[0]
        raise FgvcError(f"{_named(model)}: onnxruntime can't load it: {reason}{place}") from error


def _named(model: Path | bytes) -> str:
    return "the model" if isinstance(model, bytes) else str(model)


class OnnxSession:
    """An ONNX classifier by whatever program: images (B,3,H,W) float32 in, logits (B,K) out. They are fed in the file's own
    layout and type, in pieces where its batch is fixed, and what it ends with is undone. Safe to share by threads."""

    def __init__(
        self, model: Path | bytes, *, threads: int | None = None, output: str | None = None, classes: int | None = None
    ) -> None:
        """Load a model. `threads`: None for all the CPUs that this process may use. `output`, `classes`: as of `describe`. Raises
        FgvcError for what is no such model."""
        self.threads: int = threads or available_cpus()
        self._session = load_session(model, threads=self.threads)
        self.file: Description = describe(model, output=output, classes=classes)
        self.input: str = self.file.input
        self.outputs: list[str] = [self.file.output, *self.file.others]
        self.shape: tuple[int | None, ...] = (self.file.batch, 3, self.file.height, self.file.width)

    def infer(self, fed: np.ndarray) -> list[np.ndarray]:
        """Run the file on `fed`, as `feed` makes it. Returns all outputs as the file gives them, that with the classes first, row
        by row."""
        fixed = self.file.batch
        if fixed is None:
            return self._session.run(self.outputs, {self.input: fed})
        pieces = []
        for start in range(0, len(fed), fixed):
            piece = fed[start : start + fixed]
            full = np.concatenate([piece, np.zeros((fixed - len(piece), *fed.shape[1:]), fed.dtype)])
            pieces.append([output[: len(piece)] for output in self._session.run(self.outputs, {self.input: full})])
        return [np.concatenate(outputs) for outputs in zip(*pieces, strict=True)]

    def scores(self, x: np.ndarray) -> np.ndarray:
        """The file's output for the classes, (B,K) float64, for x (B,3,H,W) float32: logits, or probabilities where it ends with
        these."""
        return self.infer(feed(x, self.file))[0].reshape(len(x), -1).astype(np.float64)

    def run(self, x: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return the logits (B,K) float32 for x (B,3,H,W) float32, and the other outputs as they are. Raises FgvcError for images
        of another size than the network takes."""
        if any(fixed is not None and fixed != n for fixed, n in zip(self.shape[1:], x.shape[1:], strict=True)):
            raise FgvcError(f"the network takes images of shape {self.shape[1:]}, not {x.shape[1:]}")
        scores, *others = self.infer(feed(x, self.file))
        return as_logits(scores, self.file.ending), *others

    def logits(self, x: np.ndarray) -> np.ndarray:
        """Logits (B,K) float32 for x (B,3,H,W) float32: see `as_logits`."""
        return self.run(x)[0]


def feed(x: np.ndarray, file: Description) -> np.ndarray:
    """Convert images x (B,3,H,W) float32 to the input of a file: its layout and type; for bytes they are rounded."""
    images = x if file.layout == "NCHW" else np.moveaxis(x, 1, 3)
    if file.dtype == "uint8":
        images = np.rint(images).clip(0, 255)
    return np.ascontiguousarray(images, dtype=file.dtype)


def as_logits(scores: np.ndarray, ending: Ending | None) -> np.ndarray:
    """Logits (B,K) float32 from which `probabilities` makes what a file gave, (B,K) or with axes of one: log-probabilities where
    it ends with a softmax, log p - log (1 - p) where with a sigmoid. A probability that was rounded to 0, or a sigmoid's to 1,
    counts as the nearest to it of its type."""
    scores = scores.reshape(len(scores), -1)
    if ending is None:
        return scores.astype(np.float32, copy=False)
    kind = np.finfo(scores.dtype)
    z = scores.astype(np.float64)
    least = float(kind.smallest_subnormal)
    if ending == "log_softmax":
        z = np.maximum(z, np.log(least))
    elif ending == "softmax":
        z = np.log(np.maximum(z, least))
    else:
        z = np.log(np.maximum(z, least)) - np.log(np.maximum(1 - z, float(kind.epsneg) / 2))
    return z.astype(np.float32)


def file_of(bundle: Bundle) -> Description:
    """Read what a bundle's model takes and gives. Raises FgvcError where it is no classifier's file."""
    network = bundle.preprocess.network
    return describe(bundle.model, output=None if network is None else network.output, classes=len(bundle.labels))


def session_of(bundle: Bundle, model: Path, *, threads: int | None = None) -> OnnxSession:
    """Load a file of a bundle. Raises FgvcError where it does not fit the bundle's preprocessing and labels."""
    network, spec = bundle.preprocess.network, bundle.preprocess
    output = None if network is None else network.output
    session = OnnxSession(model, threads=threads, output=output, classes=len(bundle.labels))
    refuse_misfit(session.file, spec, model=model, where=bundle.folder / "preprocess.json")
    warm = session.logits(np.zeros((1, 3, *spec.size), np.float32))
    if warm.shape != (1, len(bundle.labels)):
        raise FgvcError(f"{model}: gives {warm.shape[1:]} logits for {len(bundle.labels)} labels")
    return session


def refuse_misfit(file: Description, spec: Preprocess, *, model: Path, where: Path | str) -> None:
    """Raise FgvcError where a preprocessing, stated in `where`, does not make what a model takes: another size, or
    normalised pixels for one that takes bytes; and where it says other things of the model than its graph does."""
    takes, size = (file.height, file.width), spec.size
    if any(fixed is not None and fixed != n for fixed, n in zip(takes, size, strict=True)):
        raise FgvcError(f"{model}: takes images of {[3, *takes]}, {Path(where).name} makes {(3, *size)}")
    if file.dtype == "uint8" and not keeps_pixels(spec):
        steps = f" ({', '.join(file.in_graph)})" if file.in_graph else ""
        raise FgvcError(
            f"{where}: normalises pixels, but {model} takes them as bytes and does the rest by itself{steps}; so that nothing is "
            "done twice, state input_range 255, mean [0, 0, 0] and std [1, 1, 1]"
        )
    network = spec.network or NetworkFile()
    for key in ("layout", "dtype", "ending"):
        stated, read = getattr(network, key), getattr(file, key)
        if network.whole and stated != read:
            raise FgvcError(f"{where}: network.{key}: says {stated}, and the graph of {model} has {read}")


def doubts_about(file: Description, spec: Preprocess) -> list[str]:
    """Words on what a graph and the preprocessing before it may both do; none where all is well."""
    if file.mean is None or file.dtype == "uint8":
        return []
    white = 255 * keeps_pixels(spec) or int(keeps_pixels(spec, white=1))
    if white == file.white:
        return []
    return [
        f"the graph normalises by itself ({', '.join(file.in_graph)}), as for pixels from 0 to {file.white}; the preprocessing "
        f"before it (input_range {spec.input_range}, mean {spec.mean}, std {spec.std}) makes others: right only if the deployed "
        "stack does both"
    ]


class Engine:
    """Classifier of images by a bundle's own network, preprocessing and labels."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None, variant: Variant = "float") -> None:
        """Load the network. Raises FgvcError where the bundle has no such variant, or it does not fit the size or the labels."""
        self.bundle = bundle
        self.session = session_of(bundle, bundle.variant(variant), threads=threads)
        self.doubts = doubts_about(self.session.file, bundle.preprocess)

    def logits(self, x: np.ndarray) -> np.ndarray:
        """Logits (B,K) float32 for preprocessed x (B,3,H,W) float32."""
        return self.session.logits(x)

    @property
    def fed(self) -> Preprocess:
        """The bundle's preprocessing, with what its file takes and does by itself."""
        return self.bundle.preprocess.model_copy(update={"network": self.session.file.record})

    def answers(self, logits: np.ndarray, *, top_k: int = 5) -> list[Answer]:
        """Classifications from its logits (B,K); see `classify`."""
        return answers(self.bundle, logits, ending=self.session.file.ending, top_k=top_k)

    def classify(self, images: Sequence[Image.Image], *, top_k: int = 5) -> list[Answer]:
        """Classify RGB images: the `top_k` most probable classes of each, best first; equal ones in the labels' order.

        By the bundle's temperature and threshold, where it has them: an image may be of none of the classes. Raises FgvcError
        where the network gives logits that are no numbers.
        """
        if not images:
            return []
        x = np.stack([preprocess(image, self.bundle.preprocess) for image in images])
        return self.answers(self.logits(x), top_k=top_k)


def answers(bundle: Bundle, logits: np.ndarray, *, ending: Ending | None = None, top_k: int = 5) -> list[Answer]:
    """Classifications from logits (B,K), by the bundle's labels and calibration; see `Engine.classify`. `ending`: of the file
    that they are from."""
    refuse_no_numbers(logits, bundle.folder)
    calibration = bundle.calibration
    p = probabilities(logits, calibration, ending)
    best = np.argsort(-p, axis=1, kind="stable")[:, :top_k]
    return [
        Answer(
            tuple(Prediction(bundle.labels[k], int(k), float(row[k])) for k in order),
            rejected=is_rejected(row, calibration),
            calibrated=is_calibrated(calibration),
        )
        for row, order in zip(p, best, strict=True)
    ]


def probabilities(logits: np.ndarray, calibration: Calibration | None, ending: Ending | None = None) -> np.ndarray:
    """Probabilities p (B,K) float64 of logits (B,K), by the fitted temperature, where there is one. Those of a file that ends
    with a sigmoid are of each class against all others, and need not add up to 1."""
    z = logits.astype(np.float64) / (calibration.temperature if calibration else 1.0)
    return sigmoid(z) if ending == "sigmoid" else softmax(z)


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


def sigmoid(z: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-z)) in float64, without overflow."""
    return np.exp(-np.logaddexp(0, -z.astype(np.float64)))


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
