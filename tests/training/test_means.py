"""Running means: those of NumPy over the finite values, and the same after a checkpoint in between."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fgvc.training.means import RunningMeans

value = st.floats(-1e6, 1e6, width=32) | st.sampled_from([float("nan"), float("inf")])


@given(st.lists(st.dictionaries(st.sampled_from("ab"), value), max_size=8), st.integers(0, 8))
def test_means_are_those_of_the_finite_values(steps: list[dict[str, float]], saved: int) -> None:
    running, resumed = RunningMeans(), RunningMeans()
    for number, step in enumerate(steps):
        if number == saved:
            resumed.restore(*running.read())
        values = {name: torch.tensor(one) for name, one in step.items()}
        running.add(values)
        if number >= saved:
            resumed.add(values)
    means = running.means()
    for name in "ab":
        finite = [step[name] for step in steps if name in step and np.isfinite(step[name])]
        assert (name in means) == bool(finite)
        if finite:
            assert means[name] == sum(np.float64(np.float32(one)) for one in finite) / len(finite)
    if saved < len(steps):
        assert resumed.means() == means
