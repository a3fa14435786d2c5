"""Identification of a deployed file as one of timm's nets, its twin, and the file's tensors from that net's weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from fgvc.errors import FgvcError
from fgvc.models.backbone import deployed, plain_model
from fgvc.models.lookup.match import Layer, Pairing, Place, pairings
from fgvc.models.lookup.table import Near, nearest, timm_table
from fgvc.models.lookup.trace import Operand, Traced, stages_of, traced
from fgvc.models.onnxnet.net import OnnxNet

TOLERANCE = 1e-5  # of the largest logit
CANDIDATES = 12  # that are tried, of one set of layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Twin:
    """One of timm's nets that a file is: with the file's weights its logits are the file's to 1e-5 of the largest."""

    name: str
    kwargs: Mapping[str, Any]  # of timm.create_model
    fused: bool  # whether it is the form in which the net ships, its branches fused (RepVGG, MobileOne...)
    difference: float  # of the logits, over the largest
    stages: tuple[tuple[int, int], ...]  # channels and reduction of each of timm's feature_info
    file: OnnxNet
    uses: Traced  # of the file's weights
    pairing: Pairing

    def plain(self) -> nn.Module:
        """timm's net with as many classes as the file, random weights: `fgvc.models.weights.load_weights` fills it."""
        return plain_model(self.name, self.file.num_classes, self.kwargs)

    def tensors(self, net: nn.Module) -> dict[str, Tensor]:
        """The weights of timm's net (one that `plain` gave, with any number of classes) for the file's places: by the names of
        the file's tensors, in their shapes there, float64, norms folded where the file has them folded. They are for
        `fgvc.exporting.into.write_into`. A classifier of another number of classes is left out.

        Raises FgvcError where the file holds numbers that can't be had from the net's weights.
        """
        whole = self._form(net)
        twin = _watched(whole, self.file.size)
        own = dict(whole.named_parameters()) | dict(whole.named_buffers())
        places = {theirs: twin.uses[n].operands[at] for (n, at), theirs in self.pairing.same.items()}
        places |= {(layer.file, 0): twin.uses[layer.twin].operands[0] for layer in self.pairing.layers}
        written: dict[str, Tensor] = {}  # by the names of the file's module
        for place, value in _folded(twin, self.uses, self.pairing).items():
            operand = self.uses.uses[place[0]].operands[place[1]]
            written |= _parameters(self.file, operand, value, places.get(place), own)
        self._refuse_other(whole, written)
        return {
            stored: held[0].to_file(written[held[0].target])
            for stored, held in self.file.slots.items()
            if held[0].target in written
        }

    def scales(self, net: nn.Module) -> dict[str, Tensor]:
        """gamma / sigma of the norms that the file has folded into its convolutions, from the weights of timm's net: by the name
        of the convolution's weight in `file`, for each of its output channels (C), float64."""
        twin = _watched(self._form(net), self.file.size)
        return {
            self.uses.uses[layer.file].operands[0].names[0]: _affine(twin, layer)[0]
            for layer in self.pairing.layers
            if layer.folded and layer.scale is None
        }

    def _refuse_other(self, net: nn.Module, written: Mapping[str, Tensor]) -> None:
        """Raise FgvcError where the file with these weights has not the logits of the net that they are from."""
        file = copy.deepcopy(self.file).double().eval()
        with torch.no_grad():
            for name, value in [*file.named_parameters(), *file.named_buffers()]:
                if name in written:
                    value.copy_(written[name])
        theirs = traced(file, _images(self.file).double())
        mine = traced(net, theirs.entry)
        if mine.logits.shape == theirs.logits.shape and not _difference(theirs.logits, mine.logits) <= TOLERANCE:
            raise FgvcError(f"the weights of {self.name} can't be laid into the file: its answers would be others")

    def _form(self, net: nn.Module) -> nn.Module:
        net = copy.deepcopy(net).double().eval()
        return deployed(net) if self.fused else net


