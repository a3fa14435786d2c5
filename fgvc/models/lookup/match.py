"""Matching of the uses of weights in two nets: by shapes, and by the layers before and behind.

Programs that write files fold norms and scales into layers, leave biases to sums, and compute branches in another order. Layers
are told apart by a colour: the shape, then again and again the colours of the layers before and behind (Weisfeiler and Leman,
1968). Layers of one colour are taken in their order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field

from fgvc.models.lookup.trace import Traced

Place = tuple[int, int]  # number of a use, and of its operand
Colours = Mapping[int, Hashable]  # of layers, by their number


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of the twin, with its places in the file."""

    twin: int
    file: int
    folded: tuple[int, ...] = ()  # the twin's uses behind it that the file has folded into it
    scale: Place | None = None  # of the file's: the product that has what is folded; None: the weight has it
    shift: Place | None = None  # of the file's: its bias, or the sum that stands for one


@dataclass(slots=True)
class Pairing:
    """The uses of a twin's weights, with their places in a file."""

    layers: list[Layer] = field(default_factory=list)
    same: dict[Place, Place] = field(default_factory=dict)  # all other operands that both have
    lost: list[Place] = field(default_factory=list)  # operands of the twin's that the file does not have


def pairings(twin: Traced, file: Traced) -> list[Pairing]:
    """Return ways to pair the twin's layers with the file's: by colours, and by order alone; [] where the layers are others."""
    ways: list[dict[int, int]] = []
    for colours in (colours_of, shapes_of):
        a, b = _grouped(colours(twin)), _grouped(colours(file))
        if {colour: len(own) for colour, own in a.items()} == {colour: len(own) for colour, own in b.items()}:
            pairs = {mine: other for colour, own in a.items() for mine, other in zip(own, b[colour], strict=True)}
            ways += [pairs] if pairs not in ways else []
    return [_paired(twin, file, pairs) for pairs in ways]


def shapes_of(net: Traced) -> Colours:
    """The shape of each layer's weight; of a head's, the features alone, since classes are the user's."""
    return {
        number: ("head", use.key[1]) if number in net.heads else use.key
        for number, use in enumerate(net.uses)
        if use.kind == "layer"
    }


def colours_of(net: Traced) -> Colours:
    """Colours of the layers by which they are matched: two have the same where their shapes, those of the layers before and
    behind, those of their neighbours and so on are the same (colour refinement)."""
    colours = shapes_of(net)
    before = {number: net.uses[number].after for number in colours}
    behind: dict[int, list[int]] = {number: [] for number in colours}
    for number, sources in before.items():
        for source in sources:
            behind[source].append(number)

    def around(numbers: Iterable[int]) -> Hashable:
        return frozenset(Counter(colours[number] for number in numbers).items())

    kinds = 0
    while kinds < (kinds := len(set(colours.values()))):
        colours = {n: hash((colours[n], around(before[n]), around(behind[n]))) for n in colours}
    return colours


def _grouped(colours: Colours) -> dict[Hashable, list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for number, colour in colours.items():
        groups.setdefault(colour, []).append(number)
    return groups


def _paired(twin: Traced, file: Traced, pairs: Mapping[int, int]) -> Pairing:
    pairing = Pairing()
    used: set[int] = set()  # of the file's
    for mine, other in pairs.items():
        layer, same = _chained(twin, file, mine, other)
        pairing.layers.append(layer)
        pairing.same |= same
        used |= {number for number, _ in same.values()} | {place[0] for place in (layer.scale, layer.shift) if place}
    done = {number for number, _ in pairing.same} | {number for layer in pairing.layers for number in layer.folded}
    places: tuple[Callable[[int], Hashable], Callable[[int], Hashable]]
    for exact in (True, False):
        mine_left = [n for n, use in enumerate(twin.uses) if use.kind != "layer" and n not in done]
        file_left = [n for n, use in enumerate(file.uses) if use.kind != "layer" and n not in used]
        places = (
            lambda n, exact=exact: frozenset(pairs[at] for at in twin.uses[n].after) if exact else None,  # type: ignore[misc]
            lambda n, exact=exact: file.uses[n].after if exact else None,  # type: ignore[misc]
        )
        a, b = _operands(twin, mine_left, places[0]), _operands(file, file_left, places[1])
        for key, own in a.items():
            if len(own) == len(b.get(key, ())):
                pairing.same |= dict(zip(own, b[key], strict=True))
        done |= {number for number, _ in pairing.same}
        used |= {number for number, _ in pairing.same.values()}
    pairing.lost = [
        (number, at)
        for number, use in enumerate(twin.uses)
        if use.kind != "layer" and not any(number in layer.folded for layer in pairing.layers)
        for at in range(len(use.operands))
        if (number, at) not in pairing.same
    ]
    return pairing


def _operands(net: Traced, numbers: Iterable[int], place: Callable[[int], Hashable]) -> dict[Hashable, list[Place]]:
    """Operands by where they are read and their shape, in their order."""
    operands: dict[Hashable, list[Place]] = {}
    for number in numbers:
        norm = net.uses[number].kind == "norm"
        for at, operand in enumerate(net.uses[number].operands):
            operands.setdefault((place(number), norm and at, operand.form), []).append((number, at))
    return operands


def _chained(twin: Traced, file: Traced, mine: int, other: int) -> tuple[Layer, dict[Place, Place]]:
    """Two layers with the numbers a channel behind them: bias, norms, products, sums. From the end on, what is of one kind is the
    same; what the twin has left is folded into the file's layer, or into the product and the sum behind it. What only the file
    has at the end is none of the layer's."""
    whole = _chain(file, other)
    for length in range(len(whole), -1, -1):
        a, b, same = _chain(twin, mine), whole[:length], dict[Place, Place]()
        while len(a) > 1 and len(b) > 1 and a[-1][0] == b[-1][0]:
            (_, one), (_, two) = a.pop(), b.pop()
            same |= {(one[0], at): (two[0], at) for at in range(len(twin.uses[one[0]].operands))}
        kinds = ["shift" if kind == "bias" else kind for kind, _ in b]
        if a and a[-1][0] == "norm" and kinds == ["norm"]:
            same |= {(a[-1][1][0], at): (b[-1][1][0], at) for at in range(len(twin.uses[a[-1][1][0]].operands))}
            a, b, kinds = a[:-1], [], []
        if kinds in ([], ["shift"], ["scale"], ["scale", "shift"]):
            break
    scale = b[0][1] if kinds[:1] == ["scale"] else None
    shift = b[-1][1] if kinds[-1:] == ["shift"] else None
    return Layer(mine, other, tuple(place[0] for kind, place in a if kind != "bias"), scale, shift), same


def _chain(net: Traced, layer: int) -> list[tuple[str, Place]]:
    bias = [("bias", (layer, 1))] if len(net.uses[layer].operands) == 2 else []
    return bias + [(use.kind, (number, 0)) for number, use in enumerate(net.uses) if use.behind == layer]
