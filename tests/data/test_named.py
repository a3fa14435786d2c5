"""torchvision's sets, drawn small in their own layouts; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from fgvc import api
from fgvc.config.data import NamedData
from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.data.sources.read import read_source
from fgvc.errors import FgvcError


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (len(path.name), 99, 7)).save(path)


def flowers(root: Path) -> None:
    base = root / "flowers-102"
    for number in range(1, 13):
        picture(base / "jpg" / f"image_{number:05d}.jpg")
    savemat(base / "imagelabels.mat", {"labels": [(n % 3) + 1 for n in range(12)]})
    savemat(base / "setid.mat", {"trnid": [1, 2, 3, 4], "valid": [5, 6, 7], "tstid": [8, 9, 10, 11, 12]})


def pets(root: Path) -> None:
    base = root / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    lines = {"trainval": [], "test": []}
    for number in range(40):
        name = f"{['Abyssinian', 'great_dane'][number % 2]}_{number}"
        picture(base / "images" / f"{name}.jpg")
        lines["trainval" if number < 30 else "test"].append(f"{name} {number % 2 + 1} 1 1\n")
    for part, rows in lines.items():
        (base / "annotations" / f"{part}.txt").write_text("".join(rows))


def aircraft(root: Path) -> None:
    data = root / "fgvc-aircraft-2013b" / "data"
    data.mkdir(parents=True)
    (data / "variants.txt").write_text("707-320\nA300 B4\n")
    for at, part in enumerate(("train", "val", "test")):
        numbers = range(10 * at, 10 * at + 4)
        for number in numbers:
            picture(data / "images" / f"{number:07d}.jpg")
        rows = [f"{number:07d} {['707-320', 'A300 B4'][number % 2]}\n" for number in numbers]
        (data / f"images_variant_{part}.txt").write_text("".join(rows))


def cars(root: Path) -> None:
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    kind = [("fname", "O"), ("class", "O")]
    for part, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = np.array([(f"{n:05d}.jpg", n % 2 + 1) for n in range(1, 21)], dtype=kind)
        savemat(base / file, {"annotations": rows})
        for n in range(1, 21):
            picture(base / f"cars_{part}" / f"{n:05d}.jpg")
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array(["AM General", "Acura RL"], dtype=object)})


LAYOUTS = {"flowers102": flowers, "oxford_pets": pets, "aircraft": aircraft, "stanford_cars": cars}
EXPECTED = {  # classes, train, val, test
    "flowers102": (None, 4, 3, 5),
    "oxford_pets": (("Abyssinian", "Great Dane"), 27, 3, 10),
    "aircraft": (("707-320", "A300 B4"), 4, 4, 4),
    "stanford_cars": (("AM General", "Acura RL"), 18, 2, 20),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_images_labels_and_the_official_splits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LAYOUTS[name](tmp_path)
    monkeypatch.setattr(datasets.Flowers102, "_check_integrity", lambda self: True)  # of the real files' sums
    index = read_source(NamedData(root=tmp_path, name=name))
    classes, *sizes = EXPECTED[name]
    assert [len(index.rows(split)) for split in ("train", "val", "test")] == sizes
    assert all(index.path(row).is_file() for row in range(len(index)))
    if classes is None:
        assert len(index.classes) in (3, 102)
        numbers = [int(index.path(row).stem[-5:]) for row in range(len(index))]
        assert index.labels.tolist() == [(n - 1) % 3 for n in numbers]
    else:
        assert index.classes == classes
        numbers = [int(index.path(row).stem.split("_")[-1]) for row in range(len(index))]
        assert index.labels.tolist() == [n % 2 for n in numbers]
    assert index.recognised.startswith("torchvision's ")


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_not_there_comes_with_instructions(name: str, tmp_path: Path) -> None:
    instructions = "put cars_train/, cars_test/" if name == "stanford_cars" else "data.download=true"
    with pytest.raises(FgvcError, match=rf"(?s){name}, split train.*: Dataset not found.*{instructions}"):
        read_source(NamedData(root=tmp_path, name=name))


def test_a_download_without_a_network_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(datasets.FGVCAircraft, "_download", offline)
    with pytest.raises(
        FgvcError, match="Network is unreachable; without a network, copy the set to .*fgvc-aircraft-2013b"
    ):
        read_source(NamedData(root=tmp_path / "new", name="aircraft", download=True))


def test_a_recipe_names_one(tmp_path: Path) -> None:
    pets(tmp_path)
    tree = {"data": {"kind": "torchvision", "name": "oxford_pets", "root": str(tmp_path)}}
    tree |= {"model": {"backbone": "test_resnet"}, "image": {"size": 32}}
    assert api.check(validate(Recipe, tree, where="test")).index.recognised.startswith(
        "torchvision's OxfordIIITPet: 40 images"
    )
