"""Builds timm.json.gz, the shapes of the layers of all of timm's nets, by which a file's net is looked up.

    python -m fgvc.models.lookup.make_table [OUT [NAME...]]       # ten minutes on a core; the installed timm, no weights

Nets are made on the device meta, in the shape in which they are trained, and in that in which they ship where timm fuses branches
(RepVGG, MobileOne...). What timm can't make so is listed at the end.
"""

from __future__ import annotations

import gzip
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import timm
import torch
from torch import nn

from fgvc.models.backbone import deployed
from fgvc.models.lookup.table import TABLE
from fgvc.models.lookup.trace import stages_of, traced

FUSES = ("reparameterize", "switch_to_deploy", "fuse")  # methods of blocks that timm fuses
Layers = list[tuple[int, ...]]
Stages = tuple[tuple[int, int], ...]


def forms(name: str) -> Iterator[tuple[bool, Layers, Stages]]:
    """Whether branches are fused, the shapes of the layers but for the heads, in the order of their use, and timm's stages."""
    with torch.device("meta"):
        net = timm.create_model(name).eval()
    plain, stages = layers(net), stages_of(net)
    yield False, plain, stages
    if any(hasattr(module, name) for module in net.modules() for name in FUSES):
        with torch.device("meta"):
            fused = layers(deployed(net))
        if sorted(fused) != sorted(plain):
            yield True, fused, stages


def layers(net: nn.Module) -> Layers:
    """Shapes of a net's layers, in the order of their use, for images of its default size."""
    size = net.default_cfg["input_size"]  # type: ignore[index]
    trace = traced(net, torch.empty(1, *size, device="meta"))
    return [trace.uses[number].key for number in trace.layers]


def main(out: Path = TABLE, only: Sequence[str] = ()) -> None:
    warnings.simplefilter("ignore")
    nets: dict[tuple[bool, tuple[tuple[int, ...], ...], Stages], list[str]] = {}
    failed: list[str] = []
    names = [
        name for name in only or timm.list_models() if timm.model_entrypoint(name).__module__.startswith("timm.")
    ]
    for at, name in enumerate(names):
        try:
            for fused, shapes, stages in forms(name):
                nets.setdefault((fused, tuple(shapes), stages), []).append(name)
        except Exception as error:  # nets raise whatever they like
            failed.append(f"{name}: {type(error).__name__}: {str(error)[:100]}")
        print(f"{at + 1}/{len(names)} {name}", file=sys.stderr, flush=True)
    every = sorted({shape for _, own, _ in nets for shape in own})
    number = {shape: at for at, shape in enumerate(every)}
    table = {
        "timm": timm.__version__,
        "shapes": every,
        "nets": [
            {"names": names, "fused": fused, "layers": [number[shape] for shape in own], "stages": stages}
            for (fused, own, stages), names in nets.items()
        ],
    }
    out.write_bytes(gzip.compress(json.dumps(table, separators=(",", ":")).encode(), 9, mtime=0))
    print(f"{len(names)} nets of timm {timm.__version__}, {len(nets)} of different layers: {out.stat().st_size} bytes")
    print("\n".join(["not in the table:", *failed]) if failed else "all are in the table")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else TABLE, sys.argv[2:])
