"""The cache gives what decoding gives, is never half there, and follows the files it was made of."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.dtypes import StringDType
from PIL import Image

from fgvc.data import cache as module
from fgvc.data.cache import DecodeCache, shrunk
from fgvc.data.index import ImageIndex
from fgvc.errors import FgvcError, ImageError
from fgvc.images.decode import decode


def picture(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def make_index(root: Path, count: int = 6) -> ImageIndex:
    root.mkdir(exist_ok=True)
    for n in range(count):
        picture(20 + 7 * n, 50 - 5 * n, n).save(root / f"{n}.png")
    paths = np.array([f"{n}.png" for n in range(count)], dtype=StringDType())
    labels, splits = np.arange(count, dtype=np.int32) % 2, np.zeros(count, dtype=np.int8)
    return ImageIndex(root=root, classes=("a", "b"), paths=paths, labels=labels, splits=splits)


@pytest.fixture
def index(tmp_path: Path) -> ImageIndex:
    return make_index(tmp_path / "set")


def opened(index: ImageIndex, folder: Path, **options: object) -> DecodeCache:
    return DecodeCache.open(index, np.arange(len(index)), **({"side": 1000, "folder": folder} | options))


def test_images_equal_decoded_ones(index: ImageIndex, tmp_path: Path) -> None:
    cache = opened(index, tmp_path / "cache")
    for row in (3, 0, 5, 1, 2, 4, 3):
        image, original = cache.image(row)
        np.testing.assert_array_equal(image, np.asarray(decode(index.path(row))))
        assert original == image.shape[1::-1]
    assert cache.bad == []


def test_images_are_shrunk_never_enlarged_and_know_their_original_size(index: ImageIndex, tmp_path: Path) -> None:
    cache = opened(index, tmp_path / "cache", side=30)
    for row in range(len(index)):
        image, original = cache.image(row)
        whole = decode(index.path(row))
        assert original == whole.size
        assert min(image.shape[:2]) == min(30, *whole.size)
        assert image.shape[1] / image.shape[0] == pytest.approx(whole.width / whole.height, rel=0.03)
    assert cache.image(0)[0].shape == (50, 20, 3)


def test_shrinking_averages() -> None:
    checks = np.kron(np.indices((60, 90)).sum(0) % 2, np.ones((1, 1)))[..., None] * np.uint8(200)
    image = shrunk(Image.fromarray(np.repeat(checks, 3, -1).astype(np.uint8)), 20)
    assert image.size == (30, 20)
    assert np.abs(np.asarray(image).astype(int)[2:-2, 2:-2] - 100).max() <= 6  # antialiased: grey, not black or white


def test_second_opening_reads_no_image(index: ImageIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(index, tmp_path / "cache")
    monkeypatch.setattr(type(index), "picture", lambda *_, **__: pytest.fail("decoded again"))
    opened(index, tmp_path / "cache")


@pytest.mark.parametrize("change", ["content", "time", "path", "side", "rows"])
def test_any_change_makes_a_new_cache(index: ImageIndex, tmp_path: Path, change: str) -> None:
    first = opened(index, tmp_path / "cache")
    path, options, rows = index.path(2), {"side": 1000}, np.arange(len(index))
    if change == "content":
        picture(9, 9, 99).save(path)
    elif change == "time":
        os.utime(path, (1, 1))
    elif change == "path":
        path.rename(path.with_name("x.png"))
        index.paths[2] = "x.png"
    elif change == "side":
        options = {"side": 25}
    else:
        rows = rows[:-1]
    second = DecodeCache.open(index, rows, folder=tmp_path / "cache", **options)
    assert second.folder != first.folder
    if change == "content":
        assert second.image(2)[0].shape == (9, 9, 3)


def test_unreadable_images_are_recorded_with_their_reason(index: ImageIndex, tmp_path: Path) -> None:
    index.path(1).write_bytes(b"text")
    index.path(4).unlink()
    for _ in range(2):  # as built, as read back
        cache = opened(index, tmp_path / "cache")
        assert [(error.path, error.reason) for error in cache.bad] == [
            (str(index.path(1)), "not an image"),
            (str(index.path(4)), "missing"),
        ]
        with pytest.raises(ImageError, match="not an image"):
            cache.image(1)
        np.testing.assert_array_equal(cache.image(5)[0], np.asarray(decode(index.path(5))))


def test_all_unreadable_and_no_rows(index: ImageIndex, tmp_path: Path) -> None:
    for row in range(len(index)):
        index.path(row).write_bytes(b"text")
    assert len(opened(index, tmp_path / "cache").bad) == len(index)
    assert len(DecodeCache.open(index, np.array([], np.int64), side=9, folder=tmp_path / "cache").rows) == 0


def test_a_row_that_is_not_in_it(index: ImageIndex, tmp_path: Path) -> None:
    cache = DecodeCache.open(index, np.array([4, 2]), side=1000, folder=tmp_path / "cache")
    np.testing.assert_array_equal(cache.image(4)[0], np.asarray(decode(index.path(4))))
    for row in (3, 5):
        with pytest.raises(KeyError, match="not among"):
            cache.image(row)


def test_pickling_is_small_and_works(index: ImageIndex, tmp_path: Path) -> None:
    cache = opened(index, tmp_path / "cache")
    expected = cache.image(3)[0]
    data = pickle.dumps(cache)
    assert len(data) < 5000
    copy = pickle.loads(data)  # noqa: S301
    np.testing.assert_array_equal(copy.image(3)[0], expected)


def test_images_survive_closing(index: ImageIndex, tmp_path: Path) -> None:
    cache = opened(index, tmp_path / "cache")
    image, _ = cache.image(3)
    cache.close()
    np.testing.assert_array_equal(image, np.asarray(decode(index.path(3))))
    assert cache.image(3)[0].shape == image.shape


def test_no_room_is_said_before_anything_is_written(
    index: ImageIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(FgvcError, match="cache=none"):
        opened(index, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_failing_disk_leaves_nothing(index: ImageIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_to_disk", full)
    with pytest.raises(FgvcError, match="disk is full"):
        opened(index, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_progress_is_told(index: ImageIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(module, "_QUIET_SECONDS", -1)
    opened(index, tmp_path / "cache", progress=lines.append)
    assert lines[0].startswith("decoding 6 images")
    assert lines[-1] == "decoded 6 of 6 images"


BUILD = """
import sys, time
from pathlib import Path
import numpy as np
from fgvc.data import cache
from tests_cache_index import index
plain = cache.shrunk
def slow(image, side):
    time.sleep(float(sys.argv[2]))
    return plain(image, side)
