"""The fitted head: against scikit-learn's own pipeline, and in a net."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fgvc.errors import FgvcError
from fgvc.models.probe import STRENGTHS, _held_out_losses, fit_probe, linear_head, put_head, zero_head


def blobs(classes: int, *, images: int = 40, width: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, width))
    labels = np.repeat(np.arange(classes), images)
    scale = np.array([1, 10, 0.1, 3, 0.5, 2])[:width]
    return ((centres[labels] + rng.normal(size=(len(labels), width))) * scale + 5).astype(np.float32), labels


@pytest.mark.parametrize("classes", [2, 5])
def test_equals_standardised_logistic_regression(classes: int) -> None:
    x, y = blobs(classes)
    x = x / x.std(axis=0) * np.array([1, 1.5, 0.8, 1, 1, 2], np.float32)  # no spread below the floor
    probe = fit_probe(x, y, classes=classes, strengths=(0.1,))
    z = torch.from_numpy(probe.logits(x)).double()
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000, tol=1e-8)).fit(x.astype(float), y)
    np.testing.assert_allclose(z.softmax(1).numpy(), reference.predict_proba(x.astype(float)), atol=2e-3)


def test_a_class_without_images_is_never_the_answer() -> None:
    x, y = blobs(4)
    labels = np.array([0, 2, 3, 5])[y]
    z = fit_probe(x, labels, classes=7, strengths=(0.1,)).logits(x)
    assert z.shape == (len(x), 7)
    assert set(z.argmax(1)) <= {0, 2, 3, 5}
    assert np.isfinite(z).all()
    assert (z[:, [1, 4, 6]].max(1) <= z[:, [0, 2, 3, 5]].max(1)).all()


def test_the_penalty_follows_the_data() -> None:
    x, y = blobs(5, images=200)
    clear = fit_probe(x, y, classes=5)
    noise = fit_probe(np.random.default_rng(1).normal(size=x.shape).astype(np.float32), y, classes=5)
    assert noise.strength < clear.strength
    assert noise.loss == pytest.approx(math.log(5), rel=0.05)
    assert clear.loss < noise.loss / 2


@pytest.mark.parametrize("images", [1, 2])
def test_fewer_images_a_class_than_folds_are_held_out_as_far_as_they_go(images: int) -> None:
    x, y = blobs(6, images=images)
    probe = fit_probe(x, y, classes=6)
    assert np.isfinite(probe.weight).all()
    assert np.isfinite(probe.loss) == (images > 1)


def test_views_of_one_image_are_held_out_together() -> None:
    """Labels at random: what was seen in another view of itself would look learned."""
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(120, 200)), 3, axis=0).astype(np.float32)
    y, groups = np.repeat(rng.integers(0, 3, 120), 3), np.repeat(np.arange(120), 3)
    assert fit_probe(x, y, classes=3, groups=groups).loss > 0.9 * math.log(3)
    assert fit_probe(x, y, classes=3).loss < 0.5 * math.log(3)


def test_a_feature_that_hardly_varies_gets_no_huge_weight() -> None:
    x, y = blobs(3)
    flat = np.column_stack([x, 1e-6 * np.random.default_rng(0).normal(size=len(x)), np.full(len(x), 7.0)])
    probe = fit_probe(flat.astype(np.float32), y, classes=3, strengths=(1.0,))
    assert np.abs(probe.weight).max() < 100
    assert np.isfinite(probe.weight).all()


def test_refuses_what_no_probe_can_be_fitted_to() -> None:
    x, y = blobs(3)
    with pytest.raises(FgvcError, match="two classes"):
        fit_probe(x, np.zeros(len(x), int), classes=3)
    x[3, 1] = np.nan
    with pytest.raises(FgvcError, match="no numbers"):
        fit_probe(x, y, classes=3)


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "test_vit", "test_convnext"])
def test_put_into_a_net_it_gives_the_same_logits(name: str) -> None:
    net = timm.create_model(name, num_classes=4).eval()
    images = torch.randn(12, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        vectors = net.forward_head(net.forward_features(images), pre_logits=True)
    assert linear_head(net).weight.shape[1] == vectors.shape[1]
    probe = fit_probe(vectors.numpy(), np.arange(12) % 4, classes=4, strengths=(0.1,))
    put_head(net, torch.from_numpy(probe.weight), torch.from_numpy(probe.bias))
    with torch.inference_mode():
        torch.testing.assert_close(net(images), torch.from_numpy(probe.logits(vectors.numpy())), rtol=1e-4, atol=1e-4)
    zero_head(net)
    with torch.inference_mode():
        loss = torch.nn.functional.cross_entropy(net(images), torch.arange(12) % 4)
    assert float(loss) == pytest.approx(math.log(4), rel=1e-6)


def test_refuses_a_net_with_two_heads() -> None:
    net = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=4)
    with pytest.raises(FgvcError, match=r"is no linear layer"):
        linear_head(net)


def test_the_penalty_is_that_of_trying_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weaker ones than two beyond the best are passed over."""
    rng = np.random.default_rng(0)
    y = np.arange(240) % 6
    vectors = (rng.normal(0, 1, (6, 40))[y] * 0.2 + rng.normal(0, 1, (240, 40))).astype(np.float32)
    tried = _held_out_losses(vectors, y, np.arange(240), STRENGTHS, 0)
    monkeypatch.setattr("fgvc.models.probe.PASSED", len(STRENGTHS))
    every = _held_out_losses(vectors, y, np.arange(240), STRENGTHS, 0)
    assert len(tried) < len(every) == len(STRENGTHS)
    assert min(tried, key=tried.__getitem__) == min(every, key=every.__getitem__)
    assert tried == {strength: every[strength] for strength in tried}
