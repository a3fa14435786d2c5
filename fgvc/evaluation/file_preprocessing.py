"""Search for the preprocessing and the class order of a deployed file, by its answers about labelled images."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fgvc.config.data import AutoData
from fgvc.config.images import Preprocess
from fgvc.data.index import ImageIndex, decode_row
from fgvc.data.sources.auto import with_table
from fgvc.data.sources.read import read_source
from fgvc.errors import FgvcError, ImageError
from fgvc.evaluation.assignment import Order, cross_scored, log_probabilities, output_order
from fgvc.evaluation.preprocessing import (
    BATCH,
    COARSE,
    FEWEST_A_CLASS,
    IMAGES,
    NORMALISATIONS,
    SECONDS,
    Alternative,
    Search,
    likelier,
    sample_rows,
    search,
)
from fgvc.images.preprocess import described, preprocess
from fgvc.io.display import Display, table
from fgvc.io.files import StrPath
from fgvc.io.names import few, nearest
from fgvc.runtime.description import Description
from fgvc.runtime.engine import OnnxSession
from fgvc.runtime.labels import Labels, labels_of

MAX_PIXELS_HELD = 150_000_000  # of all images, which are kept decoded
BYTES = "0 to 255"  # the one normalisation of a file that takes whole numbers
TRUSTED_SHARE = 0.5  # share of right answers, in whatever order, from which an order is believed rather than what somebody states
UNASSIGNED = "?"  # in place of a class, for an output that is of none among the images


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class FileSearch(Display):
    """Preprocessing and labels of a deployed file, by its answers."""

    path: Path
    spec: Preprocess  # the likeliest, with what the file itself takes and does
    search: Search
    labels_source: str  # who states the order of the labels

    @property
    def decided(self) -> bool:
        """Whether the answers decide both the preprocessing and the order of the labels."""
        return not self.search.undecided and self.search.order.decided

    @property
    def order_holds(self) -> bool:
        """Whether the labels are in the stated order, or none is stated."""
        return not self.search.order.other

    @property
    def labels(self) -> tuple[str, ...]:
        """The class of each output, as the answers show; where they show none, the stated class, or UNASSIGNED."""
        order = self.search.order
        return order.stated if self.order_holds and order.stated else shown_labels(order)

    @property
    def doubts(self) -> tuple[str, ...]:
        """The settings of the preprocessing that these images leave undecided, a sentence each."""
        search = self.search
        return tuple(
            f"these images do not tell {other.factor.replace('_', ' ')} {search.best.value(other.factor)} from "
            f"{other.trial.value(other.factor)}, which could be worth {100 * other.worth:.1f} points at most: the former is "
            "taken; give a preprocess.json where pictures of another kind come"
            for other in search.undecided
        )

    def numbers(self) -> dict[str, Any]:
        """Values for JSON."""
        search, order = self.search, self.search.order
        return {
            "file": str(self.path),
            "preprocess": self.spec.model_dump(mode="json"),
            "decided": self.decided,
            "images": search.images, "classes": search.classes, "trials": search.trials, "seconds": round(search.seconds, 1),
            "loss": search.best.loss, "accuracy": search.best.accuracy,
            "alternatives": [
                {
                    "factor": other.factor, "value": other.trial.value(other.factor), "decided": other.decided,
                    "loss": other.trial.loss, "accuracy": other.trial.accuracy, "loss_difference": [other.low, other.high],
                    "most_accuracy_gained": other.worth, "preprocess": other.trial.spec.model_dump(mode="json"),
                }
                for other in search.alternatives
            ],
            "labels": {
                "stated_by": self.labels_source, "holds": self.order_holds, "decided": order.decided, "other": list(order.other),
                "assigned": list(order.assigned),
            },
        }  # fmt: skip

    def lines(self) -> list[str]:
        """Lines of text for the terminal."""
        search, best, order = self.search, self.search.best, self.search.order
        lines = [
            f"{self.path}: asked about {search.images} images of {search.classes} classes, {search.trials} preprocessings, "
            f"{search.seconds:.0f} s",
            f"likeliest: {described(self.spec)}: {100 * best.accuracy:.1f} % right, loss {best.loss:.3f}",
        ]
        lines += [_compared(other, best.value(other.factor)) for other in search.alternatives]
        if not order.stated:
            lines.append(f"labels: nothing states their order; by its answers: {few(self.labels)}")
        elif order.decided and not order.other:
            lines.append(f"labels: in the order of {self.labels_source}")
        else:
            places = {name: k for k, name in enumerate(order.stated)}
            shown = [f"{name} ({places.get(name, UNASSIGNED)} to {order.assigned.index(name)})" for name in order.other]
            doubt = "" if order.decided else " (too few images to be sure)"
            lines.append(
                f"labels: NOT in the order of {self.labels_source}{doubt}: {len(shown)} are others: {few(shown)}"
            )
        return lines

    @property
    def facts(self) -> Mapping[str, object]:
        right = f"{100 * self.search.best.accuracy:.1f} % right"
        return {"": self.path, "likeliest": f"{described(self.spec)}, {right}", "decided": self.decided}

    def _repr_html_(self) -> str:
        return table((line,) for line in self.lines())


def search_file(
    path: StrPath,
    images: StrPath,
    *,
    index: ImageIndex | None = None,
    table: StrPath | None = None,
    stated: Labels | None = None,
    size: tuple[int, int] | None = None,
    output: str | None = None,
    limit: int = IMAGES,
    given: Preprocess | None = None,
    seconds: float = SECONDS,
    progress: Callable[[str], None] = lambda line: None,
) -> FileSearch:
    """Find how a classifier's file is fed, by its answers about labelled images: a folder of classes, CUB's layout, a table.

    `index`: of these images, where they are listed already; `table`: of the labels of images in a folder; `stated`: the file's
    labels, where nothing in it or beside it states them; `size`: height and width where the file leaves them open; `limit`: most
    images; `given`: a preprocessing that is compared with the likeliest.

    Raises FgvcError for a file that is no classifier, or images without labels; and as `search` does.
    """
    path, images = Path(path), Path(images)
    session = OnnxSession(path, output=output)
    file = session.file
    if file.height is not None and file.width is not None:
        if size not in (None, (file.height, file.width)):
            raise FgvcError(f"--size: {path} takes images of {file.height} x {file.width} pixels alone; leave it out")
        size = file.height, file.width
    if size is None:
        raise FgvcError(f"{path}: takes images of any size: say which the deployed stack makes, --size HEIGHTxWIDTH")
    if index is None:
        data = AutoData(root=images, val_fraction=0.0)
        index = read_source(with_table(data, Path(table)) if table is not None else data)
    labels = stated or labels_of(path)
    count = session.logits(np.zeros((1, 3, *size), np.float32)).shape[1]
    if labels is not None:
        names, source = labels.names, labels.source
        if len(names) != count:
            raise FgvcError(
                f"{source}: names {len(names)} classes, and {path} has {count} outputs; mend it, or take it away"
            )
        if unknown := sorted(set(index.classes) - set(names)):
            near = nearest(unknown[0], names)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise FgvcError(f"{images}: {len(unknown)} classes are none of {source}: {few(unknown)}{hint}")
    else:
        names, source = (index.classes if len(index.classes) == count else ()), f"the classes of {images}"
    pictures, numbers = _pictures(index, limit)
    result = search(
        lambda x: log_probabilities(session.logits(x), session.file.ending), size, pictures, numbers, index.classes, stated=names,
        normalisations=_normalisations(file), given=given, seconds=seconds, progress=progress,
    )  # fmt: skip
    spec = result.best.spec.model_copy(update={"network": file.record})
    return FileSearch(path=path, spec=spec, search=result, labels_source=source)


def shown_labels(order: Order) -> tuple[str, ...]:
    """The class of each output, as the answers show; where they show none, the stated class, or UNASSIGNED."""
    stated = order.stated or (UNASSIGNED,) * len(order.assigned)
    free = [name for name in stated if name not in order.assigned]
    return tuple(
        name if name is not None else stated[k] if stated[k] in free else UNASSIGNED
        for k, name in enumerate(order.assigned)
    )


@dataclass(frozen=True, slots=True)
class StatedAnswers:
    """Test of a stated preprocessing by a file's answers about labelled images."""

    order: Order | None = None  # of its outputs where it is fed so; None: it does not know the images
    likelier: Preprocess | None = None  # by which it names more of them rightly, for certain; None: nothing denies what is stated
    words: str = ""  # how many by either