cache.shrunk = slow
root = Path(sys.argv[1])
found = cache.DecodeCache.open(index(root), np.arange(6), side=1000, folder=root.parent / "cache")
print(found.folder.name)
"""


def builder(root: Path, delay: float) -> subprocess.Popen[str]:
    """Another process that builds the same cache, waiting after each image."""
    helper = root.parent / "tests_cache_index.py"
    if not helper.exists():  # else another process may be reading it
        helper.write_text(
            "import numpy as np\nfrom numpy.dtypes import StringDType\nfrom fgvc.data.index import ImageIndex\n"
            "def index(root):\n"
            "    paths = np.array([f'{n}.png' for n in range(6)], dtype=StringDType())\n"
            "    return ImageIndex(root=root, classes=('a', 'b'), paths=paths, labels=np.zeros(6, np.int32),"
            " splits=np.zeros(6, np.int8))\n"
        )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root.parent), *sys.path])}
    command = [sys.executable, "-c", BUILD, str(root), str(delay)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_two_builders_at_once(index: ImageIndex, tmp_path: Path) -> None:
    both = [builder(index.root, 0.05) for _ in range(2)]
    names = {process.communicate(timeout=60)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == list(names)
    np.testing.assert_array_equal(opened(index, tmp_path / "cache").image(3)[0], picture(41, 35, 3))


def test_a_killed_builder_leaves_no_cache_and_its_remains_go(index: ImageIndex, tmp_path: Path) -> None:
    process = builder(index.root, 30)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("cache/*.tmp/building")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    left = list((tmp_path / "cache").iterdir())
    assert len(left) == 1
    opened(index, tmp_path / "cache", side=7)  # another cache: a builder at work is left in peace
    assert left[0].exists()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    cache = opened(index, tmp_path / "cache")
    assert not left[0].exists()
    np.testing.assert_array_equal(cache.image(3)[0], picture(41, 35, 3))
    assert len(list((tmp_path / "cache").iterdir())) == 2


def damaged(content: bytes, kind: str, at: float) -> bytes:
    """The content of a file, damaged at a share of it: one bit flipped, the rest cut off, or all gone."""
    place = int(at * (len(content) - 1))
    if kind == "bit":
        return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]
    return content[:place] if kind == "cut" else b""


@pytest.mark.parametrize("name", ["pixels.bin", "index.npz"])
@pytest.mark.parametrize(("kind", "at"), [("bit", 0.0), ("bit", 0.4), ("bit", 0.9), ("cut", 0.5), ("cut", 0.99), ("gone", 0)])
def test_damage_is_noticed_and_the_cache_built_anew(
    index: ImageIndex, tmp_path: Path, name: str, kind: str, at: float
) -> None:
    whole = opened(index, tmp_path / "cache")
    expected = [(pixels.copy(), size) for pixels, size in (whole.image(row) for row in range(6))]
    file = whole.folder / name
    content = file.read_bytes()
    file.unlink() if kind == "gone" else file.write_bytes(damaged(content, kind, at))
    for _ in range(2):  # a session with the damage, and the next one
        again = opened(index, tmp_path / "cache")
        for row, (pixels, size) in enumerate(expected):
            cached = again.image(row)
            np.testing.assert_array_equal(cached[0], pixels)
            assert cached[1] == size
    if name == "pixels.bin":
        assert file.read_bytes() == content
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [whole.folder.name], "no remains"


def test_pixels_that_are_damaged_while_they_are_read_are_decoded_anew(index: ImageIndex, tmp_path: Path) -> None:
    cache = opened(index, tmp_path / "cache", side=20)
    expected = cache.image(3)[0].copy()
    cache.close()
    with (cache.folder / "pixels.bin").open("r+b") as file:
        file.write(bytes(file.seek(0, 2)))
        file.seek(0)
        file.write(bytes(10_000))
    np.testing.assert_array_equal(cache.image(3)[0], expected)
    assert (cache.folder / "damaged").is_file()
    assert not (opened(index, tmp_path / "cache", side=20).folder / "damaged").exists()
