"""Class map methods that pytorch-grad-cam lacks or gets wrong, in its interface.

A (C,h,w) is the hooked feature map of an image, g = dY/dA with Y the logit of the class, p its probability. The model of each
is a `fgvc.models.feature_maps.FeatureNet`. The library's own Score-CAM puts raw logits through a softmax over channels, which
collapses onto one of them, and holds an image a channel in memory; its Ablation-CAM swaps a layer of the live net, ablates to
-1e7, and divides by a logit that may be negative; its Grad-CAM++ adds an epsilon that outweighs small gradients; its KPCA-CAM
is another in each run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_grad_cam.base_cam import BaseCAM
from pytorch_grad_cam.utils.model_targets import FinerWeightedTarget
from torch import Tensor
from torch.nn import functional as F

from fgvc.models.backbone import feature_map
from fgvc.models.class_maps import grad_cam_plus_plus, normalised
from fgvc.models.feature_maps import FeatureNet

Floats = NDArray[np.float32]
Layout = Callable[[Tensor], Tensor]


class CAM(BaseCAM):
    """CAM, sum_k W[c,k] A_k (Zhou et al., CVPR 2016, arXiv:1512.04150), for nets whose head is global average pooling and one
    linear layer."""

    def __init__(self, model: FeatureNet, layout: Layout, weight: Tensor) -> None:
        super().__init__(model, [model.features], layout, uses_gradients=False)
        self.weight = weight.detach()  # (K,C)

    def get_cam_weights(
        self, input_tensor: Tensor, target_layers: Any, targets: list[Any], activations: Floats, grads: None
    ) -> Floats:
        return self.weight[[target.category for target in targets]].float().cpu().numpy()


class GradCAMPlusPlus(BaseCAM):
    """Grad-CAM++ (Chattopadhay et al., WACV 2018, arXiv:1710.11063); see `fgvc.models.class_maps.grad_cam_plus_plus`."""

    def __init__(self, model: FeatureNet, layout: Layout) -> None:
        super().__init__(model, [model.features], layout)

    def get_cam_image(
        self,
        input_tensor: Tensor,
        target_layer: Any,
        targets: list[Any],
        activations: Floats,
        grads: Floats,
        smooth: bool,
    ) -> Floats:
        return grad_cam_plus_plus(torch.from_numpy(activations), torch.from_numpy(grads)).numpy()


class SmoothGradCAMPlusPlus(BaseCAM):
    """Smooth Grad-CAM++ (Omeiza et al. 2019, arXiv:1908.01224): Grad-CAM++ averaged over noisy copies of the image.

    D1, D2, D3, the means of g, g^2, g^3 over the copies, take the place of the powers of g: a = D2 / (2 D2 + sum_hw(A) D3),
    w_k = sum_hw a relu(D1); A of the clean image.

    The noise is the same for every image, so that maps do not depend on batches.
    """

    def __init__(self, model: FeatureNet, layout: Layout, *, samples: int, sigma: float) -> None:
        """Hook the model. `samples`: number of noisy copies. `sigma`: of the noise, as a share of each image's range."""
        super().__init__(model, [model.features], layout)
        self.samples, self.sigma = samples, sigma

    def get_cam_weights(
        self, input_tensor: Tensor, target_layers: Any, targets: list[Any], activations: Floats, grads: Floats
    ) -> Floats:
        d1, d2, d3 = (np.zeros(grads.shape, dtype=np.float64) for _ in range(3))
        spread = self.sigma * (input_tensor.amax((1, 2, 3), keepdim=True) - input_tensor.amin((1, 2, 3), keepdim=True))
        for noise in _noise(self.samples, input_tensor.shape[1:]):
            z = self.activations_and_grads(input_tensor + spread * noise.to(input_tensor))
            torch.stack([target(row) for target, row in zip(targets, z, strict=True)]).sum().backward()
            g = self.activations_and_grads.gradients[0].double().cpu().numpy()
            d1 += g / self.samples
            d2 += g**2 / self.samples
            d3 += g**3 / self.samples
        denominator = 2 + activations.sum((2, 3), keepdims=True) * np.divide(d3, d2, out=np.zeros_like(d3), where=d2 > 0)
        alpha = np.where(d2 == 0, 0.0, 1 / np.where(np.abs(denominator) < 1e-6, 1e-6, denominator))
        return (alpha * d1.clip(min=0)).sum((2, 3)).astype(np.float32)