def ask_stated(
    path: Path, index: ImageIndex, *, spec: Preprocess, labels: Sequence[str] = (), seconds: float
) -> StatedAnswers:
    """Test whether a file is fed as stated by `spec`, by its answers about labelled images. `labels`: the class of each output,
    where these are stated, too; `seconds`: limit of the search for a likelier preprocessing. Where a class has too few images the
    result is empty."""
    session = OnnxSession(path, output=spec.output, classes=len(labels) or None)
    try:
        pictures, numbers = _pictures(index, min(IMAGES, max(COARSE, FEWEST_A_CLASS * len(index.classes))))
    except FgvcError:
        return StatedAnswers()
    names = _normalisations(session.file)
    pair = likelier(
        lambda x: log_probabilities(session.logits(x), session.file.ending), pictures, numbers, spec, normalisations=names,
        seconds=seconds,
    )  # fmt: skip
    order = _shown_order(session, pictures, numbers, index.classes, labels, spec)
    if pair is None:
        return StatedAnswers(order)
    given, best = pair
    stated, keys = given.spec.model_dump(), best.spec.model_dump()
    others = ", ".join(f"{key} {value} for {stated[key]}" for key, value in keys.items() if value != stated[key])
    words = (
        f"of {len(given.right)} images it names {100 * given.accuracy:.1f} % rightly where they are prepared as stated, and "
        f"{100 * best.accuracy:.1f} % with {others}"
    )
    return StatedAnswers(order, best.spec.model_copy(update={"network": session.file.record}), words)


