"""What a teacher is given: the student's pixels, at its own size, as its own normalisation makes them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from fgvc.config.images import Preprocess
from fgvc.errors import FgvcError
from fgvc.images.preprocess import normalise
from fgvc.techniques.teacher import Teacher, TeacherOutput, conversion, digest, in_order, teacher_output

SPECS = [
    Preprocess(size=(8, 8)),
    Preprocess(size=(8, 8), mean=(0.1, 0.5, 0.9), std=(0.5, 0.25, 1.0), channel_order="bgr"),
    Preprocess(size=(8, 8), mean=(10, 20, 30), std=(50, 60, 70), input_range=255),
    Preprocess(size=(8, 8), mean=(0, 0, 0), std=(1, 1, 1), input_range=255, channel_order="bgr"),
]


class Recorder:
    """A teacher's forward that keeps its inputs."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []

    def __call__(self, x: Tensor) -> TeacherOutput:
        self.inputs.append(x)
        return TeacherOutput(x.mean((2, 3)), None)


def teacher(answer: Recorder, size: tuple[int, int] | None, convert=lambda x: x) -> Teacher:
    return Teacher(name="t", forward=answer, size=size, channels=None, convert=convert)


@pytest.mark.parametrize(("student", "own"), list(itertools.product(SPECS, SPECS)))
def test_conversion_gives_what_the_teachers_own_preprocessing_would(student: Preprocess, own: Preprocess) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    x, expected = (torch.from_numpy(normalise(pixels, spec)) for spec in (student, own))
    converted = conversion(student, own)(x)
    torch.testing.assert_close(converted, expected, rtol=1e-4, atol=1e-4)
    assert (converted is x) == (student is own)


def test_a_larger_teacher_sees_the_render_of_the_same_crop() -> None:
    x, render, answer = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 20, 20), Recorder()
    teacher(answer, (16, 16), lambda x: 2 * x + 1)(x, render)
    expected = 2 * F.interpolate(render, (16, 16), mode="bicubic", antialias=True) + 1
    torch.testing.assert_close(answer.inputs[0], expected, rtol=0, atol=0)


def test_where_pixels_changed_their_own_are_resized() -> None:
    x, answer = torch.randn(2, 3, 8, 8), Recorder()
    teacher(answer, (16, 16))(x)
    torch.testing.assert_close(answer.inputs[0], F.interpolate(x, (16, 16), mode="bicubic", antialias=True))


@pytest.mark.parametrize("size", [None, (8, 8)])
def test_at_the_students_size_it_sees_the_very_pixels(size: tuple[int, int] | None) -> None:
    x, answer = torch.randn(2, 3, 8, 8), Recorder()
    teacher(answer, size)(x, torch.randn(2, 3, 20, 20))
    assert answer.inputs[0] is x


def test_a_render_of_its_size_is_not_resampled() -> None:
    x, render, answer = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 16, 16), Recorder()
    teacher(answer, (16, 16))(x, render)
    assert answer.inputs[0] is render


def test_it_answers_in_float32_without_gradient_and_is_left_as_it_was() -> None:
    net = timm.create_model("test_resnet", num_classes=4).train()
    net.get_submodule("layer1").eval()
    modes = [module.training for module in net.modules()]
    before = {key: value.clone() for key, value in net.state_dict().items()}
    one = Teacher(name="t", forward=lambda x: teacher_output(net, x, maps=True), size=None, channels=1, convert=lambda x: x)
    with torch.autocast("cpu", torch.bfloat16):
        answer = one(torch.randn(3, 3, 32, 32, requires_grad=True))
    assert answer.logits.dtype == answer.features.dtype == torch.float32
    assert not answer.logits.requires_grad
    assert not answer.features.requires_grad
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())


def test_classes_in_another_order_are_found() -> None:
    assert in_order(("c", "a", "b"), ("a", "b", "c"), where="run") == [1, 2, 0]


@pytest.mark.parametrize(
    ("theirs", "differences"),
    [
        (("a", "b"), "it lacks 'c', 'd', 'e' and 1 more. "),
        (("a", "b", "c", "d", "e", "f", "g"), "it has besides 'g'. "),
        (("a", "b", "c", "d", "e", "x"), "it lacks 'f'; it has besides 'x'. "),
    ],
)
def test_other_classes_are_refused_with_the_first_differences(theirs: tuple[str, ...], differences: str) -> None:
    with pytest.raises(FgvcError, match=f"run: its {len(theirs)} classes are not this run's 6: {differences}"):
        in_order(theirs, ("a", "b", "c", "d", "e", "f"), where="run")


def test_the_digest_knows_weights_and_what_is_said_beside_them() -> None:
    net = timm.create_model("test_resnet", num_classes=4)
    first = digest(net, "a")
    assert digest(net, "a") == first != digest(net, "b")
    with torch.no_grad():
        net.fc.bias[0] += 1
    assert digest(net, "a") != first
