"""Every kind of the base loss against loops in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from timm.loss import BinaryCrossEntropy
from torch import Tensor
from torch.nn import functional as F

from fgvc.config.loading import validate
from fgvc.config.models import Loss
from fgvc.config.recipe import Recipe
from fgvc.errors import FgvcError
from fgvc.models.loss import Criterion, cross_entropy, make_criterion
from fgvc.models.target import Target
from fgvc.runs.build import build_net, class_counts
from fgvc.runs.images import read_index

ROWS, CLASSES = 5, 4
WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 3.0])


def logits(scale: float = 3.0) -> Tensor:
    return scale * torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(0))


def targets() -> dict[str, Target]:
    rng = torch.Generator().manual_seed(1)
    y, other = (torch.randint(CLASSES, (ROWS,), generator=rng) for _ in range(2))
    other[0] = y[0]  # both halves of one class
    share, loose = torch.rand(2, ROWS, generator=rng)
    return {
        "hard": [(y, None)],
        "mixed": [(y, share), (other, 1 - share)],
        "snapmix": [(y, share), (other, loose), (y.flip(0), 0.4 + share)],  # sums from below to above one
    }


def expected(kind: str, z: Tensor, target: Target, e: float, gamma: float, weights: Tensor | None) -> float:
    """The loss by the docstring of `Criterion`, sample by sample."""
    total = 0.0
    for b in range(len(z)):
        row = [float(v) for v in z[b]]
        terms = []  # share w, smoothed one-hot, weight of the class
        for y, w in target:
            smooth = [(1 - e) * (k == int(y[b])) + e / CLASSES for k in range(CLASSES)]
            terms.append((1.0 if w is None else float(w[b]), smooth, 1.0 if weights is None else float(weights[y[b]])))
        log_sum = math.log(sum(math.exp(v) for v in row))
        mean = sum(w * c for w, _, c in terms) / sum(w for w, _, _ in terms)
        for k in range(CLASSES):
            log_p, p = row[k] - log_sum, 1 / (1 + math.exp(-row[k]))
            far = (1 - math.exp(log_p)) ** gamma if kind == "focal" else 1.0
            t = min(max(sum(w * s[k] for w, s, _ in terms), 0.0), 1.0)
            if kind == "bce":
                total -= mean * (t * math.log(p) + (1 - t) * math.log(1 - p))
            else:
                total -= sum(c * w * s[k] for w, s, c in terms) * far * log_p
    return total / len(z)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["even", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("target", targets())
@pytest.mark.parametrize(("kind", "gamma"), [("cross_entropy", 2.0), ("focal", 2.0), ("focal", 0.5), ("bce", 2.0)])
def test_the_loss_is_its_formula(
    kind: str, gamma: float, target: str, smoothing: float, weights: Tensor | None
) -> None:
    criterion = Criterion(kind, label_smoothing=smoothing, gamma=gamma, class_weights=weights)
    loss = float(criterion(logits(), targets()[target]))
    assert loss == pytest.approx(expected(kind, logits(), targets()[target], smoothing, gamma, weights), rel=1e-5)


def test_one_hard_target_of_plain_cross_entropy_is_torchs_bit_for_bit() -> None:
    y = targets()["hard"][0][0]
    for criterion in (Criterion(label_smoothing=0.1), make_criterion(Loss())):
        assert torch.equal(criterion(logits(), [(y, None)]), F.cross_entropy(logits(), y, label_smoothing=0.1))


def test_focal_without_gamma_is_cross_entropy() -> None:
    for target in targets().values():
        loss = Criterion("focal", gamma=0.0, label_smoothing=0.2)(logits(), target)
        torch.testing.assert_close(loss, cross_entropy(logits(), target, 0.2))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bce_is_timms_summed_over_the_classes(smoothing: float) -> None:
    y = targets()["hard"][0][0]
    timms = BinaryCrossEntropy(smoothing=smoothing, sum_classes=True)(logits(), y)
    torch.testing.assert_close(Criterion("bce", label_smoothing=smoothing)(logits(), [(y, None)]), timms)
    mean = BinaryCrossEntropy(smoothing=smoothing)(logits(), y)
    torch.testing.assert_close(timms, mean * CLASSES)


@pytest.mark.parametrize("kind", ["cross_entropy", "focal", "bce"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_sure_logits_give_numbers_and_slopes_in_any_precision(kind: str, gamma: float) -> None:
    y = torch.tensor([0, 1, 2, 3, 0])
    z = (1e4 * F.one_hot(y.roll(1), CLASSES)).float()
    z[0] = torch.tensor([1e4, 0, 0, 0])
    z.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = Criterion(kind, gamma=gamma, class_weights=WEIGHTS)(z.bfloat16(), [(y, None)])
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert z.grad.isfinite().all()
    assert z.grad.abs().max() > 0


def test_focal_is_safe_where_the_probability_is_one() -> None:
    z = torch.tensor([[200.0, 0, 0, 0]], requires_grad=True)
    Criterion("focal", gamma=0.5)(z, [(torch.tensor([0]), None)]).backward()
    assert torch.equal(z.grad, torch.zeros(1, 4))


def test_balanced_weights_have_mean_one_over_the_images() -> None:
    counts = np.array([10, 1, 4, 25])
    criterion = make_criterion(Loss(class_weights="balanced"), counts)
    assert criterion.class_weights.tolist() == pytest.approx([40 / (4 * n) for n in counts])
    assert float(criterion.class_weights @ torch.tensor(counts).float()) / 40 == pytest.approx(1)
    assert make_criterion(Loss(class_weights="balanced")).class_weights is None, "export knows no images"
    with pytest.raises(FgvcError, match=r"no training image of classes \[1\].*set it to none"):
        make_criterion(Loss(class_weights="balanced"), np.array([10, 0, 4, 25]))


def test_weights_of_classes_go_with_the_net_and_are_in_no_checkpoint(recipe_tree: dict) -> None:
    recipe = validate(Recipe, recipe_tree | {"loss": {"class_weights": "balanced"}}, where="test")
    index = read_index(recipe)
    assert class_counts(index).tolist() == [16, 16, 16]
    step = build_net(recipe, 3, counts=class_counts(index)).step
    assert step.criterion.class_weights.tolist() == [1, 1, 1]
    assert step.to("meta").criterion.class_weights.is_meta
    assert not [name for name in step.state_dict() if "criterion" in name]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"loss": {"class_weights": "balanced"}, "train": {"sampling": "balanced"}}, "favour rare classes twice"),
        ({"loss": {"kind": "focal"}, "techniques": {"similar_smoothing": {}}}, "set loss.kind to cross_entropy"),
        ({"loss": {"class_weights": "balanced"}, "techniques": {"similar_smoothing": {}}}, "class_weights to none"),
        ({"loss": {"kind": "focus"}}, "loss.kind"),
    ],
)
def test_what_does_not_go_together_is_refused(recipe_tree: dict, sections: dict, message: str) -> None:
    with pytest.raises(FgvcError, match=message):
        validate(Recipe, recipe_tree | sections, where="test")


def test_no_gamma_below_zero() -> None:
    with pytest.raises(ValidationError):
        Loss(gamma=-1)
