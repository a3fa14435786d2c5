"""Does `fgvc data check --suspects` find faults that were planted?

    python benchmarks/planted_faults.py COFFEE --weights LITE0 --seeds 0 1 2 3 4 --out docs/results/planted-faults.csv

Each seed makes a copy of a folder set with `train/<class>/` and `test/<class>/`, and spoils it: 30 images are stored again in
the other split (6 as they are; 6 at JPEG quality 60; 6 at 80 % of their size, 6 lighter by 10 % and 6 mirrored, at quality 90),
20 images move to another class, and 5 files are damaged. Then it does what the verb does.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from fgvc import api
from fgvc.config.recipe import Recipe
from fgvc.config.shipped import recipe_file
from fgvc.data.index import ImageIndex
from fgvc.data.quality.checks import Report, check
from fgvc.data.quality.suspects import Suspects, suspects
from fgvc.data.sources.read import read_source
from fgvc.errors import FgvcError
from fgvc.evaluation.features import compute_features, load_frozen

COPIES = ("exact", "quality 60", "resized", "lighter", "mirrored")
DAMAGE = ("cut in half", "end missing", "empty", "a web page", "second half zero")
SHOWN = 60  # suspects that somebody looks through


@dataclass(frozen=True, slots=True)
class Planted:
    copies: list[tuple[str, str, str]]  # kind, path, path of the copy
    swapped: list[str]
    corrupt: list[str]


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("source", type=Path)
    arguments.add_argument("--weights", required=True)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    try:
        rows = study(given.source, given.weights, given.seeds)
    except FgvcError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if given.out:
        with given.out.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return 0


def study(source: Path, weights: str, seeds: list[int]) -> list[dict[str, object]]:
    """A line for each planting. Features are kept by content: plantings share all images but a few."""
    known: dict[str, np.ndarray] = {}
    lines = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "set"
            planted = plant(source, root, seed=seed)
            recipe = api.load_recipe(
                recipe_file("coffee-leaf5/plain"),
                [f"data.root={root}", f"model.weights={weights}", "train.workers=0", "train.device=cpu"],
            )
            index = read_source(recipe.data)
            report = check(index)
            lines.append(judge(report, doubted(recipe, report, known), planted, seed=seed))
            print(", ".join(f"{key} {value}" for key, value in lines[-1].items()), flush=True)
    return lines


def plant(source: Path, out: Path, *, seed: int) -> Planted:
    """A copy of a set with faults in it."""
    rng = np.random.default_rng(seed)
    shutil.copytree(source, out)
    paths = sorted(str(path.relative_to(out)) for path in out.rglob("*.jpg"))
    chosen = [paths[at] for at in rng.permutation(len(paths))[:55].tolist()]
    classes = sorted({Path(path).parent.name for path in paths})
    copies = []
    for number, path in enumerate(chosen[:30]):
        split, name, file = Path(path).parts
        again = Path({"train": "test", "test": "train"}[split], name, f"again-{file}")
        kind = COPIES[number % len(COPIES)]
        (out / again).write_bytes(copy((out / path).read_bytes(), kind))
        copies.append((kind, path, str(again)))
    swapped = []
    for path in chosen[30:50]:
        split, name, file = Path(path).parts
        other = str(rng.choice([one for one in classes if one != name]))
        swapped.append(str(Path(split, other, f"moved-{file}")))
        (out / path).rename(out / swapped[-1])
    for kind, path in zip(DAMAGE, chosen[50:], strict=True):
        (out / path).write_bytes(damage((out / path).read_bytes(), kind))
    return Planted(copies, swapped, chosen[50:])


def copy(content: bytes, kind: str) -> bytes:
    """The image stored again."""
    if kind == "exact":
        return content
    image = Image.open(io.BytesIO(content)).convert("RGB")
    if kind == "resized":
        image = image.resize((round(0.8 * image.width), round(0.8 * image.height)), Image.Resampling.LANCZOS)
    elif kind == "lighter":
        image = ImageEnhance.Brightness(image).enhance(1.1)
    elif kind == "mirrored":
        image = ImageOps.mirror(image)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=60 if kind == "quality 60" else 90)
    return stream.getvalue()


def damage(content: bytes, kind: str) -> bytes:
    half = len(content) // 2
    return {
        "cut in half": content[:half],
        "end missing": content[:-200],
        "empty": b"",
        "a web page": b"<!doctype html><title>404 Not Found</title>",
        "second half zero": content[:half] + bytes(len(content) - half),
    }[kind]


def doubted(recipe: Recipe, report: Report, known: dict[str, np.ndarray]) -> Suspects:
    """What `fgvc data check --suspects` looks for, without the forwards of images that were seen before."""
    index = report.index
    rows = np.flatnonzero(report.sizes[:, 0] > 0)
    keys = {row: _key(index, row) for row in rows.tolist()}
    fresh = np.array([row for row in rows.tolist() if keys[row] not in known], np.int64)
    if len(fresh):
        found = compute_features(recipe, load_frozen(recipe, len(index.classes)), index, fresh)
        known |= {keys[row]: vector for row, vector in zip(found.rows.tolist(), found.vectors, strict=True)}
    vectors = np.stack([known[keys[row]] for row in rows.tolist()])
    return suspects(vectors, index.labels[rows], rows=rows, families=report.families[rows])


def judge(report: Report, found: Suspects, planted: Planted, *, seed: int) -> dict[str, object]:
    """What was found of what was planted."""
    paths = report.index.paths.tolist()
    row = {path: at for at, path in enumerate(paths)}
    same = report.families
    told = {at for rows in (*report.leaks, *report.near_leaks) for at in rows}
    hit = [same[row[a]] == same[row[b]] and {row[a], row[b]} <= told for _, a, b in planted.copies]
    ours = {row[b] for _, _, b in planted.copies}
    listed = [paths[one.row] for one in found.listed]
    return {
        "seed": seed,
        "images": len(paths),
        "copies_found": f"{sum(hit)} of {len(hit)}",
        "missed": ", ".join(kind for (kind, _, _), one in zip(planted.copies, hit, strict=True) if not one),
        "other_groups": sum(not ours & set(rows) for rows in (*report.duplicates, *report.near)),
        "corrupt_found": f"{len({paths[at] for at, _ in report.unreadable} & set(planted.corrupt))} of {len(planted.corrupt)}",
        "swapped_in_first_60": len(set(listed[:SHOWN]) & set(planted.swapped)),
        "swapped_listed": len(set(listed) & set(planted.swapped)),
        "listed": len(listed),
        "wrong_by_confident_learning": found.wrong,
    }


def _key(index: ImageIndex, row: int) -> str:
    return hashlib.sha256(index.path(row).read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
