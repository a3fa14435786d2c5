"""Keyed random generators: every random number outside of the model is a function of a key such as (seed, epoch, sample).

No generator is shared, so results don't depend on the number of workers, and a run resumes in mid-epoch without replaying
anything (docs/design.md says what goes wrong otherwise). torch's global generator is left to the model's own dropout.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


def generator(*key: int) -> np.random.Generator:
    """An independent generator for a key of non-negative integers; equal keys give equal streams.

    numpy pads short keys with zeros: keys that start with the same constant below should have the same length, or end in
    something else than 0.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


@contextmanager
def seeded_globals(*key: int) -> Iterator[None]:
    """Seed the global generators of `random`, numpy and torch (its CPU's, where it is imported) from a key, and put them back
    afterwards: for code of other packages that draws from them."""
    of_random, of_numpy, of_torch = generator(GLOBAL, *key).integers(2**32, size=3).tolist()
    torch = sys.modules.get("torch")
    states = random.getstate(), np.random.get_state(), None if torch is None else torch.default_generator.get_state()
    random.seed(of_random)
    np.random.seed(of_numpy)
    if torch is not None:
        torch.default_generator.manual_seed(of_torch)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        if torch is not None:
            torch.default_generator.set_state(states[2])


# First element of every key: two uses never share a stream.
ORDER, SAMPLE, STEP, SPLIT, DEMO, SPARED, GLOBAL = range(7)
