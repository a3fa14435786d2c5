"""What makes a training step on a CPU fast, each choice beside its opposite: `python benchmarks/step_speed.py WEIGHTS OUT.csv`.

A bare step of torch and timm, so that one thing alone changes; in turn A/B/B/A, by the same code as `fgvc bench`.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file

from fgvc.runs.distributed import keep_freed_memory
from fgvc.studies.speed import interleaved, write_csv

BACKBONE, SIZE, BATCH, CLASSES, PAIRS = "tf_efficientnet_lite0", 160, 32, 50, 30
GLIBC = {-4: 65536, -1: 128 << 10}  # mallopt(3): M_MMAP_MAX and M_TRIM_THRESHOLD as a process finds them


def make(
    weights: Path,
    *,
    layout: torch.memory_format = torch.channels_last,
    precision: torch.dtype = torch.float32,
    compiled: bool = False,
    **optimizer: bool,
) -> Callable[[], None]:
    torch.manual_seed(0)
    net = timm.create_model(BACKBONE, num_classes=CLASSES)
    net.load_state_dict({k: v for k, v in load_file(weights).items() if "classifier" not in k}, strict=False)
    net.to(memory_format=layout).train()
    forward = torch.compile(net) if compiled else net
    x = torch.randn(BATCH, 3, SIZE, SIZE).contiguous(memory_format=layout)
    y = torch.arange(BATCH) % CLASSES
    sgd = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, nesterov=True, **optimizer)

    def step() -> None:
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            loss = torch.nn.functional.cross_entropy(forward(x), y, label_smoothing=0.1)
        sgd.zero_grad()
        loss.backward()
        sgd.step()

    return step


def as_found(step: Callable[[], None]) -> None:
    """A step with glibc's own settings, and fgvc's put back after it."""
    libc = ctypes.CDLL("libc.so.6")
    for key, value in GLIBC.items():
        libc.mallopt(key, value)
    step()
    keep_freed_memory()


def main(weights: Path, out: Path) -> None:
    keep_freed_memory()
    plain = make(weights)
    others = {
        "memory kept as glibc does": partial(as_found, plain),
        "contiguous layout": make(weights, layout=torch.contiguous_format),
        "fused SGD": make(weights, fused=True),
        "SGD in a loop": make(weights, foreach=False),
        "torch.compile": make(weights, compiled=True),
        "autocast to bf16": make(weights, precision=torch.bfloat16),
    }
    about = f"{BACKBONE}, {SIZE} px, batch {BATCH}, {torch.get_num_threads()} threads"
    ratios = []
    for name, step in {"the same": make(weights), **others}.items():
        ratios.append(interleaved(f"{name} / as fgvc does ({about})", step, plain, pairs=PAIRS))
        print(ratios[-1], flush=True)
        write_csv(out, ratios)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
