"""A bundle's int8 and fp16 files against its float file, an image at a time: `python benchmarks/variant_speed.py BUNDLE OUT.csv`.

On one thread, in turn A/B/B/A, in blocks of 10 images, by the same code as `fgvc bench`.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np

from fgvc.runtime.bundle import load_bundle
from fgvc.runtime.engine import Engine
from fgvc.studies.speed import interleaved, write_csv

BLOCK, PAIRS = 10, 40


def main(folder: Path, out: Path) -> None:
    bundle = load_bundle(folder)
    x = np.random.default_rng(0).normal(size=(1, 3, *bundle.preprocess.size)).astype(np.float32)

    def block(engine: Engine) -> None:
        for _ in range(BLOCK):
            engine.logits(x)

    plain = partial(block, Engine(bundle, threads=1))
    name = f"{bundle.contract['backbone']}, {bundle.preprocess.size[0]} px, 1 thread, {BLOCK} images"
    ratios = [
        interleaved(
            f"{variant} / float ({name})",
            partial(block, Engine(bundle, threads=1, variant=variant)),
            plain,
            pairs=PAIRS,
        )
        for variant in ("int8", "fp16")
    ]
    for ratio in ratios:
        print(ratio)
    write_csv(out, ratios)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