@dataclass(frozen=True, slots=True, kw_only=True)
class LookUp:
    """Result of the search for the net of timm's that a file is."""

    version: str  # of the timm that the table is of
    twins: tuple[Twin, ...] = ()
    others: tuple[tuple[str, float], ...] = ()  # nets with the same layers and other logits: how far these are apart
    near: tuple[Near, ...] = ()  # where none has the same layers: the nearest

    @property
    def twin(self) -> Twin | None:
        """The first of the nets that it is; all of them are the same function."""
        return self.twins[0] if self.twins else None

    def line(self) -> str:
        """The result as one line of text."""
        if self.twins:
            names = " = ".join(dict.fromkeys(twin.name for twin in self.twins))
            return f"{names} of timm: with the file's weights its logits are the same ({self.twins[0].difference:.0e} apart)"
        if self.others:
            apart = ", ".join(f"{name} ({difference:.0e} apart)" for name, difference in self.others)
            return f"none of timm's: the layers are those of {apart}, the logits are not"
        if self.near:
            count = self.near[0].differences
            names = ", ".join(dict.fromkeys(name for near in self.near[:3] for name in near.entry.names[:2]))
            return f"none of timm's: a {names}" + (
                f" but for {count} layer{'s' * (count > 1)}" if count else "'s layers, otherwise used"
            )
        return f"none of timm's (as of {self.version})"

    def numbers(self) -> dict[str, Any]:
        """Values for JSON."""
        return {
            "timm": self.version,
            "nets": [
                {"name": twin.name, "kwargs": dict(twin.kwargs), "difference": twin.difference} for twin in self.twins
            ],
            "same_layers": dict(self.others),
            "near": [{"names": near.entry.names, "differences": near.differences} for near in self.near],
        }


def timm_stages(file: OnnxNet) -> tuple[tuple[int, int], ...]:
    """The channels and reductions of the stages of timm's net with the same layers, by the table alone; () where there is none.
    For `OnnxNet.set_stages`."""
    training = file.training
    uses = traced(file.eval(), _images(file)[:1])
    file.train(training)
    near = nearest((uses.uses[number].key for number in uses.layers), share=0)
    return next((net.entry.stages for net in near if not net.differences), ())


def look_up(file: OnnxNet, first: str = "") -> LookUp:
    """Search the net of timm's that a file is: one with layers of the same shapes, which with the file's weights in their places
    has the same logits on random images, to 1e-5 of the largest. The file is put into eval mode.

    `first`: timm's name of a net that is tried before others. Of very many with the same layers some are left out."""
    uses = traced(file.eval(), _images(file))
    near = nearest(uses.uses[number].key for number in uses.layers)
    twins: list[Twin] = []
    others: list[tuple[str, float]] = []
    tries = [(name, net.entry.fused) for net in near for name in sorted(net.entry.names, key=_short_first)]
    tries.sort(key=lambda pair: pair[0] != first)
    for name, fused in tries[:CANDIDATES]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = _tried(file, uses, name, fused)
        if isinstance(result, Twin):
            twins.append(result)
        elif result is not None:
            others.append((name, result))
    nearest_ones = () if twins or others else tuple(net for net in near if net.differences == near[0].differences)
    apart = () if twins else tuple(sorted(others, key=lambda pair: pair[1])[:3])
    return LookUp(version=timm_table()[0], twins=tuple(twins), others=apart, near=nearest_ones)


def _short_first(name: str) -> tuple[int, str]:
    return len(name), name


def _images(file: OnnxNet) -> Tensor:
    images = torch.randn(2, 3, *file.size, generator=torch.Generator().manual_seed(0))
    return (images * 60 + 120).clamp(0, 255).round() if file.dtype == "uint8" else images


def _watched(net: nn.Module, size: tuple[int, int]) -> Traced:
    return traced(net, torch.zeros(1, 3, *size, dtype=torch.float64))


def _tried(file: OnnxNet, uses: Traced, name: str, fused: bool) -> Twin | float | None:
    """The twin, or how far its logits are from the file's; None: its layers are others."""
    best: float | None = None
    for kwargs in _sizes(name, file.size):
        with torch.random.fork_rng(devices=[]):
            try:
                plain = plain_model(name, file.num_classes, kwargs).eval()
                net = deployed(plain) if fused else plain
                twin = traced(net, uses.entry)
            except Exception:  # nets raise whatever they like at sizes that they are not for
                continue
        for pairing in pairings(twin, uses):
            if pairing.lost:
                continue
            apart = _apart(net, twin, uses, pairing)
            if apart <= TOLERANCE:
                return Twin(
                    name=name, kwargs=kwargs, fused=fused, difference=apart, stages=stages_of(plain), file=file, uses=uses,
                    pairing=pairing,
                )  # fmt: skip
            best = apart if best is None else min(best, apart)
    return best


def _sizes(name: str, size: tuple[int, int]) -> list[dict[str, Any]]:
    """The arguments to make a net with: none, and the image's size where it was not made for that."""
    own = timm.get_pretrained_cfg(name, allow_unregistered=True)
    usual = own is not None and tuple(own.input_size[1:]) == size
    return [{}] if usual else [{"img_size": size[0] if size[0] == size[1] else size}, {}]


