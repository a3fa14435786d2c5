"""Frozen features: timm's own pooled vectors of the images as evaluation sees them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fgvc.config.recipe import Recipe
from fgvc.data.sources.read import read_source
from fgvc.errors import FgvcError
from fgvc.evaluation.features import compute_features, input_normalisation, load_frozen
from fgvc.images.decode import decode
from fgvc.images.preprocess import preprocess
from fgvc.models.backbone import plain_model
from fgvc.models.weights import load_weights, preprocess_for


@pytest.fixture
def weighted(recipe_tree: dict, tmp_path: Path) -> Recipe:
    torch.manual_seed(0)
    save_file(plain_model("test_resnet", 7).state_dict(), tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors.json").write_text('{"mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3]}')
    return Recipe.model_validate(
        recipe_tree | {"model": {"backbone": "test_resnet", "weights": str(tmp_path / "w.safetensors")}}
    )


def test_they_are_the_nets_pooled_vectors(weighted: Recipe) -> None:
    index = read_source(weighted.data)
    calls: list[tuple[int, int]] = []
    rows = np.array([3, 50, 10, 40])
    features = compute_features(
        weighted, load_frozen(weighted, 3), index, rows, progress=lambda done, total: calls.append((done, total))
    )
    assert features.rows.tolist() == rows.tolist()
    assert calls == [(4, 4)]
    net = plain_model("test_resnet", 3).eval()
    spec = preprocess_for(weighted.deploy, weighted.image.size, load_weights(net, weighted.model))
    x = torch.from_numpy(np.stack([preprocess(decode(index.path(row)), spec) for row in rows.tolist()]))
    with torch.no_grad():
        expected = net.forward_features(x).mean(dim=(2, 3))
    np.testing.assert_allclose(features.vectors, expected.numpy(), atol=1e-5)


def test_random_weights_are_refused(recipe_tree: dict) -> None:
    tree = recipe_tree | {"model": {"backbone": "test_resnet", "weights": "none"}}
    recipe = Recipe.model_validate(tree)
    with pytest.raises(FgvcError, match="random weights"):
        load_frozen(recipe, 3)


def test_the_normalisation_is_told_as_rgb_with_white_as_one(weighted: Recipe) -> None:
    normalisation = input_normalisation(weighted)
    assert normalisation is not None
    assert (normalisation.mean, normalisation.std) == ((0.4, 0.5, 0.6), (0.1, 0.2, 0.3))
    tree = weighted.model_dump(mode="json") | {"deploy": {"channel_order": "bgr", "input_range": 255}}
    deployed = input_normalisation(Recipe.model_validate(tree))
    assert deployed is not None
    np.testing.assert_allclose((deployed.mean, deployed.std), (normalisation.mean, normalisation.std))
    tree["deploy"] |= {"mean": [51, 102, 153], "std": [25.5, 51, 102]}
    in_bytes = input_normalisation(Recipe.model_validate(tree))
    assert in_bytes is not None
    np.testing.assert_allclose((in_bytes.mean, in_bytes.std), ((0.6, 0.4, 0.2), (0.4, 0.2, 0.1)))


def test_it_is_told_whether_the_weights_ask_for_it(weighted: Recipe) -> None:
    tree = weighted.model_dump(mode="json")
    for deploy, own, doubts in (
        ({}, True, 0),
        ({"input_range": 255, "mean": [102, 127.5, 153], "std": [25.5, 51, 76.5]}, True, 0),
        ({"mean": [0.5, 0.5, 0.5]}, False, 0),
        ({"input_range": 255, "std": [0.1, 0.2, 0.3]}, False, 1),
    ):
        normalisation = input_normalisation(Recipe.model_validate(tree | {"deploy": deploy}))
        assert normalisation is not None
        assert (normalisation.from_weights, len(normalisation.doubts)) == (own, doubts), deploy


def test_weights_out_of_reach_are_no_fault_of_the_data(recipe_tree: dict) -> None:
    tree = recipe_tree | {"model": {"backbone": "test_resnet", "weights": "nowhere.safetensors"}}
    assert input_normalisation(Recipe.model_validate(tree)) is None
