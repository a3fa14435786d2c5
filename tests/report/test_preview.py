"""Contact sheets: what is on them, pixel for pixel where that can be known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from fgvc import api
from fgvc.config.images import Preprocess
from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.errors import FgvcError
from fgvc.images import lettering
from fgvc.images.decode import decode
from fgvc.images.preprocess import fit
from fgvc.images.preprocess import preprocess as prepared
from fgvc.images.sheet import GUTTER, TILE, Cell
from fgvc.report import preview
from fgvc.training import trainer

COLUMN = TILE + GUTTER


def recipe(tree: dict, **sections: object) -> Recipe:
    return validate(Recipe, tree | sections, where="test")


def test_a_sheet_for_the_input_each_technique_and_all(tmp_path: Path, recipe_tree: dict) -> None:
    config = recipe(recipe_tree, techniques={"mixup": {"alpha": 1.0}, "dcl": {"grid": 4}})
    result = api.preview(config, tmp_path / "sheets", images=3)
    assert [path.name for path in result.sheets] == [
        f"{name}.png" for name in ("input", "augmentation", "evaluation", "mixup", "dcl", "all")
    ]
    columns = {path.stem: decode(path).width // COLUMN for path in result.sheets}
    assert columns == {"input": 2, "augmentation": 4, "evaluation": 2, "mixup": 3, "dcl": 3, "all": 4}
    assert result.notes == ()
    other = recipe(recipe_tree, image={"size": 64}, techniques={"ae_psl": {"rounds": 2}, "cutout": {}})
    (note,) = api.preview(other, tmp_path / "rounds", images=3).notes
    assert "ae_psl.png: ae_psl works with what a run remembers" in note
    again = api.preview(config, tmp_path / "again", images=3)
    assert [p.read_bytes() for p in again.sheets] == [p.read_bytes() for p in result.sheets], "the run's own draws"
    assert not (tmp_path / "runs").exists()


def test_each_step_of_the_augmentation_has_its_picture(tmp_path: Path, recipe_tree: dict) -> None:
    transforms = [{"__class_fullname__": "RandomResizedCrop", "size": [24, 24], "p": 1.0}]
    pipeline = {"transform": {"__class_fullname__": "Compose", "transforms": transforms}}
    augment = {"policy": "3-augment", "flip": 1, "pipeline": pipeline}
    config = recipe(recipe_tree, augment=augment)
    sheets = shown_cells(config, tmp_path)
    captions = ["crop", "flip", "3-augment", "colours", "RandomResizedCrop"]
    for row, first in zip(sheets["augmentation"], sheets["input"], strict=True):
        assert [cell.title for cell in row] == ["original", *captions]
        assert row[0].caption == first[0].caption
        np.testing.assert_array_equal(np.asarray(row[2].picture), np.asarray(row[1].picture)[:, ::-1])
        assert row[-1].picture.size == (24, 24), "brought to the network's size after the last step"


def shown_cells(config: Recipe, folder: Path) -> dict[str, list[list[Cell]]]:
    """The cells of all sheets, by name."""
    cells: dict[str, list[list[Cell]]] = {}

    def record(rows: list[list[Cell]], path: Path, **_: object) -> Path:
        cells[path.stem] = rows
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preview, "save_sheet", record)
        api.preview(config, folder, images=3)
    return cells


@pytest.mark.parametrize(("technique", "count"), [({"mixup": {"alpha": 1.0}}, 1), ({"mosaic": {}}, 3)])
def test_the_pictures_that_are_mixed_in_stand_beside(
    technique: dict, count: int, tmp_path: Path, recipe_tree: dict
) -> None:
    (kind,) = technique
    sheets = shown_cells(recipe(recipe_tree, techniques=technique), tmp_path)
    for row, before in zip(sheets[kind], sheets["input"], strict=True):
        own, (_, *mixed_in, mixed) = before[-1], row
        assert [cell.title for cell in mixed_in] == [f"{kind}: mixed in"] * count
        assert {part.partition(" ")[2] for part in mixed.caption.split(" + ")} <= {
            row[0].caption,
            *(cell.caption for cell in mixed_in),
        }
        if kind == "mixup":  # a convex combination of the two that are shown
            a, b, x = (np.asarray(cell.picture, dtype=float) for cell in (own, mixed_in[0], mixed))
            share = ((x - b) * (a - b)).sum() / ((a - b) ** 2).sum()
            assert np.abs(share * a + (1 - share) * b - x).max() < 2


def test_maps_and_masks_lie_beside_the_views_and_a_run_can_look(tmp_path: Path, recipe_tree: dict) -> None:
    chosen = {"attention_crop_drop": {"maps": 4}, "cam_erasing": {}, "acol": {}, "adl": {}, "dropblock": {"rate": 0.3}}
    chosen |= {"cutout": {}, "random_erasing": {"probability": 1.0}, "hide_and_seek": {"probability": 1.0}}
    config = recipe(recipe_tree, image={"size": 64}, techniques=chosen)
    sheets = {path.stem: path for path in api.preview(config, tmp_path / "first", images=2).sheets}
    columns = {name: decode(path).width // COLUMN for name, path in sheets.items()}
    # the original, the main view, further views, then maps and masks
    views = {"attention_crop_drop": 2, "cam_erasing": 1}
    pictures = {"attention_crop_drop": 3, "cam_erasing": 2, "acol": 2}
    assert {kind: columns[kind] for kind in chosen} == {k: 2 + views.get(k, 0) + pictures.get(k, 1) for k in chosen}
    run = trainer.train(config, tmp_path / "run")
    again = {path.stem: path for path in api.preview(config, tmp_path / "again", images=2, run=run).sheets}
    changed = {kind for kind in chosen if sheets[kind].read_bytes() != again[kind].read_bytes()}
    assert {"attention_crop_drop", "cam_erasing", "acol"} <= changed, "other weights, other maps"
    assert not changed & {"cutout", "random_erasing", "hide_and_seek"}, "no weights, no change"
    rounds = recipe(recipe_tree, image={"size": 64}, techniques={"ae_psl": {"rounds": 2}})
    remembers = trainer.train(rounds, tmp_path / "rounds")
    masked = api.preview(rounds, tmp_path / "masks", images=2, run=remembers)
    assert masked.notes == ()
    nothing = api.preview(rounds, tmp_path / "nothing", images=2)
    assert masked.sheets[3].read_bytes() != nothing.sheets[3].read_bytes(), "the masks lie on the originals"
    other = recipe(recipe_tree, techniques={"acb": {}})
    with pytest.raises(FgvcError, match="its weights do not fit this recipe's net"):
        api.preview(other, tmp_path / "other", run=run)


@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize("white", [1, 255])
def test_pictures_are_the_networks_input_undone(order: str, white: int, colours: Path) -> None:
    spec = Preprocess(
        size=(24, 32), channel_order=order, input_range=white, mean=(0.1 * white,) * 3, std=(0.3 * white,) * 3
    )
    import torch

    image = decode(next(colours.rglob("*.png")))
    picture = preview._picture(torch.from_numpy(prepared(image, spec)), spec)
    np.testing.assert_array_equal(np.asarray(picture), fit(image, spec))


def test_targets_are_written_as_shares() -> None:
    import torch

    y, other, share = torch.tensor([0, 1]), torch.tensor([2, 1]), torch.tensor([0.75, 0.25])
    assert preview._target([(y, None)], 0, "abc") == "1.00 a"
    assert preview._target([(y, share), (other, 1 - share)], 0, "abc") == "0.75 a + 0.25 c"
    assert preview._target([(y, share), (other, 1 - share)], 1, "abc") == "1.00 b"


def draw_font(path: Path, characters: str) -> None:
    """A font whose every letter is a square as high as its number."""
    glyphs = {}
    for number, character in enumerate(characters, start=1):
        pen = TTGlyphPen(None)
        pen.moveTo((0, 0))
        for point in ((0, 50 * number), (500, 50 * number), (500, 0)):
            pen.lineTo(point)
        pen.closePath()
        glyphs[f"u{ord(character):04X}"] = pen.glyph()
    order = [".notdef", *glyphs]
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(order)
    font.setupCharacterMap({int(name[1:], 16): name for name in glyphs})
    font.setupGlyf({".notdef": TTGlyphPen(None).glyph(), **glyphs})
    font.setupHorizontalMetrics({name: (600, 0) for name in order})
    font.setupHorizontalHeader(ascent=1000, descent=-200)
    font.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(path)


def test_a_font_is_taken_that_has_every_character_of_chinese_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe_tree: dict
) -> None:
    draw_font(tmp_path / "Sparrow.ttf", "麻雀originalevuto:0123456789. +ptm")
    own = next(path for path in lettering.files() if path.name == "DejaVuSans.ttf")
    monkeypatch.setattr(lettering, "files", lambda: (own, tmp_path / "Sparrow.ttf"))  # whatever else this machine has
    lettering.font_for.cache_clear()
    names, written = lettering.writable(["麻雀", "original"])
    assert names == ["麻雀", "original"]
    assert written.getmask("麻").getbbox() != written.getmask("雀").getbbox(), "letters, not boxes for unknown ones"
    root = tmp_path / "birds"
    for split, count in (("train", 8), ("val", 2)):
        for number, name in enumerate(("麻雀", "original")):
            for i in range(count):
                place = root / split / name / f"{i}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40, 40), (100 * number + 10 * i, 90, 90)).save(place)
    config = recipe(recipe_tree, data={"kind": "folder", "root": str(root)})
    assert api.preview(config, tmp_path / "sheets").notes == (), "no advice: the names could be written"
    lettering.font_for.cache_clear()


def test_a_folder_that_can_not_be_made_is_named(tmp_path: Path, recipe_tree: dict) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FgvcError, match="file: can't make the folder"):
        api.preview(recipe(recipe_tree), tmp_path / "file")
