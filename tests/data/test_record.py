"""The record of a run's images: what is written is what is read, and what has changed is named."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from fgvc.data.index import ImageIndex
from fgvc.data.sources.columns import TEXT
from fgvc.errors import FgvcError
from fgvc.runs import record as recording
from fgvc.runs.record import ABSENT, NAME, Record, changes


def index(root: Path, count: int = 12) -> ImageIndex:
    """An index with every column; a file of i bytes for each row but the last, which is missing."""
    names = [f"a/é {i:02d}\n.png" if i == 3 else f"a/{i:02d}.png" for i in range(count)]
    (root / "a").mkdir(parents=True)
    for i, name in enumerate(names[:-1]):
        (root / name).write_bytes(b"x" * i)
    numbers = np.arange(count)
    return ImageIndex(
        root=root,
        classes=("b", "ä", "c"),
        paths=np.array(names, dtype=TEXT),
        labels=(numbers % 3).astype(np.int32),
        splits=(numbers % 4 // 2).astype(np.int8),
        groups=np.array(["", *(f"g{i // 2}" for i in range(1, count))], dtype=TEXT),
        boxes=np.where(numbers[:, None] == 1, np.nan, numbers[:, None] + np.arange(4)).astype(np.float32),
        parts=np.zeros((count, 2, 3), np.float32),
        part_names=("beak", "tail"),
        recognised="a set",
        warnings=("odd",),
        max_pixels=10,
    )


def write(record: Record, folder: Path) -> Path:
    path = folder / NAME
    path.write_bytes(record.dump())
    return path


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    record = Record.of(index(tmp_path / "set"))
    read = recording.load(write(record, tmp_path), tmp_path / "elsewhere")
    assert read.sizes.tolist() == [*range(11), ABSENT]
    assert read.index.root == tmp_path / "elsewhere"
    for field in fields(ImageIndex):
        mine, theirs = getattr(record.index, field.name), getattr(read.index, field.name)
        if isinstance(mine, np.ndarray):
            assert mine.dtype == theirs.dtype, field.name
            np.testing.assert_array_equal(mine, theirs, err_msg=field.name)
        elif field.name not in ("root", "max_pixels"):  # of whoever reads
            assert mine == theirs, field.name


def test_columns_that_a_set_does_not_have_stay_away(tmp_path: Path) -> None:
    bare = replace(index(tmp_path / "set"), groups=None, boxes=None, parts=None, part_names=())
    read = recording.load(write(Record.of(bare), tmp_path), tmp_path).index
    assert (read.groups, read.boxes, read.parts, read.part_names) == (None, None, None, ())


def test_the_bytes_and_the_digest_depend_on_the_images_alone(tmp_path: Path) -> None:
    here, there = Record.of(index(tmp_path / "set")), Record.of(index(tmp_path / "moved"))
    assert here.dump() == there.dump()
    assert here.digest == there.digest
    others = [
        replace(here.index, splits=1 - here.index.splits),
        replace(here.index, labels=here.index.labels[::-1].copy()),
        replace(here.index, paths=here.index.paths[::-1].copy()),
        replace(here.index, classes=("b", "c", "ä")),
        replace(here.index, boxes=None),
    ]
    digests = {here.digest, *(Record(other, here.sizes).digest for other in others)}
    assert len({*digests, Record(here.index, here.sizes + 1).digest}) == 7


def test_it_is_read_without_torch_and_without_pickle(tmp_path: Path) -> None:
    path = write(Record.of(index(tmp_path / "set")), tmp_path)
    code = (
        "import sys; from pathlib import Path; from fgvc.runs.record import load; "
        f"print(len(load(Path({str(path)!r}), Path('x')).index)); "
        "assert not {'torch', 'timm', 'cv2', 'albumentations'} & set(sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout) == (0, "12\n"), process.stderr


def test_damage_is_found(tmp_path: Path) -> None:
    record = Record.of(index(tmp_path / "set"))
    path = write(record, tmp_path)
    whole, silent = path.read_bytes(), 0
    for at in range(0, len(whole), 5):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at:][1:])
        with suppress(FgvcError):
            assert recording.load(path, tmp_path).digest == record.digest  # as in a zip's dates
            silent += 1
    assert silent < len(whole) / 5 / 2
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(FgvcError, match="damaged"):
            recording.load(path, tmp_path)


def test_another_record_with_the_old_digest_is_refused(tmp_path: Path) -> None:
    path = write(Record.of(index(tmp_path / "set")), tmp_path)
    with np.load(path, allow_pickle=False) as saved:
        columns = {name: saved[name] for name in saved.files}
    columns["splits"] = 1 - columns["splits"]
    np.savez_compressed(path, **columns)
    with pytest.raises(FgvcError, match="its digest is another"):
        recording.load(path, tmp_path)


def test_what_changed_is_named(tmp_path: Path) -> None:
    then = index(tmp_path / "set")
    record = Record.of(then)
    assert not changes(record, then)
    rows = np.r_[1:11, 11]  # the first is no longer listed
    labels, splits = then.labels[rows].copy(), then.splits[rows].copy()
    labels[1], splits[2] = 1, 1
    columns = {"groups": None, "boxes": None, "parts": None, "part_names": ()}
    now = replace(then, paths=then.paths[rows], labels=labels, splits=splits, **columns)
    (then.root / "a/05.png").unlink()
    (then.root / "a/06.png").write_bytes(b"")
    difference = changes(record, now)
    assert difference.gone == ("a/00.png", "a/05.png")
    assert (difference.added, difference.changed, difference.relabelled) == ((), ("a/06.png",), ("a/02.png",))
    assert difference.moved == (), "a new draw moves many where a file is gone"
    assert changes(record, replace(then, splits=1 - then.splits), files=False).moved == tuple(then.paths.tolist())
    assert "another order" in changes(record, replace(then, classes=("ä", "b", "c")), files=False).classes
    assert "new d, gone c" in changes(record, replace(then, classes=("b", "ä", "d")), files=False).classes
    assert any("a/00.png" in line for line in difference.lines())


@pytest.mark.parametrize("name", ["boxes", "parts", "groups"])
def test_another_box_part_or_group_is_a_change(tmp_path: Path, name: str) -> None:
    now = index(tmp_path)
    record = Record.of(now)
    assert not changes(record, now).annotated
    column = getattr(now, name).copy()
    column[5] = "other" if name == "groups" else 99
    assert changes(record, replace(now, **{name: column})).annotated == ("a/05.png",)
    difference = changes(record, replace(now, **{name: None}))
    assert len(difference.annotated) == len(now)
    assert f"{len(now)} with another box, other parts or another group" in difference.lines()[-1]


def test_the_order_of_rows_is_no_change_and_a_file_listed_twice_is_two_rows(tmp_path: Path) -> None:
    then = index(tmp_path / "set")
    twice = replace(then, paths=np.array(["a/01.png", *then.paths.tolist()[1:]], dtype=TEXT))
    record, back = Record.of(twice), np.arange(12)[::-1]
    columns = ("paths", "labels", "splits", "groups", "boxes", "parts")
    assert not changes(Record.of(then), replace(then, **{name: getattr(then, name)[back] for name in columns}))
    assert not changes(record, twice)
    assert changes(record, then).lines()[:2] == ["1 added: a/00.png", "1 gone: a/01.png"]


def test_a_million_images_are_a_few_megabytes(tmp_path: Path) -> None:
    count = 200_000
    names = [f"class-{i % 500:03d}/photograph-{i * 7919 % 1_000_003:07d}.jpg" for i in range(count)]
    numbers = np.arange(count)
    large = ImageIndex(
        root=tmp_path, classes=tuple(map(str, range(500))), paths=np.array(names, dtype=TEXT),
        labels=(numbers % 500).astype(np.int32), splits=np.zeros(count, np.int8),
    )  # fmt: skip
    record = Record(large, np.random.default_rng(0).integers(20_000, 400_000, count))
    path = write(record, tmp_path)
    assert path.stat().st_size < 20 * count, "bytes an image"
    assert np.array_equal(recording.load(path, tmp_path).index.paths, large.paths)
