"""Class maps inside the training step, computed from the step's features.

Without a second pass through the backbone, numpy, or a lasting change of mode: gradients go through the head alone, on a
detached copy of the features, in float32, with dropout off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, cast

import torch
from torch import Tensor, nn

from fgvc.errors import FgvcError
from fgvc.models.backbone import feature_map
from fgvc.models.classifier import as_classifier
from fgvc.models.target import Target

Method = Literal["cam", "gradcam", "gradcam++"]


class ClassMapper:
    """Class maps of one network: `mapper(features, target, method, size)`."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def __call__(self, features: Tensor, target: Target, method: Method, size: Sequence[int] | None = None) -> Tensor:
        """Maps (B,h,w), float32 and detached, of the class of most weight, from the output of `forward_features`.

        `size`: of the images, as in `feature_map`. Maps of cam are signed, those of the gradient methods >= 0; none is
        scaled: see `normalised`.
        """
        labels = dominant(target)
        weight = next(self.net.parameters())
        features = features.detach().to(weight.dtype)
        with torch.autocast(features.device.type, enabled=False):
            if method == "cam":
                classifier = cast("nn.Linear", as_classifier(self.net).get_classifier())
                maps = cam(feature_map(self.net, features, size), classifier.weight.detach(), labels)
            else:
                by = grad_cam if method == "gradcam" else grad_cam_plus_plus
                gradients = self._gradients(features, labels)
                maps = by(feature_map(self.net, features, size), feature_map(self.net, gradients, size))
        return maps.float()

    def _gradients(self, features: Tensor, labels: Tensor) -> Tensor:
        """The gradients d z_y / d features, of the shape of the features."""
        with torch.inference_mode(False), torch.enable_grad(), evaluating(self.net):
            leaf = features.clone().requires_grad_()
            logits = as_classifier(self.net).forward_head(leaf)
            (gradients,) = torch.autograd.grad(logits.gather(1, labels.clone()[:, None]).sum(), leaf)
        return gradients