def _apart(net: nn.Module, twin: Traced, uses: Traced, pairing: Pairing) -> float:
    """The largest difference of a net's logits, with the file's weights in the places of its own, from the file's."""
    others: dict[int, list[Tensor | None] | None] = {}
    for layer in pairing.layers:
        weight = uses.uses[layer.file].operands[0].value.reshape(twin.uses[layer.twin].operands[0].value.shape)
        if layer.scale is not None:
            weight = weight * _at(uses, layer.scale).reshape(-1, *(1,) * (weight.dim() - 1))
        others[layer.twin] = [weight, None if layer.shift is None else _at(uses, layer.shift).reshape(-1)]
        others |= dict.fromkeys(layer.folded)
    for (number, at), theirs in pairing.same.items():
        mine = twin.uses[number].operands
        values = others.setdefault(number, [operand.value for operand in mine])
        assert values is not None
        values[at] = _at(uses, theirs).reshape(mine[at].value.shape)
    logits = traced(net, uses.entry, others).logits
    return _difference(logits, uses.logits)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))


def _at(net: Traced, place: Place) -> Tensor:
    return net.uses[place[0]].operands[place[1]].value


# --- from the twin's weights to the file's ------------------------------------------------------------------------------


def _affine(twin: Traced, layer: Layer) -> tuple[Tensor, Tensor]:
    """Scale and shift of a layer's output channels (C,) that the file has folded into the layer; the shift includes the layer's
    own bias."""
    weight, *bias = (operand.value for operand in twin.uses[layer.twin].operands)
    scale, shift = weight.new_ones(len(weight)), bias[0] if bias else weight.new_zeros(len(weight))
    for use in (twin.uses[number] for number in layer.folded):
        parts = [operand.value.reshape(-1) for operand in use.operands]
        if use.kind == "norm":
            mean, variance, gamma, beta = (
                parts if len(parts) == 4 else (*parts, torch.ones_like(scale), torch.zeros_like(scale))
            )
            factor = gamma / torch.sqrt(variance + use.eps)
            scale, shift = scale * factor, (shift - mean) * factor + beta
        elif use.kind == "scale":
            scale, shift = scale * parts[0], shift * parts[0]
        else:
            shift = shift + parts[0]
    return scale, shift


def _folded(twin: Traced, file: Traced, pairing: Pairing) -> dict[Place, Tensor]:
    """Compute the file's operands from the twin's weights."""
    values: dict[Place, Tensor] = {}
    for layer in pairing.layers:
        weight = twin.uses[layer.twin].operands[0].value
        if len(weight) != len(_at(file, (layer.file, 0))):
            continue  # a classifier of other classes
        scale, shift = _affine(twin, layer)
        if layer.scale is None:
            weight = weight * scale.reshape(-1, *(1,) * (weight.dim() - 1))
        else:
            values[layer.scale] = scale
        values[layer.file, 0] = weight
        if layer.shift is not None:
            values[layer.shift] = shift
        elif shift.any():
            raise FgvcError(
                f"the file's layer {file.uses[layer.file].operands[0].names[0]!r} has no bias for that of the weights"
            )
    return values | {theirs: _at(twin, mine) for mine, theirs in pairing.same.items()}


def _parameters(
    file: OnnxNet, operand: Operand, value: Tensor, mine: Operand | None, own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The parameters of the file's module that an operand is of, so that it has this value. Where the file computes it from
    others, as the net does (`mine`), they are the net's own."""
    parameters = dict(file.named_parameters()) | dict(file.named_buffers())
    whole = operand.value.double()
    if operand.direct:
        tensors = {operand.names[0]: value.reshape(whole.shape).T if operand.turned else value}
    elif len(operand.names) == 1 and torch.equal(parameters[operand.names[0]].double().flatten(), whole.flatten()):
        tensors = {operand.names[0]: value}  # a view of it
    else:
        tensors, names = {}, list(operand.names)
        for other in () if mine is None else mine.names:
            name = next((name for name in names if parameters[name].numel() == own[other].numel()), None)
            if name is None:
                raise FgvcError(
                    f"the file computes numbers from {', '.join(operand.names)} otherwise than timm's net: they can't be laid"
                )
            names.remove(name)
            tensors[name] = own[other].detach()
    return {name: tensor.reshape(parameters[name].shape) for name, tensor in tensors.items()}
