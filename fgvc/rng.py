"""Keyed random generators: every random number outside of the model is a function of a key such as (seed, epoch, sample).

No generator is shared, so results don't depend on the number of workers, and a run resumes in mid-epoch without replaying
anything (docs/design.md says what goes wrong otherwise). torch's global generator is left to the model's own dropout.
"""

from __future__ import annotations

import numpy as np


def generator(*key: int) -> np.random.Generator:
    """An independent generator for a key of non-negative integers; equal keys give equal streams.

    numpy pads short keys with zeros: keys that start with the same constant below should have the same length, or end in
    something else than 0.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


# First element of every key: two uses never share a stream.
ORDER, SAMPLE, STEP, SPLIT, DEMO, SPARED = range(6)