def cam(f: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    """CAM: sum_k W[y,k] f_k, (B,h,w), from f (B,C,h,w), the classifier's weight (K,C) and labels (B,) (Zhou et al., CVPR 2016,
    arXiv:1512.04150)."""
    return torch.einsum("bchw,bc->bhw", f, weight[y])


def grad_cam(f: Tensor, g: Tensor) -> Tensor:
    """Grad-CAM: relu(sum_k mean_hw(g_k) f_k), (B,h,w), from f and g = dz_y/df, both (B,C,h,w) (Selvaraju et al., ICCV
    2017, arXiv:1610.02391, Eq. 1 and 2)."""
    return torch.einsum("bchw,bc->bhw", f, g.mean((2, 3))).relu()


def grad_cam_plus_plus(f: Tensor, g: Tensor) -> Tensor:
    """Grad-CAM++: relu(sum_k w_k f_k), w_k = sum_hw a relu(g), a = g^2 / (2 g^2 + sum_hw(f_k) g^3), 0 where g is (Chattopadhay et
    al., WACV 2018, arXiv:1710.11063, Eq. 19, with the exponential's derivatives as powers of g); shapes as `grad_cam`."""
    # Without the common factor g^2: an epsilon beside it, as in other code, outweighs the small gradients of large maps.
    denominator = 2 + f.sum((2, 3), keepdim=True) * g
    alpha = torch.where(g == 0, 0.0, 1 / torch.where(denominator.abs() < 1e-6, 1e-6, denominator))
    return torch.einsum("bchw,bc->bhw", f, (alpha * g.relu()).sum((2, 3))).relu()


def normalised(maps: Tensor) -> Tensor:
    """Scale each map of (B,h,w) to [0,1], its smallest value to 0 and its largest to 1.

    A map that is flat or not finite becomes 0, so that nothing is erased by it."""
    lowest, highest = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    span = highest - lowest
    varies = torch.isfinite(span) & (span > 1e-6 * torch.maximum(highest.abs(), lowest.abs()))
    return torch.where(varies, (maps - lowest) / span, 0.0)


def dominant(target: Target) -> Tensor:
    """The label of most weight of a mixed target, (B,) int64."""
    if len(target) == 1:
        return target[0][0]
    labels = torch.stack([y for y, _ in target])
    weights = torch.stack([torch.ones_like(y, dtype=torch.float32) if w is None else w for y, w in target])
    return labels.gather(0, weights.argmax(0, keepdim=True))[0]


def closed_form(net: nn.Module, size: tuple[int, int]) -> tuple[nn.Linear | None, str]:
    """The linear classifier if the class maps are `cam` in closed form, or None; and the reason.

    They are if the head is exactly global average pooling and one linear layer, which is checked numerically: on random features
    `forward_head(F) == mean_hw(F) W^T + b`.
    """
    linear = as_classifier(net).get_classifier()
    if not isinstance(linear, nn.Linear):
        return None, f"the classifier is {type(linear).__name__}, not one linear layer"
    weight = linear.weight
    with torch.no_grad(), evaluating(net):
        zeros = torch.zeros(1, 3, *size, dtype=weight.dtype, device=weight.device)
        features = as_classifier(net).forward_features(zeros)
        if not isinstance(features, Tensor):
            return None, f"forward_features gives a {type(features).__name__}"
        features = 2 * _noise_like(features) - 1  # signed: an activation before the pooling must show
        try:
            pooled = feature_map(net, features, size).mean((2, 3))
        except FgvcError as error:
            return None, str(error)
        if pooled.shape[1] != linear.in_features:
            return None, f"the classifier reads {linear.in_features} values, the last feature map has {pooled.shape[1]}"
        expected, logits = linear(pooled), as_classifier(net).forward_head(features)
        read = as_classifier(net).forward_head(features, pre_logits=True)  # some classifiers start at zero
        scale = (pooled.abs() @ weight.abs().T).max().clamp_min(1e-30)
        same = logits.shape == expected.shape and (logits - expected).abs().max() <= 1e-5 * scale
        if not same or read.shape != pooled.shape or not torch.allclose(read, pooled, rtol=1e-4, atol=1e-5):
            return None, "the head is more than global average pooling and a linear layer"
    return linear, "closed-form class activation maps"


def refusal(net: nn.Module, size: tuple[int, int], method: Method) -> str | None:
    """The reason why a net can't have maps of a method, or None."""
    if method == "cam":
        linear, reason = closed_form(net, size)
        return None if linear is not None else f"{reason}; use gradcam"
    weight = next(net.parameters())
    with torch.enable_grad(), evaluating(net):
        with torch.no_grad():
            zeros = torch.zeros(1, 3, *size, dtype=weight.dtype, device=weight.device)
            features = as_classifier(net).forward_features(zeros)
        try:
            feature_map(net, features, size)
        except FgvcError as error:
            return str(error)
        leaf = (_noise_like(features) + 0.5).requires_grad_()
        read = as_classifier(net).forward_head(leaf, pre_logits=True)
        # Not of the logits: some classifiers start at zero. Not of the plain sum: a layer norm's has no gradient.
        (gradient,) = torch.autograd.grad((read * _noise_like(read)).sum(), leaf)
        if not feature_map(net, gradient, size).abs().max() > 0:
            return (
                f"the head of this {type(net).__name__} reads the class token alone, so the last features of the "
                "patches have no gradient and no map"
            )
    return None


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Set eval mode within the block, and restore every module's mode."""
    modes = [(module, module.training) for module in net.modules()]
    try:
        net.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _noise_like(values: Tensor) -> Tensor:
    """Make two rows of fixed noise in [0,1), shaped as rows of `values`."""
    rng = torch.Generator().manual_seed(0)
    return torch.rand(2, *values.shape[1:], generator=rng).to(values)
