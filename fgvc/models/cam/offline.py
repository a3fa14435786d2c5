"""Class maps outside of the training step, by the name of a method: pytorch-grad-cam's and fgvc's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fgvc.errors import FgvcError
from fgvc.models.backbone import feature_map
from fgvc.models.class_maps import closed_form, evaluating, normalised
from fgvc.models.feature_maps import FeatureNet, feature_net, without_gradients

Rows = NDArray[np.int64]

LIBRARY = {  # method -> pytorch-grad-cam's class
    "gradcam": "GradCAM",
    "hirescam": "HiResCAM",
    "xgradcam": "XGradCAM",
    "layercam": "LayerCAM",
    "gradcamelementwise": "GradCAMElementWise",
    "eigencam": "EigenCAM",
    "eigengradcam": "EigenGradCAM",
    "segeigencam": "SegEigenCAM",
    "fem": "FEM",
}
BY_CHANNEL = ("scorecam", "sscam", "ablationcam")
METHODS = ("cam", "gradcam", "gradcam++", "smoothgradcam++", *BY_CHANNEL, "finercam", *list(LIBRARY)[1:], "kpcacam")
REFUSED = {
    "fullgrad": "it adds up the biases of every layer, and is no map of one feature map",
    "shapleycam": "it needs second derivatives, and the library's fails on tokens; behind a linear head it is gradcam",
    "randomcam": "its weights are dice: it explains nothing",
    "refinecam": "it multiplies the maps of several layers; there is one here",
    "sess": "it goes over an image in windows of many scales, which this net was not trained on",
    "guidedbackprop": "it follows ReLUs back to the pixels, which most of today's nets do not have",
}
CHANNELS = 64  # default number of channels that are tried one by one, if each costs a forward of the whole net
FORWARD = 32  # images per forward when channels are tried one by one
SAMPLES = {"smoothgradcam++": 16, "sscam": 10}  # noisy copies
SIGMA = {
    "smoothgradcam++": 0.15,
    "sscam": 2.0,
}  # SmoothGrad's 10-20 % of an image's range; of a mask in [0,1], as the paper


class ClassMaps:
    """Class maps of one net by some methods; made by `class_maps_of`."""

    def __init__(self, model: FeatureNet, size: tuple[int, int], methods: Sequence[str], *, channels: int | None) -> None:
        """Prepare the methods for a net. `channels`: number of the most active channels, for methods that try them one by one;
        0: all; None: CHANNELS, or all if only the head has to run for each. Raises FgvcError for a method that this net
        can't have."""
        self.net: nn.Module = model.net
        self._model, self._linear = model, None
        if "cam" in methods:
            self._linear, reason = closed_form(model.net, size)
            if self._linear is None:
                raise FgvcError(f"cam: {reason}; use gradcam")
        with torch.no_grad():
            weight = next(model.net.parameters())
            model(torch.zeros(1, 3, *size, dtype=weight.dtype, device=weight.device))
        _, self.width, *cells = feature_map(model.net, model.hooked, size).shape  # width: channels
        self.cells: tuple[int, ...] = tuple(cells)  # (h,w) of every map before it is enlarged
        self._channels = channels

    def logits(self, x: Tensor) -> Tensor:
        """Logits (B,K) of x (B,3,H,W); maps of the same x then need no other pass through the backbone."""
        with torch.no_grad():
            return self._model(x)

    def __call__(self, x: Tensor, labels: Tensor, method: str) -> tuple[Tensor, Tensor]:
        """Maps (B,H,W), float32 in [0,1], of the evidence in x (B,3,H,W) for classes (B,); and the unscaled maps (B,h,w),
        float32 and signed if the method is."""
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        from fgvc.models.cam.methods import FinerTarget

        target = FinerTarget if method == "finercam" else ClassifierOutputTarget
        cam = self._method(method, x.shape[2:])
        unscaled: list[np.ndarray] = []
        get_cam_image = cam.get_cam_image

        def recorded(*args: Any) -> np.ndarray:
            unscaled.append(get_cam_image(*args))
            return unscaled[0]

        cam.get_cam_image = recorded
        try:  # its own `with` swallows IndexErrors; hooks that stay would see every later forward
            with torch.inference_mode(False), torch.enable_grad():
                cam(x, [target(int(label)) for label in labels])
        finally:
            cam.activations_and_grads.release()
            del cam.get_cam_image  # a reference cycle, which would keep the graph of a batch
        # The library's scaling adds 1e-7 to the largest value, which is much if a class is unlikely.
        maps = torch.from_numpy(unscaled[0])
        # Grad-CAM and similar methods clamp at the features' size, the authors of Score-CAM at the image's.
        small = maps if getattr(cam, "enlarged_first", False) else maps.clamp(min=0)
        large = F.interpolate(small[:, None], x.shape[-2:], mode="bilinear", align_corners=False)[:, 0].clamp(min=0)
        return normalised(large).float(), maps.float()

    def cost(self, method: str) -> str | None:
        """The cost of an image beyond one forward, in words; None if it is negligible."""
        if method not in BY_CHANNEL:
            return f"{SAMPLES[method]} more forwards an image" if method in SAMPLES else None
        tried = self.tried(method)
        unit = "passes through the head" if method == "ablationcam" and self._model.inside is None else "forwards"
        channels = f"all {tried}" if tried == self.width else f"the {tried} most active of {self.width}"
        advice = "" if tried == self.width else "; --channels takes another number, 0 all"
        return f"{tried * SAMPLES.get(method, 1)} {unit} an image, for {channels} channels{advice}"

    def tried(self, method: str) -> int:
        """The number of channels that are tried one by one."""
        if self._channels is None:
            cheap = method == "ablationcam" and self._model.inside is None
            return self.width if cheap else min(CHANNELS, self.width)
        return min(self._channels, self.width) or self.width

    def _method(self, method: str, size: Sequence[int]) -> Any:
        import pytorch_grad_cam  # slow to import, and needed only here

        from fgvc.models.cam import methods as ours

        model, layout = self._model, partial(feature_map, self.net, size=size)
        if method == "cam":
            assert self._linear is not None, "set by __init__"
            return ours.CAM(model, layout, self._linear.weight)
        if method in ("gradcam++", "kpcacam"):
            return (ours.KPCACAM if method == "kpcacam" else ours.GradCAMPlusPlus)(model, layout)
        if method == "smoothgradcam++":
            return ours.SmoothGradCAMPlusPlus(model, layout, samples=SAMPLES[method], sigma=SIGMA[method])
        if method == "sscam":
            return ours.SSCAM(
                model, layout, channels=self.tried(method), batch=FORWARD, samples=SAMPLES[method], sigma=SIGMA[method]
            )
        if method in BY_CHANNEL:
            kind = ours.ScoreCAM if method == "scorecam" else ours.AblationCAM
            return kind(model, layout, channels=self.tried(method), batch=FORWARD)
        kind = getattr(pytorch_grad_cam, LIBRARY["gradcam" if method == "finercam" else method])
        return kind(model, target_layers=[model.features], reshape_transform=layout)


