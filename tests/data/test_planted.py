"""Planted faults in a copy of coffee-leaf5: the study of benchmarks/planted_faults.py, and the bars that the search must meet."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

STUDY = Path(__file__).parents[2] / "benchmarks/planted_faults.py"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_planted_faults_are_found(shared: Path) -> None:
    weights = shared / "weights/tf_efficientnet_lite0.safetensors"
    lines = runpy.run_path(str(STUDY))["study"](shared / "data/coffee-leaf5", str(weights), [0, 1, 2, 3, 4])
    assert [line["copies_found"] for line in lines] == ["30 of 30"] * 5
    assert [line["corrupt_found"] for line in lines] == ["5 of 5"] * 5
    assert sum(line["swapped_in_first_60"] for line in lines) / 5 >= 13