def _shown_order(
    session: OnnxSession, pictures: Sequence[Image.Image], labels: NDArray[np.int64], classes: Sequence[str],
    stated: Sequence[str], spec: Preprocess,
) -> Order | None:
    """Order of the outputs; None where the net names no more than TRUSTED_SHARE of the images rightly, each by the order that the
    other half shows. `stated`: as of `Order`; where none are, the sorted classes if there are as many as outputs."""
    batches = (pictures[at : at + BATCH] for at in range(0, len(pictures), BATCH))
    logits = np.concatenate([session.logits(np.stack([preprocess(p, spec) for p in batch])) for batch in batches])
    answers = log_probabilities(logits, session.file.ending)
    if cross_scored(answers, labels)[1].mean() <= TRUSTED_SHARE:
        return None
    stated = stated or (classes if len(classes) == answers.shape[1] else ())
    return output_order(answers, labels, classes, stated)


def _normalisations(file: Description) -> tuple[str, ...]:
    return (BYTES,) if file.dtype == "uint8" else tuple(NORMALISATIONS)


def _pictures(index: ImageIndex, limit: int) -> tuple[list[Image.Image], NDArray[np.int64]]:
    """Decode up to `limit` images, as many of each class, and return them with their labels (N,); fewer where they are large.
    They are of train where that has enough images: those that a network has learned tell preprocessings apart best."""
    train = index.rows("train")
    rows = train if len(train) >= limit else np.arange(len(index))
    pictures, labels, pixels, unreadable = list[Image.Image](), list[int](), 0, 0
    for row in rows[sample_rows(index.labels[rows].astype(np.int64), limit)]:
        try:
            picture = decode_row(index, int(row))
        except ImageError:
            unreadable += 1
            continue
        pictures.append(picture)
        labels.append(int(index.labels[row]))
        pixels += picture.width * picture.height
        if pixels > MAX_PIXELS_HELD:
            break
    if unreadable:
        print(f"{unreadable} images can't be read, and are left out", file=sys.stderr)
    numbers = np.array(labels, dtype=np.int64)
    alone = np.isin(numbers, [k for k in np.unique(numbers) if np.count_nonzero(numbers == k) < 2])  # no half can tell
    return [picture for picture, left in zip(pictures, alone, strict=True) if not left], numbers[~alone]


def _compared(other: Alternative, best: object) -> str:
    value = other.trial.value(other.factor)
    name = other.factor.replace("_", " ")
    shown = (
        f"{name}: {best}, next {value}: {100 * other.trial.accuracy:.1f} %, loss {other.low:+.3f} to {other.high:+.3f}"
    )
    if other.decided:
        return shown
    word = "UNDECIDED" if other.undecided else "the likelier is taken"
    return f"{shown}: {word}; the other could be worth {100 * other.worth:.1f} points at most"
