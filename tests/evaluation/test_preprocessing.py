"""The search for a deployed network's preprocessing finds what was planted."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from fgvc.config.images import Preprocess
from fgvc.errors import FgvcError, UndecidedError
from fgvc.evaluation.assignment import assign, halved
from fgvc.evaluation.file_preprocessing import FileSearch, StatedAnswers
from fgvc.evaluation.file_stack import OtherOrderError, file_stack
from fgvc.evaluation.paired import mean_interval
from fgvc.evaluation.preprocessing import COARSE, FEWEST_A_CLASS, NORMALISATIONS, likelier, sample_rows, search
from fgvc.images.preprocess import preprocess

SIZE = (24, 24)
CLASSES = ("ash", "beech", "cherry", "oak", "rowan")


@cache
def pictures(each: int = 12) -> tuple[list[Image.Image], np.ndarray]:
    """Wide pictures of a blob whose place, colour and size are the class's, in an order of which each prefix is balanced."""
    random = np.random.default_rng(7)
    images, labels = [], []
    for n in range(each * len(CLASSES)):
        k = n % len(CLASSES)
        ground = random.integers(0, 80, 3) + np.array([60, 90, 20])
        image = Image.new("RGB", (66, 44), tuple(int(c) for c in ground))
        x, y, radius = 20 + 6 * k + random.integers(-2, 3), 14 + 4 * k + random.integers(-2, 3), 5 + k
        colour = tuple(
            int(c) for c in np.array([40 + 45 * k, 230 - 40 * k, 120 + 10 * k]) + random.integers(-15, 16, 3)
        )
        ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        images.append(image)
        labels.append(k)
    return images, np.array(labels)


def network(spec: Preprocess, order: tuple[int, ...] = (0, 1, 2, 3, 4)):
    """A classifier that has the pictures by heart, as `spec` makes them; output n is of class order[n]."""
    images, labels = pictures()
    x = np.stack([preprocess(image, spec) for image in images]).reshape(len(images), -1)
    x = x / np.abs(x).mean()
    scale = np.abs(np.stack([preprocess(image, spec) for image in images])).mean()

    def log_probabilities(batch: np.ndarray) -> np.ndarray:
        flat = batch.reshape(len(batch), -1) / scale
        distance = np.square(flat).sum(1)[:, None] - 2 * flat @ x.T + np.square(x).sum(1)
        near = np.stack([distance[:, labels == k].min(1) for k in order], axis=1).astype(np.float64)
        z = 6 * np.exp(-np.sqrt(np.maximum(near, 0)) / 12)
        z -= z.max(1, keepdims=True)
        return np.asarray(z - np.log(np.exp(z).sum(1, keepdims=True)))

    return log_probabilities


def planted(name: str, order: str = "rgb", **more: object) -> Preprocess:
    white, mean, std = NORMALISATIONS[name]
    turn = slice(None, None, 1 if order == "rgb" else -1)
    return Preprocess(
        size=SIZE, channel_order=order, input_range=white, mean=mean[turn], std=std[turn], **more
    )  # fmt: skip


@pytest.mark.parametrize(
    "spec",
    [
        planted(
            "0 to 255 less ImageNet's mean (Caffe's)", "bgr", resize="squash", crop_pct=1.0, interpolation="bilinear"
        ),
        planted("-1 to 1 (Inception's)", resize="crop", crop_pct=0.875, interpolation="bicubic"),
        planted("0 to 1", "bgr", resize="pad", crop_pct=1.0, fill=(114, 114, 114), interpolation="bilinear"),
        planted("ImageNet's mean and std", resize="crop", crop_pct=1.0, interpolation="nearest"),
    ],
    ids=["caffe-bgr-squash", "inception-crop", "unit-bgr-pad", "imagenet-nearest"],
)
def test_the_true_preprocessing_is_ranked_first(spec: Preprocess) -> None:
    images, labels = pictures()
    result = search(network(spec), SIZE, images, labels, CLASSES, stated=CLASSES, seconds=1e9)
    assert result.best.spec == spec
    assert not result.undecided
    assert result.order.holds
    losses = sorted(alternative.trial.loss for alternative in result.alternatives)
    assert result.best.loss < losses[0]