class ScoreCAM(BaseCAM):
    """Score-CAM (Wang et al., CVPRW 2020, arXiv:1910.01279): relu(up(sum w_k A_k)), w_k = p(x M_k), M_k = n(up(A_k)), n min-max.

    As in its authors' code. p is after the softmax over classes. Unlike the paper's text, that code subtracts no p of a black
    image, which for the label of many images is larger than that of every masked one and would empty their maps; and it has no
    second softmax over channels, which would make weights of a share of 1 almost equal (haofanwang/Score-CAM, #6 and #17). Flat
    channels have no mask and no weight.
    """

    enlarged_first = True  # before the ReLU: see `fgvc.models.cam.offline.ClassMaps`

    def __init__(self, model: FeatureNet, layout: Layout, *, channels: int, batch: int) -> None:
        """Hook the model. `channels`: number of channels that are tried, those of the highest mean activation; the others have
        weight 0. `batch`: images per forward."""
        super().__init__(model, [model.features], layout, uses_gradients=False)
        self.channels, self.batch = channels, batch

    def get_cam_weights(
        self, input_tensor: Tensor, target_layers: Any, targets: list[Any], activations: Floats, grads: None
    ) -> NDArray[np.float64]:
        weights = np.zeros(activations.shape[:2])  # not float32: those of an unlikely class must not vanish
        with torch.no_grad():
            for row, maps in enumerate(activations):
                tried = self.tried(maps)
                if len(tried):
                    scores = self.scores(input_tensor[row : row + 1], row, targets[row].category, maps, tried)
                    weights[row, tried] = scores.double().cpu().numpy()
        return weights

    def tried(self, maps: Floats) -> NDArray[np.int64]:
        """The channels of (C,h,w) that are tried."""
        return most_active(maps, self.channels, flat=False)

    def scores(self, x: Tensor, row: int, label: int, maps: Floats, tried: NDArray[np.int64]) -> Tensor:
        """The weights of the channels `tried` of the image x (1,3,H,W), row `row` of its batch."""
        return torch.cat([self.masked(x, label, mask) for mask in self.masks(x, maps[tried])])

    def masks(self, x: Tensor, maps: Floats) -> Iterator[Tensor]:
        """Masks n(up(A_k)) as (b,H,W), as many at a time as a forward takes, since all together would fill the memory."""
        for chunk in torch.from_numpy(maps).to(x).split(self.batch):
            large = F.interpolate(chunk[None], x.shape[-2:], mode="bilinear", align_corners=False)[0]
            yield normalised(large)

    def masked(self, x: Tensor, label: int, mask: Tensor) -> Tensor:
        return self.confidence(x * mask[:, None], label)

    def confidence(self, x: Tensor, label: int) -> Tensor:
        """The probability (B,) of a class, in float64, so that an unlikely one does not vanish."""
        return self.model.net(x).double().softmax(1)[:, label]


class SSCAM(ScoreCAM):
    """Score-CAM with p(x (M_k + noise)) averaged over `samples` draws of normal noise (SS-CAM, Wang et al. 2020,
    arXiv:2006.14255, type 1).

    The draws are the same for every channel, so that only the channels' content differs.
    """

    def __init__(self, model: FeatureNet, layout: Layout, *, channels: int, batch: int, samples: int, sigma: float) -> None:
        super().__init__(model, layout, channels=channels, batch=batch)
        self.samples, self.sigma = samples, sigma

    def masked(self, x: Tensor, label: int, mask: Tensor) -> Tensor:
        draws = _noise(self.samples, x.shape[-2:])
        scores = [super(SSCAM, self).masked(x, label, mask + self.sigma * noise.to(x)) for noise in draws]
        return torch.stack(scores).mean(0)


