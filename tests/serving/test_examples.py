"""Pictures that the server's page offers: which, how large, and over HTTP."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from fgvc.errors import FgvcError, ImageError
from fgvc.serving.examples import MOST, SIDE, read_examples
from tests.conftest import paint
from tests.serving import small


def draw(folder: Path, classes: int, each: int, size: tuple[int, int] = (48, 40)) -> Path:
    for number in range(classes):
        for at in range(each):
            paint(folder / f"class {number}" / f"{number}-{at}.png", (90, 40 * number, 90), seed=at, size=size)
    return folder


def test_they_are_spread_evenly_over_all_pictures(tmp_path: Path) -> None:
    many = read_examples([draw(tmp_path / "many", classes=4, each=10)])
    assert len(many) == MOST
    assert [sum(example.name.startswith(f"{number}-") for example in many) for number in range(4)] == [2, 2, 2, 2]
    few = read_examples([draw(tmp_path / "few", classes=3, each=1)])
    assert [example.name for example in few] == ["0-0.png", "1-0.png", "2-0.png"]


def test_a_large_picture_is_made_smaller(tmp_path: Path) -> None:
    (example,) = read_examples([draw(tmp_path, classes=1, each=1, size=(1280, 320))])
    with Image.open(BytesIO(example.jpeg)) as image:
        assert (image.format, image.size) == ("JPEG", (SIDE, SIDE // 4))


def test_a_path_that_is_none_or_no_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(FgvcError, match="none: no such file"):
        read_examples([tmp_path / "none"])
    (tmp_path / "torn.png").write_bytes(b"no")
    with pytest.raises(ImageError, match=r"torn\.png: not an image"):
        read_examples([tmp_path / "torn.png"])


def test_they_are_listed_and_fetched(tmp_path: Path) -> None:
    served = small.service({"leaves": small.save_bundle(tmp_path / "bundle")})
    assert small.ask(served, "GET", "/v1/examples").json() == {"examples": []}
    served.examples = read_examples([draw(tmp_path / "pictures", classes=2, each=1)])
    assert small.ask(served, "GET", "/v1/examples").json() == {"examples": ["0-0.png", "1-0.png"]}
    answer = small.ask(served, "GET", "/v1/examples/1")
    assert (answer.headers["content-type"], answer.content) == ("image/jpeg", served.examples[1].jpeg)
    none = small.ask(served, "GET", "/v1/examples/2")
    assert (none.status_code, none.json()) == (404, {"error": "there are 2 examples, numbered from 0"})
    for path in ("/v1/examples", "/v1/examples/1"):  # pictures are no less than answers
        assert small.ask(served, "GET", path, key="secret").status_code == 401