def test_a_wrong_order_of_labels_is_shown_and_does_not_disturb_the_ranking() -> None:
    images, labels = pictures()
    spec = planted("0 to 1", crop_pct=0.875, interpolation="bilinear")
    order = (0, 3, 2, 1, 4)
    result = search(network(spec, order), SIZE, images, labels, CLASSES, stated=CLASSES, seconds=1e9)
    assert result.best.spec == spec
    assert set(result.order.other) == {"beech", "oak"}
    assert not result.order.holds
    assert result.order.decided
    assert result.order.assigned == tuple(CLASSES[k] for k in order)


def test_square_pictures_do_not_tell_a_squash_from_a_crop() -> None:
    images, labels = pictures()
    square = [image.crop((11, 0, 55, 44)) for image in images]
    spec = planted("0 to 1", crop_pct=1.0, interpolation="bilinear")
    result = search(network(spec), SIZE, square, labels, CLASSES, seconds=1e9)
    assert "resize" in {alternative.factor for alternative in result.undecided}
    assert not result.refused  # whichever is taken, these are fed alike


def test_what_a_few_images_leave_open_more_are_asked_about() -> None:
    """However little time there is: two or three preprocessings are soon asked about. Of these images few are wide."""
    images, labels = pictures(40)
    spec = planted("0 to 1", crop_pct=1.0, interpolation="bilinear")
    mixed = [image if n >= 60 else image.crop((11, 0, 55, 44)) for n, image in enumerate(images)]
    mixed[:2] = images[:2]
    result = search(network(spec), SIZE, mixed, labels, CLASSES, stated=CLASSES, seconds=1e-9)
    assert result.images > 60
    assert not result.refused


def test_what_is_stated_is_not_left_open_by_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing states the labels, the file is asked for their order alone; where it does not know the images so, for all."""
    images, labels = pictures()
    spec = planted("0 to 1", crop_pct=1.0, interpolation="bilinear")
    found = search(network(spec), SIZE, images, labels, CLASSES, stated=CLASSES, seconds=1e9)
    open_ = replace(next(a for a in found.alternatives if a.factor == "resize"), low=-1.0, worth=0.5)
    asked = FileSearch(
        path=Path("deployed.onnx"), spec=spec, search=replace(found, alternatives=(open_,)), labels_source="the folder"
    )  # fmt: skip
    monkeypatch.setattr("fgvc.evaluation.file_stack.search_file", lambda *_, **__: asked)
    answers = StatedAnswers()
    monkeypatch.setattr("fgvc.evaluation.file_stack.ask_stated", lambda *_, **__: answers)
    stack = partial(file_stack, Path("deployed.onnx"), Path("set"), index=None, labels=None)  # type: ignore[arg-type]
    assert stack(preprocess=spec).labels == CLASSES
    assert stack(preprocess=spec).search is asked
    with pytest.raises(UndecidedError, match="do not tell how the file is fed"):
        stack(preprocess=None)
    answers = StatedAnswers(found.order)
    assert stack(preprocess=spec).labels == CLASSES
    assert stack(preprocess=spec).search is None
    answers = StatedAnswers(replace(found.order, assigned=CLASSES[::-1], other=CLASSES))
    with pytest.raises(OtherOrderError, match="in another order than that of the classes of set") as error:
        stack(preprocess=spec)
    assert error.value.labels == CLASSES[::-1]


@pytest.mark.parametrize(
    "changes", [{"channel_order": "bgr"}, {"resize": "squash"}, {"input_range": 255}], ids=["order", "resize", "range"]
)
def test_a_stated_preprocessing_is_denied_where_another_is_better_for_certain(changes: dict[str, object]) -> None:
    images, labels = pictures()
    spec = planted("0 to 1", resize="crop", crop_pct=0.875, interpolation="bilinear")
    assert likelier(network(spec), images, labels, spec, seconds=1e9) is None
    found = likelier(network(spec), images, labels, spec.model_copy(update=changes), seconds=1e9)
    assert found is not None
    stated, best = found
    assert best.spec == spec
    assert best.accuracy > stated.accuracy + 0.01
    assert likelier(network(spec), images, labels, spec.model_copy(update=changes), seconds=1e-9) is None, "no time"


def test_a_network_that_knows_nothing_denies_nothing() -> None:
    images, labels = pictures()
    spec = planted("0 to 1", resize="crop", crop_pct=0.875, interpolation="bilinear")
    assert likelier(lambda batch: np.full((len(batch), 5), -np.log(5)), images, labels, spec, seconds=1e9) is None


def test_a_network_that_knows_nothing_is_refused() -> None:
    images, labels = pictures()
    random = np.random.default_rng(0)

    def noise(batch: np.ndarray) -> np.ndarray:
        z = random.normal(size=(len(batch), 5))
        return np.asarray(z - np.log(np.exp(z).sum(1, keepdims=True)))

    with pytest.raises(FgvcError, match="does the network tell these classes apart"):
        search(noise, SIZE, images, labels, CLASSES, seconds=1e9)


def test_the_assignment_is_the_likeliest_of_all() -> None:
    from itertools import permutations

    random = np.random.default_rng(1)
    answers, labels = random.normal(size=(20, 4)), np.arange(20) % 4
    best = max(permutations(range(4)), key=lambda outputs: sum(answers[n, outputs[labels[n]]] for n in range(20)))
    assert assign(answers, labels) == dict(enumerate(best))


def test_halves_and_prefixes_are_balanced() -> None:
    labels = np.repeat([0, 1, 2], [8, 5, 3])
    rows = sample_rows(labels)
    assert set(labels[rows]) == {0, 1}
    assert sorted(labels[rows[:2]]) == [0, 1]
    first, second = halved(labels[rows])
    assert not (first & second).any()
    assert abs(int(first.sum()) - int(second.sum())) <= 2
    with pytest.raises(FgvcError, match="4 images or more"):
        sample_rows(np.array([0, 0, 0, 0, 1, 1, 1]))


def test_the_first_images_of_many_classes_are_enough_of_some() -> None:
    """An assignment needs images of a class in both halves: 50 classes are too many for the first round."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(50), 12))
    rows = sample_rows(labels)
    assert len(rows) == len(set(rows.tolist())) == 500
    assert set(np.unique(labels[rows[:COARSE]], return_counts=True)[1].tolist()) == {FEWEST_A_CLASS}
    assert set(np.unique(labels[rows], return_counts=True)[1].tolist()) == {10}


