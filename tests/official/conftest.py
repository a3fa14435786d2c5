"""Numbers that published code computed from stored inputs; see the README beside them. Tolerances are ten times the largest
difference that was measured when they were made, or 1e-6 where that was none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch


class Arrays(dict[str, torch.Tensor]):
    """Arrays by name, float64 and int64; settings as numbers."""

    def number(self, name: str) -> Any:
        return self[name].item()

    def of(self, prefix: str) -> Arrays:
        """Those of one case, without its name."""
        return Arrays(
            {key.removeprefix(f"{prefix}_"): value for key, value in self.items() if key.startswith(f"{prefix}_")}
        )


@pytest.fixture(scope="session")
def official(shared: Path) -> Callable[[str], Arrays]:
    def load(name: str) -> Arrays:
        path = shared / "fixtures" / f"{name}.npz"
        if not path.is_file():
            pytest.skip(f"{path} is not there")
        with np.load(path, allow_pickle=False) as stored:
            return Arrays({key: torch.from_numpy(np.array(stored[key])) for key in stored.files})

    return load
