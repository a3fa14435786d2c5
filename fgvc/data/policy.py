"""Policies of augmentation, by timm's and torchvision's own code."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from PIL import Image

from fgvc.config.data import Augment

MOVES = ("Rotate", "Shear", "Translate")  # in the names of operations that move pixels


def policy(augment: Augment, fill: tuple[int, int, int]) -> Callable[[Image.Image], Image.Image]:
    """The policy of the settings, as a function of an RGB image that draws from the global generators; `fill`: RGB of what its
    geometry leaves empty.

    RandAugment (arXiv:1909.13719), AutoAugment's ImageNet policy (1805.09501), AugMix (1912.02781) and 3-Augment (2204.07118) are
    timm's, TrivialAugment Wide (2103.10158) is torchvision's, with operations whose strength grows with their magnitude."""
    if augment.policy == "trivialaugment":
        return _trivial(fill, geometry=augment.policy_geometry)
    from timm.data import auto_augment as timm

    def kept(names: Iterable[str]) -> list[str]:
        return [name for name in names if augment.policy_geometry or not name.startswith(MOVES)]

    options: dict[str, Any] = {"img_mean": fill}
    made: Callable[[Image.Image], Image.Image]
    match augment.policy:
        case "randaugment":
            names = kept(timm.rand_augment_choices("", increasing=True))
            options["magnitude_std"] = 0.5
            ops = timm.rand_augment_ops(augment.policy_magnitude, augment.policy_probability, options, names)
            made = timm.RandAugment(ops, augment.policy_ops)
        case "augmix":
            names = kept(timm._AUGMIX_TRANSFORMS)
            options["magnitude_std"] = float("inf")  # uniform up to the magnitude
            made = timm.AugMixAugment(
                timm.augmix_ops(augment.policy_magnitude, options, names), width=augment.policy_ops
            )
        case "autoaugment" | "3-augment":
            parts = timm.auto_augment_policy("original" if augment.policy == "autoaugment" else "3a", options)
            made = timm.AutoAugment([[op for op in part if kept([op.name])] for part in parts])
        case _:
            raise ValueError(f"augment.policy: {augment.policy} has no operations")
    return made


def _trivial(fill: tuple[int, int, int], *, geometry: bool) -> Callable[[Image.Image], Image.Image]:
    from torchvision.transforms import InterpolationMode, TrivialAugmentWide

    class Trivial(TrivialAugmentWide):
        def _augmentation_space(self, num_bins: int) -> dict[str, Any]:
            space: dict[str, Any] = super()._augmentation_space(num_bins)
            return {name: bins for name, bins in space.items() if geometry or not name.startswith(MOVES)}

    made: Callable[[Image.Image], Image.Image] = Trivial(interpolation=InterpolationMode.BILINEAR, fill=list(fill))
    return made