@contextmanager
def class_maps_of(
    net: nn.Module, size: tuple[int, int], methods: Sequence[str], *, channels: int | None = None
) -> Iterator[ClassMaps]:
    """Class maps of a net within the block; its mode, gradients and flags are restored at the end.

    Raises FgvcError for a net without class maps, or without those of one of the methods, and for a feature map of one cell,
    which shows nothing.
    """
    with _hooked(net, size, methods, channels) as look:
        if look.cells == (1, 1):
            raise FgvcError("no class maps: the feature map is a single cell; train at a larger image.size")
        yield look


@contextmanager
def _hooked(
    net: nn.Module, size: tuple[int, int], methods: Sequence[str], channels: int | None = None
) -> Iterator[ClassMaps]:
    names = [method_name(method) for method in methods]
    model = feature_net(net, size)
    with evaluating(net), without_gradients(net):
        yield ClassMaps(model, size, names, channels=channels)


def method_name(method: str) -> str:
    """The name in METHODS of a method in any common spelling (Grad-CAM, GradCAMPlusPlus). Raises FgvcError if there is none."""
    name = method.lower().replace("plusplus", "++").replace("-", "").replace("_", "").replace(" ", "")
    if name in REFUSED:
        raise FgvcError(f"{method}: {REFUSED[name]}; there are {', '.join(METHODS)}")
    if name not in METHODS:
        raise FgvcError(f"no method {method!r}; there are {', '.join(METHODS)}")
    return name


def offline_maps(
    net: nn.Module, batches: Iterable[tuple[Tensor, Tensor, Rows]], method: str
) -> Iterator[tuple[Rows, Tensor]]:
    """Yield, for every batch of images (B,3,H,W), labels (B,) and rows (B,), the rows and the maps (B,H,W) float32 in [0,1].

    The net's mode, gradients and flags are restored when the iterator ends. A map of one cell is 0 everywhere."""
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        return
    name = method_name(method)
    height, width = first[0].shape[-2:]
    with _hooked(net, (height, width), [name]) as look:
        for images, labels, rows in chain([first], batches):
            yield rows, look(images.detach(), labels, name)[0]