class AblationCAM(ScoreCAM):
    """Ablation-CAM (Desai & Ramaswamy, WACV 2020; no arXiv): w_k = Y - Y[A_k = 0], the fall of the logit without the channel.

    The paper divides it by Y: the same map if Y > 0, and the map of evidence against the class if Y < 0. Only the layers behind
    the feature map run again, usually the head alone. Flat channels are tried as well, since the logit may depend on them.
    """

    enlarged_first = False

    def tried(self, maps: Floats) -> NDArray[np.int64]:
        return most_active(maps, self.channels)

    def scores(self, x: Tensor, row: int, label: int, maps: Floats, tried: NDArray[np.int64]) -> Tensor:
        features = self.model.hooked[row : row + 1]
        logit = self.model.behind(x, features)[:, label].double()
        falls = []
        for chunk in torch.from_numpy(tried).split(self.batch):
            ablated = features.repeat(len(chunk), *(1 for _ in features.shape[1:]))
            feature_map(self.model.net, ablated, x.shape[2:])[torch.arange(len(chunk)), chunk] = 0  # a view
            falls.append(logit - self.model.behind(x.expand(len(chunk), -1, -1, -1), ablated)[:, label])
        return torch.cat(falls)


class KPCACAM(BaseCAM):
    """KPCA-CAM (Karmani et al. 2024, arXiv:2410.00267): the first component of the cells of A by kernel PCA,
    k(a, b) = tanh(a b / C + 1).

    The library's own solver starts at random if there are more than 200 cells. The sign of a component is arbitrary: its largest
    absolute value is made positive.
    """

    def __init__(self, model: FeatureNet, layout: Layout) -> None:
        super().__init__(model, [model.features], layout, uses_gradients=False)

    def get_cam_image(
        self,
        input_tensor: Tensor,
        target_layer: Any,
        targets: list[Any],
        activations: Floats,
        grads: None,
        smooth: bool,
    ) -> Floats:
        cells = activations.reshape(*activations.shape[:2], -1).transpose(0, 2, 1).astype(np.float64)  # (B,hw,C)
        cells -= cells.mean(1, keepdims=True)
        kernel = np.tanh(cells @ cells.transpose(0, 2, 1) / cells.shape[2] + 1)
        kernel -= kernel.mean(1, keepdims=True)
        kernel -= kernel.mean(2, keepdims=True)
        values, vectors = np.linalg.eigh(kernel)
        first = vectors[..., -1] * np.sqrt(values[:, -1:].clip(min=0))  # (B,hw)
        sign = np.where(first.max(1, keepdims=True) < -first.min(1, keepdims=True), -1, 1)
        return np.float32(sign * first).reshape(len(first), *activations.shape[2:])


class FinerTarget:
    """Target of Finer-CAM (Zhang et al., CVPR 2025, arXiv:2501.11309): the logit of a class minus those of similar classes,
    which are those of the nearest logits, as in the paper's code."""

    def __init__(self, category: int, *, others: int = 3) -> None:
        self.category, self.others = category, others

    def __call__(self, z: Tensor) -> Tensor:
        nearest = (z - z[self.category]).abs().argsort(stable=True).tolist()
        nearest.remove(self.category)
        return FinerWeightedTarget(self.category, nearest[: self.others], 1.0)(z)


def most_active(maps: Floats, count: int, *, flat: bool = True) -> NDArray[np.int64]:
    """The `count` channels of (C,h,w) with the highest mean, the highest first; without `flat`, those excepted that `normalised`
    takes for constant."""
    order = np.argsort(-maps.mean((1, 2)), kind="stable")
    if not flat:
        order = order[normalised(torch.from_numpy(maps)).amax((1, 2)).numpy()[order] > 0]
    return order[:count]


def _noise(samples: int, shape: tuple[int, ...] | torch.Size) -> Iterator[Tensor]:
    rng = torch.Generator().manual_seed(0)
    for _ in range(samples):
        yield torch.randn(shape, generator=rng)
