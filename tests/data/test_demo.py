import hashlib

import numpy as np
import pytest
from PIL import Image

from fgvc.config.data import CubData
from fgvc.data.drawn import beetles as demo
from fgvc.data.drawn.beetles import PARTS, TRAITS, draw_demo, draw_specimen, traits_of
from fgvc.data.sources.read import read_source
from fgvc.errors import FgvcError

# Frozen: comparisons between techniques are made on these pictures. Another drawing needs another VERSION.
GOLDEN = {
    (0, 0, 0, 0): "b961f944c33d93d77497576d2c628e097777843f17df911d35a47bb1b799cdea",
    (0, 0, 5, 17): "84682463fbd45de2e6f6520b1313f7ba19c62b6abc95bbdf1320b54228c409d2",
    (0, 1, 3, 2): "be611cec9d985015a19ee9fa3f2d05dc35de121312656561171807e4b0bf7dd4",
    (0, 1, 7, 59): "24bfd93312b39da16ef8eba7174d300428d96671b6fcd7d6bccf3ff3d246b3dd",
    (1, 0, 2, 1): "29808094866dd13e27a9e771b98c2f3b6d9f5b24e9f7e353bbf18cceddd29d2b",
}
GOLDEN_TABLES = "9200039b31ed59172a3ccda2efe88904dbd618846f0764012bfa75bdf532a908"


@pytest.mark.parametrize(("seed", "split", "label", "number"), list(GOLDEN))
def test_pictures_are_frozen(seed, split, label, number):
    assert demo.VERSION == 1
    image = draw_specimen((seed, split, label, number), traits_of(label)).image
    assert hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest() == GOLDEN[seed, split, label, number]


def test_tables_are_frozen(tmp_path):
    draw_demo(tmp_path / "set", classes=3, train_per_class=2, test_per_class=1)
    text = b"".join(name.encode() + (tmp_path / "set" / name).read_bytes() for name in sorted(demo.CUB_FILES))
    assert hashlib.sha256(text).hexdigest() == GOLDEN_TABLES


@pytest.mark.parametrize("key", [(0, 0, 0, 0), (5, 1, 3, 2), (9, 0, 7, 11)])
@pytest.mark.parametrize("trait", [0, 1, 2])
def test_a_trait_changes_its_own_part_and_nothing_else(key, trait):
    plain, other = [0, 0, 0], [0, 0, 0]
    other[trait] = 1
    a, b = (draw_specimen(key, tuple(traits)) for traits in (plain, other))
    assert a.image.size == b.image.size
    assert a.parts == b.parts
    changed = np.abs(np.asarray(a.image, np.int16) - np.asarray(b.image, np.int16)).sum(axis=2) > 0
    ys, xs = np.nonzero(changed)
    assert 20 < len(ys) < 0.06 * changed.size
    # All of it lies near the parts that the trait is about.
    about = [
        (PARTS.index("horn"),),
        (PARTS.index("left wing"), PARTS.index("right wing")),
        (PARTS.index("collar"), PARTS.index("tip")),
    ]
    places = [a.parts[p][:2] for p in about[trait] if a.parts[p][2]]
    assert places
    distance = np.min([np.hypot(xs - x, ys - y) for x, y in places], axis=0)
    if len(places) == len(about[trait]):
        assert distance.max() < 0.2 * min(a.image.size)


def test_classes_are_the_combinations_of_the_traits():
    assert len({traits_of(label) for label in range(8)}) == 8
    assert traits_of(0) == (0, 0, 0)
    assert traits_of(6) == (1, 1, 0)
    assert all(len(words) == 2 for words in TRAITS)


@pytest.mark.parametrize("number", range(12))
def test_box_and_parts_lie_in_the_picture(number):
    specimen = draw_specimen((1, 0, 2, number), traits_of(2))
    x, y, w, h = specimen.box
    width, height = specimen.image.size
    assert x >= 0
    assert y >= 0
    assert x + w <= width + 0.1
    assert y + h <= height + 0.1
    assert w * h > 0.1 * width * height
    assert len(specimen.parts) == len(PARTS)
    for px, py, visible in specimen.parts:
        assert visible in (0, 1)
        assert (px, py) == (0, 0) if not visible else (x <= px <= x + w and y <= py <= y + h)


def test_the_set_has_cubs_layout_and_each_picture_hangs_on_its_own_key(tmp_path):
    calls = []
    draw_demo(
        tmp_path / "a", train_per_class=2, test_per_class=1, progress=lambda done, total: calls.append((done, total))
    )
    index = read_source(CubData(root=tmp_path / "a", val_fraction=0))
    assert calls == [(i, 24) for i in range(1, 25)]
    assert index.classes[0] == "001.Rhino_Spotted_Collared"
    assert index.classes[7] == "008.Stag_Barred_Tipped"
    assert np.bincount(index.labels).tolist() == [3] * 8
    assert [len(index.rows(split)) for split in ("train", "test")] == [16, 8]
    assert index.part_names == PARTS
    for row in range(0, len(index), 7):
        with Image.open(index.path(row)) as image:
            x, y, w, h = index.boxes[row].tolist()
            assert x + w <= image.width + 0.2
            assert y + h <= image.height + 0.2
    # Another number of training pictures moves no test picture.
    draw_demo(tmp_path / "b", train_per_class=1, test_per_class=1)
    other = read_source(CubData(root=tmp_path / "b", val_fraction=0))
    tests = [[i.path(row).read_bytes() for row in i.rows("test")] for i in (index, other)]
    assert tests[0] == tests[1]
    assert len(set(tests[0])) == 8
    assert not list(tmp_path.glob(".*"))


def test_another_seed_draws_other_pictures():
    a, b = (draw_specimen((seed, 0, 0, 0), traits_of(0)).image for seed in (0, 1))
    assert a.size != b.size or a.tobytes() != b.tobytes()


def test_what_is_there_is_never_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FgvcError, match="is there already"):
        draw_demo(tmp_path / "mine", train_per_class=1, test_per_class=1)
    assert [f.name for f in tmp_path.rglob("*")] == ["mine", "thesis.txt"]
    (tmp_path / "empty").mkdir()
    draw_demo(tmp_path / "empty", classes=2, train_per_class=1, test_per_class=1)
    assert (tmp_path / "empty" / "images.txt").is_file()


def test_an_interrupted_drawing_leaves_nothing(tmp_path):
    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_demo(tmp_path / "set", progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "words"), [({"classes": 9}, "2 to 8 classes"), ({"test_per_class": 0}, "at least one")]
)
def test_impossible_sets_are_refused(tmp_path, settings, words):
    with pytest.raises(FgvcError, match=words):
        draw_demo(tmp_path / "set", **settings)
