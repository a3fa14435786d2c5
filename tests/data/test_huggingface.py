"""Sets of the datasets library against the same images as class folders."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from fgvc import api
from fgvc.config.data import AutoData, FolderData, HfData
from fgvc.config.images import Preprocess
from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.data.augment import Augmenter
from fgvc.data.beside import read_folder
from fgvc.data.cache import DecodeCache
from fgvc.data.index import decode_row
from fgvc.data.loader import train_loader
from fgvc.data.quality import checks
from fgvc.data.sources import huggingface
from fgvc.data.sources.read import read_source, resolved
from fgvc.errors import FgvcError, ImageError
from fgvc.training import trainer

datasets = pytest.importorskip("datasets")
SPLITS = ("train", "val", "test")


def columns(colours: Path, split: str) -> tuple[list[str], list[bytes]]:
    files = sorted((colours / split).rglob("*.png"))
    return [file.parent.name for file in files], [file.read_bytes() for file in files]


def table(labels: list[Any], contents: list[bytes | None], *, feature: Any = None) -> Any:
    features = datasets.Features({"image": datasets.Image(), "label": feature or datasets.Value("string")})
    images = [None if content is None else {"bytes": content, "path": None} for content in contents]
    rows = {"image": images, "label": labels}
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.fixture
def saved(colours: Path, tmp_path: Path) -> Path:
    """The colours as Dataset.save_to_disk writes them, with class labels in an order of their own."""
    order = datasets.ClassLabel(names=["red", "green", "blue"])
    tables = {}
    for split in SPLITS:
        labels, contents = columns(colours, split)
        name = {"val": "validation"}.get(split, split)
        tables[name] = table([order.str2int(label) for label in labels], contents, feature=order)
    datasets.DatasetDict(tables).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def test_a_saved_set_has_its_images_splits_and_class_order(saved: Path, colours: Path) -> None:
    index = read_source(HfData(root=saved))
    assert index.classes == ("red", "green", "blue")
    assert index.given_splits == ("val", "test")
    folder = read_source(FolderData(root=colours))
    for split in SPLITS:
        rows, files = index.rows(split), folder.rows(split)
        assert len(rows) == len(files)
        for row, file in zip(rows.tolist(), files.tolist(), strict=True):
            assert index.classes[index.labels[row]] == folder.classes[folder.labels[file]]
            np.testing.assert_array_equal(np.asarray(decode_row(index, row)), np.asarray(decode_row(folder, file)))
    assert str(index.path(0)).endswith("saved/train/0")


def test_a_parquet_file_is_found_out_as_a_table_is(colours: Path, tmp_path: Path) -> None:
    labels, contents = columns(colours, "train")
    table(labels, contents).to_parquet(str(tmp_path / "all.parquet"))
    file = tmp_path / "all.parquet"
    assert resolved(AutoData(root=file, val_fraction=0.3)) == HfData(root=file, val_fraction=0.3)
    index = read_folder(file)
    assert [index.classes[label] for label in index.labels] == labels
    assert not index.given_splits
    with pytest.raises(FgvcError, match=r"data\.group_size: .*data\.group_column"):
        resolved(AutoData(root=file, group_size=4))


def test_parquet_files_of_the_library_and_of_others(colours: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    expected = read_source(FolderData(root=colours))
    for split in SPLITS:
        labels, contents = columns(colours, split)
        table(labels, contents).to_parquet(str(tmp_path / "own" / f"{split}-00000-of-00001.parquet"))
        plain = pa.table({"picture": pa.array(contents, pa.binary()), "species": labels})  # as others write them
        (tmp_path / "plain").mkdir(exist_ok=True)
        pq.write_table(plain, tmp_path / "plain" / f"{split}.parquet")
    own = read_source(HfData(root=tmp_path / "own"))
    plain = read_source(HfData(root=tmp_path / "plain", image_column="picture", label_column="species"))
    for index in (own, plain):
        assert index.classes == expected.classes
        np.testing.assert_array_equal(index.labels[index.rows("val")], expected.labels[expected.rows("val")])
        np.testing.assert_array_equal(decode_row(index, 3), decode_row(expected, 3))
    one = read_source(HfData(root=tmp_path / "own" / "train-00000-of-00001.parquet"))
    assert [len(one.rows(split)) for split in SPLITS] == [34, 4, 10], "splits of fgvc's own"
    with pytest.raises(FgvcError, match=r"data.image_column: name one of the columns picture, species"):
        read_source(HfData(root=tmp_path / "plain"))
    with pytest.raises(FgvcError, match=r"data.label_column: no column 'kind'; there are image, label"):
        read_source(HfData(root=tmp_path / "own", label_column="kind"))


def test_folders_of_images(colours: Path) -> None:
    index = read_source(HfData(root=colours))
    expected = read_source(FolderData(root=colours))
    assert index.classes == expected.classes
    assert isinstance(index.source(0), Path)
    np.testing.assert_array_equal(decode_row(index, 3), decode_row(expected, 3))


def test_another_process_lists_the_same(colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels, contents = columns(colours, "train")
    plants = [f"plant {at // 3}" for at in range(len(labels))]
    listed = table(labels, [*contents[:-1], None]).add_column("plant", plants)
    listed.to_parquet(str(tmp_path / "set" / "train.parquet"))
    data = HfData(root=tmp_path / "set", group_column="plant")
    here = read_source(data)
    monkeypatch.setattr(huggingface, "LARGE", 5)
    there = read_source(data)
    for name in ("paths", "labels", "splits", "groups"):
        np.testing.assert_array_equal(getattr(there, name), getattr(here, name))
    assert (there.classes, there.recognised) == (here.classes, here.recognised)
    assert [there.source(row) for row in range(47)] == [here.source(row) for row in range(47)] == contents[:47]
    with pytest.raises(ImageError, match="missing"):
        there.source(47)
    with pytest.raises(FgvcError, match=r"^data.label_column: no column 'kind'"):
        read_source(HfData(root=tmp_path / "set", label_column="kind"))


def test_rows_without_label_are_left_out_and_said(colours: Path, tmp_path: Path) -> None:
    labels, contents = columns(colours, "train")
    numbers = [["blue", "green", "red"].index(label) * 5 for label in labels]
    numbers[1] = -1
    table(numbers, contents, feature=datasets.Value("int64")).save_to_disk(str(tmp_path / "set"))
    index = read_source(HfData(root=tmp_path / "set", test_fraction=0, val_fraction=0))
    assert index.classes == ("0", "5", "10")
    assert len(index) == 47
    assert index.paths[1] == "train/2"
    np.testing.assert_array_equal(decode_row(index, 1), Image.open(io.BytesIO(contents[2])))
    assert index.warnings == ("1 rows have no label in column 'label', and are left out",)


def test_images_in_tables_are_decoded_under_the_limits(colours: Path, tmp_path: Path) -> None:
    labels, contents = columns(colours, "train")
    stream = io.BytesIO()
    Image.new("1", (9000, 9000)).save(stream, "png")
    broken: list[bytes | None] = [stream.getvalue(), contents[1][:60], b"", None, *contents[4:]]
    table(labels, broken).save_to_disk(str(tmp_path / "set"))
    index = read_source(HfData(root=tmp_path / "set"))
    for row, reason in enumerate(["too many pixels", "", "empty", "missing"]):
        with pytest.raises(ImageError, match=rf"train/{row}.*{reason}"):
            decode_row(index, row)
    report = checks.check(index, max_unreadable=0.5)
    assert [row for row, _ in report.unreadable] == [0, 1, 2, 3]


def test_the_hub_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FgvcError, match=r"data.name: owner/flowers: .* can't be had from the hub .*save_to_disk"):
        read_source(HfData(name="owner/flowers", root=tmp_path))
    with pytest.raises(FgvcError, match="the datasets library can't read it"):
        read_source(HfData(root=tmp_path))


def test_samples_do_not_depend_on_workers_nor_on_where_they_are_stored(saved: Path, colours: Path) -> None:
    index = read_source(HfData(root=saved))
    rows, spec = index.rows("train"), Preprocess(size=(24, 32))

    def stream(workers: int, start: int = 0, cache: DecodeCache | None = None) -> list[bytes]:
        augmenter = Augmenter(api.Recipe.model_fields["augment"].default, spec, 3)
        loader = train_loader(index, rows, augmenter=augmenter, batch_size=8, seed=3, workers=workers, cache=cache)
        images = [batch.images.numpy().tobytes() for batch in loader.epoch(1, start=start)]
        loader.close()
        return images

    alone = stream(0)
    assert stream(2) == alone
    assert stream(1, start=2) == alone[2:]
    assert stream(0, cache=DecodeCache.open(index, rows, side=10**6)) == alone


def test_a_run_is_recorded_goes_on_and_is_scored(saved: Path, tmp_path: Path, recipe_tree: dict) -> None:
    tree = recipe_tree | {"data": {"kind": "hf", "root": str(saved)}, "model": {"backbone": "test_resnet"}}
    whole = trainer.train(validate(Recipe, tree, where="test"), tmp_path / "whole")
    short = validate(Recipe, tree | {"train": tree["train"] | {"max_steps": 3}}, where="test")
    run = trainer.train(short, tmp_path / "run")
    trainer.train(validate(Recipe, tree, where="test"), tmp_path / "run")
    weights = [load_file(folder / "ckpt" / "last" / "net.safetensors") for folder in (whole, run)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    assert api.evaluate(run, "test").scores.images == 12
    torch.manual_seed(0)
    labels, contents = columns(Path(recipe_tree["data"]["root"]), "train")
    other = datasets.ClassLabel(names=["red", "green", "blue"])
    parts = {"train": table([0] * len(labels), contents, feature=other)}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "other"))
    moved = tree | {"data": {"kind": "hf", "root": str(tmp_path / "other")}, "train": tree["train"] | {"epochs": 3}}
    with pytest.raises(FgvcError, match="are not those that this run began with"):
        trainer.train(validate(Recipe, moved, where="test"), tmp_path / "run")


MEMORY = """
import resource, sys
import datasets, numpy as np, pyarrow as pa
import fgvc.runs.images, fgvc.data.sources.huggingface as hf
from fgvc.config.data import HfData
from fgvc.runs.record import Record
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
index = hf.read(HfData(root=sys.argv[1]))
record = Record.of(index)
assert len(index) == len(record.sizes) == int(sys.argv[2])
print(peak() - before)
"""


def test_a_large_set_costs_little_memory(colours: Path, tmp_path: Path) -> None:
    """200,000 rows; a million is five times as much, which is to stay below 300 MB. Another process lists them."""
    import pyarrow as pa

    count = 200_000
    picture = next(colours.rglob("*.png")).read_bytes()[:64]
    content = pa.array([picture] * count, pa.binary())
    image = pa.StructArray.from_arrays([content, pa.nulls(count, pa.string())], ["bytes", "path"])
    rows = pa.table({"image": image, "label": pa.array(np.arange(count) % 100)})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=100)})
    datasets.Dataset(rows.cast(features.arrow_schema)).save_to_disk(str(tmp_path / "large"))
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "large"), str(count)]
    process = subprocess.run(command, check=True, capture_output=True, text=True)
    assert float(process.stdout) < 300 / 5
