"""Kept logits: what was written for the very crop comes back, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fgvc.errors import FgvcError
from fgvc.techniques.distill.logits import GEOMETRY, LogitFile

N, K = 10, 4


def opened(path: Path) -> LogitFile:
    LogitFile.make(path, (N, K))
    return LogitFile(path, (N, K))


def sample(*rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, their crops, and logits that tell the row."""
    index = torch.tensor(rows)
    geometry = torch.arange(6.0).view(1, 2, 3) + index.view(-1, 1, 1) / 7
    return index, geometry, torch.randn(len(rows), K, generator=torch.Generator().manual_seed(sum(rows)))


def test_what_is_kept_comes_back_with_the_same_bits(tmp_path: Path) -> None:
    index, geometry, logits = sample(7, 0, 3)
    opened(tmp_path / "cache" / "epoch").record(index, geometry, logits)
    again = opened(tmp_path / "cache" / "epoch")
    assert torch.equal(again.recall(index, geometry), logits)
    assert torch.equal(again.recall(index[1:], geometry[1:]), logits[1:])
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["epoch"]


def test_one_unknown_row_and_the_batch_is_asked_anew(tmp_path: Path) -> None:
    file, (index, geometry, logits) = opened(tmp_path / "f"), sample(7, 0, 3)
    assert file.recall(index, geometry) is None
    file.record(index[:2], geometry[:2], logits[:2])
    assert file.recall(index, geometry) is None


def test_another_crop_of_the_same_image_is_not_known(tmp_path: Path) -> None:
    file, (index, geometry, logits) = opened(tmp_path / "f"), sample(5, 6)
    file.record(index, geometry, logits)
    geometry[1, 0, 2] += 0.25
    assert file.recall(index, geometry) is None


def test_an_image_that_stands_in_for_another_in_its_own_batch_is_not_mistaken(tmp_path: Path) -> None:
    file, (index, geometry, logits) = opened(tmp_path / "f"), sample(5, 5)
    geometry[1] += 1
    file.record(index, geometry, logits)
    assert file.recall(index, geometry) is None
    assert torch.equal(file.recall(index[1:], geometry[1:]), logits[1:])


@pytest.mark.parametrize("written", range(GEOMETRY + K))
def test_a_row_that_was_written_in_part_is_not_known(tmp_path: Path, written: int) -> None:
    file, (index, geometry, logits) = opened(tmp_path / "f"), sample(2)
    file.record(index, geometry, logits)
    rows = np.memmap(tmp_path / "f", dtype=np.float32, mode="r+", shape=(N, GEOMETRY + K + 1))
    rows[2, written:] = np.nan
    rows.flush()
    assert opened(tmp_path / "f").recall(index, geometry) is None


@pytest.mark.parametrize("byte", range(4 * (GEOMETRY + K + 1)))
def test_a_row_with_a_flipped_bit_is_not_known(tmp_path: Path, byte: int) -> None:
    file, (index, geometry, logits) = opened(tmp_path / "f"), sample(2, 3)
    file.record(index, geometry, logits)
    content = np.memmap(tmp_path / "f", dtype=np.uint8, mode="r+")
    content[2 * 4 * (GEOMETRY + K + 1) + byte] ^= 1 << byte % 8
    content.flush()
    assert opened(tmp_path / "f").recall(index, geometry) is None
    assert torch.equal(opened(tmp_path / "f").recall(index[1:], geometry[1:]), logits[1:])


def test_a_file_cut_short_is_made_anew_and_a_whole_one_stays(tmp_path: Path) -> None:
    index, geometry, logits = sample(2)
    opened(tmp_path / "f").record(index, geometry, logits)
    assert opened(tmp_path / "f").recall(index, geometry) is not None
    content = (tmp_path / "f").read_bytes()
    (tmp_path / "f").write_bytes(content[:-5])
    assert opened(tmp_path / "f").recall(index, geometry) is None
    assert len((tmp_path / "f").read_bytes()) == len(content)


def test_a_place_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FgvcError, match=r"file/f: can't write"):
        LogitFile.make(tmp_path / "file" / "f", (N, K))
    with pytest.raises(FgvcError, match=r"nothing: can't cache logits here"):
        LogitFile(tmp_path / "nothing", (N, K))