@pytest.mark.parametrize("seconds", [1e-9, 0.5, 2.0, 8.0])
def test_a_slow_network_is_asked_about_fewer_images(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there is time for, and each class in both halves: a clock that stands still but for the network."""
    images, labels = pictures(40)
    rows = sample_rows(labels, 200)
    spec, clock = planted("0 to 1", crop_pct=0.875, interpolation="bilinear"), [0.0]
    net = network(spec)

    def slow(batch: np.ndarray) -> np.ndarray:
        clock[0] += 0.001 * len(batch)
        return net(batch)

    monkeypatch.setattr("fgvc.evaluation.preprocessing.time.monotonic", lambda: clock[0])
    result = search(slow, SIZE, [images[row] for row in rows], labels[rows], CLASSES, stated=CLASSES, seconds=seconds)
    assert min(np.unique(result.labels, return_counts=True)[1]) >= 2
    assert result.best.spec == spec or seconds < 1
    assert None not in result.order.assigned  # of all classes, whatever the time
    assert result.images == {1e-9: 40, 8.0: 200}.get(seconds, result.images)


def test_no_image_is_asked_twice_under_one_preprocessing() -> None:
    images, labels = pictures(40)
    spec = planted("0 to 1", crop_pct=0.875, interpolation="bilinear")
    net, hashes = network(spec), []

    def counted(batch: np.ndarray) -> np.ndarray:
        hashes.extend(hash(x.tobytes()) for x in batch)
        return net(batch)

    result = search(counted, SIZE, images, labels, CLASSES, stated=CLASSES, seconds=1e9)
    assert result.images == 200
    assert result.best.spec == spec
    measured = 2 + 32  # to learn how long a batch takes
    assert len(hashes) <= measured + (result.trials - 15) * COARSE + 15 * 200


def test_the_interval_of_a_mean_is_scipys() -> None:
    from scipy.stats import ttest_1samp

    values = np.random.default_rng(2).normal(0.3, 1, 50)
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean_interval(values) == pytest.approx((expected.low, expected.high))
