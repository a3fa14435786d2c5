"""`data.kind: auto`: each layout is recognised, and what is not sure is not decided."""

from __future__ import annotations

from pathlib import Path

import pytest

from fgvc.config.data import AutoData, CsvData, CubData, FolderData, Source
from fgvc.config.loading import dump, load, override, validate
from fgvc.config.recipe import Recipe
from fgvc.data.recipe import resolve_data
from fgvc.data.sources.auto import resolved
from fgvc.data.sources.read import read_source
from fgvc.errors import FgvcError
from fgvc.runs.images import read_index


def touch_files(root: Path, *names: str) -> None:
    """Make empty files of these names; nothing looks into them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def recognised(root: Path, **settings: object) -> Source:
    return resolved(AutoData(root=root, **settings))


def test_the_cub_layout(boxed: Path, tmp_path: Path) -> None:
    assert recognised(boxed) == CubData(root=boxed)
    (tmp_path / "CUB_200_2011").symlink_to(boxed)  # as its archive unpacks
    assert recognised(tmp_path) == CubData(root=tmp_path / "CUB_200_2011")
    with pytest.raises(FgvcError, match=r"test_fraction: .* has a test split"):
        recognised(boxed, test_fraction=0.3)


@pytest.mark.parametrize("missing", ["images.txt", "image_class_labels.txt", "train_test_split.txt"])
def test_a_part_of_the_cub_layout_is_no_set_of_class_folders(tmp_path: Path, missing: str) -> None:
    touch_files(tmp_path, "images/oak/1.jpg", "parts/1.jpg")
    touch_files(tmp_path, "images.txt", "image_class_labels.txt", "train_test_split.txt")
    (tmp_path / missing).unlink()
    with pytest.raises(FgvcError, match=rf"but {missing} is not there.*data.kind=folder"):
        recognised(tmp_path)


def test_class_folders(colours: Path, tmp_path: Path) -> None:
    assert recognised(colours, val_fraction=0.3) == FolderData(root=colours, val_fraction=0.3)
    touch_files(tmp_path, "oak/1.jpg", "ash/deep/2.PNG", "notes/readme.txt")
    assert recognised(tmp_path, test_fraction=0.5) == FolderData(root=tmp_path, test_fraction=0.5)
    assert recognised(tmp_path, group_size=8, fold=(0, 5)) == FolderData(root=tmp_path, group_size=8, fold=(0, 5))


def test_groups_of_photographs_in_a_row_are_for_class_folders(boxed: Path, tmp_path: Path) -> None:
    with pytest.raises(FgvcError, match=r"data.group_size: .*CUB"):
        recognised(boxed, group_size=8)
    touch_files(tmp_path, "1.jpg", "2.jpg")
    (tmp_path / "all.csv").write_text("path,label\n1.jpg,a\n2.jpg,b\n")
    with pytest.raises(FgvcError, match=r"data.group_size: .*all.csv has the groups in a column"):
        recognised(tmp_path, group_size=8)


@pytest.mark.parametrize(
    ("header", "columns"),
    [
        ("path,label", {}),
        ("Image Path;Species", {"path_column": "Image Path", "label_column": "Species", "delimiter": ";"}),
        ("filename\tclass\tclass_id", {"path_column": "filename", "label_column": "class", "delimiter": "\t"}),
        ("id,file,target,subset", {"path_column": "file", "label_column": "target", "split_column": "subset"}),
        (
            "image,class_name,label,set,plant_id",
            {"path_column": "image", "label_column": "class_name", "group_column": "plant_id"},
        ),
    ],
)  # fmt: skip
def test_a_table_by_the_usual_names(tmp_path: Path, header: str, columns: dict[str, str]) -> None:
    cells = {
        "path": "a/1.jpg", "Image Path": "a/1.jpg", "filename": "a/1.jpg", "file": "a/1.jpg", "image": "a/1.jpg", "label": "oak",
        "Species": "oak", "class": "oak", "class_id": "7", "id": "0001", "target": "oak", "subset": "train", "class_name": "oak",
        "set": "no part", "plant_id": "p1",
    }  # fmt: skip
    touch_files(tmp_path, "a/1.jpg", "masks/1.jpg")  # with two folders of images, which are no classes
    mark = columns.get("delimiter", ",")
    row = mark.join(cells[name] for name in header.split(mark))
    (tmp_path / "list.tsv").write_text(f"{header}\n{row}\n")
    expected = CsvData(root=tmp_path, file=Path("list.tsv"), **columns)
    assert recognised(tmp_path) == expected
    assert recognised(tmp_path / "list.tsv") == expected
    assert read_source(expected).classes == ("oak",)


def test_the_path_column_is_the_one_whose_files_are_there(tmp_path: Path) -> None:
    touch_files(tmp_path, "pictures/1.jpg")
    table = tmp_path / "t.csv"
    table.write_text("path,image_name,label\n/gone/1.jpg,pictures/1.jpg,oak\n")
    data = recognised(tmp_path)
    assert isinstance(data, CsvData)
    assert data.path_column == "image_name"
    table.write_text("path,label\n1.jpg,oak\n")
    with pytest.raises(FgvcError, match=r"none of the first 1 files that column 'path' names .*data\.root"):
        recognised(tmp_path)
    table.write_text("id,class\n1,oak\n")  # a list of something else
    touch_files(tmp_path, "oak/1.jpg")
    assert recognised(tmp_path) == FolderData(root=tmp_path)


FOLDERS = ("oak/1.jpg", "oak/2.jpg", "ash/3.jpg")
PARTS = ("train/oak/1.jpg", "train/ash/2.jpg", "test/oak/3.jpg")


@pytest.mark.parametrize(
    ("files", "table", "kind"),
    [
        (FOLDERS, "path,label\noak/1.jpg,oak\noak/2.jpg,oak\nash/3.jpg,ash\n", "folder"),  # says the same
        (FOLDERS, "path,severity\noak/1.jpg,2\n", "folder"),  # no labels, as coffee-leaf5's
        (FOLDERS, "path,label,split\noak/1.jpg,oak,train\noak/2.jpg,oak,test\nash/3.jpg,ash,train\n", "csv"),
        (FOLDERS, "path,label,group\noak/1.jpg,oak,a\noak/2.jpg,oak,b\nash/3.jpg,ash,c\n", "csv"),
        (PARTS, "path,label,split\ntrain/oak/1.jpg,oak,train\ntest/oak/3.jpg,oak,test\n", "folder"),
        (("images/1.jpg", "masks/1.jpg"), "path,label\nimages/1.jpg,oak\n", "csv"),
        (("train/1.jpg", "test/2.jpg"), "path,label\ntrain/1.jpg,oak\ntest/2.jpg,ash\n", "csv"),
        (FOLDERS, "path,label\noak/1.jpg,healthy\nash/3.jpg,ill\n", None),
        (PARTS, "path,label\ntrain/oak/1.jpg,healthy\ntrain/ash/2.jpg,ill\n", None),
    ],
)  # fmt: skip
def test_folders_beside_a_table(tmp_path: Path, files: tuple[str, ...], table: str, kind: str | None) -> None:
    touch_files(tmp_path, *files)
    (tmp_path / "labels.csv").write_text(table)
    if kind is None:
        with pytest.raises(FgvcError, match=r"class folders \(ash, oak\), and labels\.csv .*kind=folder, or data\.kind=csv"):
            recognised(tmp_path)
        return
    data = recognised(tmp_path)
    assert data.kind == kind
    if kind == "folder":
        assert "labels.csv beside them: not read" in read_source(data).recognised
    else:
        assert "table labels.csv (path path, label label" in read_source(data).recognised


def test_several_tables_are_not_decided_upon(tmp_path: Path) -> None:
    touch_files(tmp_path, "images/1.jpg")
    for name in ("train.csv", "val.csv"):
        (tmp_path / name).write_text("path,label\nimages/1.jpg,oak\n")
    with pytest.raises(FgvcError, match=r"2 tables .*train\.csv, val\.csv.*data\.file=train\.csv data\.label_column=label"):
        recognised(tmp_path)
    (tmp_path / "val.csv").write_text("name,count\noak,1\n")
    assert recognised(tmp_path) == CsvData(root=tmp_path, file=Path("train.csv"))


def test_nothing_that_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(FgvcError, match="not there"):
        recognised(tmp_path / "gone")
    with pytest.raises(FgvcError, match=r"Looked for: CUB.*class folders.*table.*none of these.*data\.kind=csv"):
        recognised(tmp_path)
    touch_files(tmp_path, "1.jpg", "train/2.jpg", "test/3.jpg")
    (tmp_path / "a.csv").write_text("path,label,class\n1.jpg,a,b\n")
    with pytest.raises(FgvcError, match=r"may be the labels, label, class.*1 images lie in it.*test/ holds images, and is no"):
        recognised(tmp_path)
    with pytest.raises(FgvcError, match="no table"):
        recognised(tmp_path / "1.jpg")
    touch_files(tmp_path, "run/config.yaml", "run/ckpt/last")
    with pytest.raises(FgvcError, match="is a run of fgvc"):
        recognised(tmp_path / "run")


def test_one_folder_is_told_as_class_folders_are(tmp_path: Path) -> None:
    touch_files(tmp_path, "images/oak/1.jpg", "images/ash/2.jpg")
    with pytest.raises(FgvcError, match=r"data\.root=.*images"):
        read_source(recognised(tmp_path))


def test_a_recipe_holds_what_was_found(recipe_tree: dict, colours: Path, tmp_path: Path) -> None:
    override(recipe_tree, "data.kind=auto")
    recipe = resolve_data(validate(Recipe, recipe_tree, where="test"))
    assert recipe.data == FolderData(root=colours)
    (tmp_path / "config.yaml").write_text(dump(recipe))
    assert "auto" not in (tmp_path / "config.yaml").read_text().split("image:")[0]
    assert load(Recipe, tmp_path / "config.yaml") == recipe
    assert "class folders in train/, val/, test/" in read_index(recipe).recognised
    with pytest.raises(FgvcError, match="no such|not there"):
        resolve_data(validate(Recipe, recipe_tree | {"data": {"kind": "auto", "root": str(tmp_path / "gone")}}, where="test"))
    kinds = Recipe.model_json_schema()["properties"]["data"]["discriminator"]["mapping"]
    assert set(kinds) == {"auto", "cub", "folder", "csv", "torchvision", "hf"}
