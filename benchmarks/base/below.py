"""Is the default recipe ever below the floor? `any/plain` from 5, 15 and all images a class, on several sets and nets.

    python benchmarks/base/below.py below.csv --work cells --set cub50=CUB50 --set coffee=COFFEE --set drawn=DEMO \
        --net lite0=FILE --net mobile=FILE --net mobile-inat=FILE
    python benchmarks/base/below.py below.csv [--between between.csv]

Of each train split a number of images a class is drawn, three times; the others validate (where images have groups, those of
other groups alone). At full size five folds stand in for draws. The test split is not touched. What a run would ship, the best of
its start and all epochs, is chosen by one half of the validating images and scored on the other, and the other way round, so that
nothing is scored by what chose it. Rows come one by one; those that are there are left alone. Without --set the table is printed.
With --between the nets at 0.25, 0.5 and 0.75 of the way from the start to the end are scored, too, into a table of their own.
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
from pathlib import Path

import numpy as np
import torch
from cells import epochs, fitted_floor, machine, percent, right_of
from table import gain

from fgvc import api
from fgvc.config.data import SPLITS
from fgvc.config.shipped import recipe_file
from fgvc.data.sources.read import read_source
from fgvc.data.unseen import FEWEST_TO_CHOOSE
from fgvc.evaluation.paired import beats
from fgvc.io.bits import pack, unpack
from fgvc.models.probe import put_head
from fgvc.runs.distributed import process_group
from fgvc.training.interpolate import interpolate_weights
from fgvc.training.session import open_session

SETS = {
    "cub50": ["image.size=160"],
    "coffee": ["image.size=[112, 224]", "deploy.resize=squash"],
    "drawn": ["image.size=128"],
}
GROUPS = {"coffee": ["data.group_size=8"]}
NETS = {
    "lite0": ["model.backbone=tf_efficientnet_lite0"],
    "mobile": ["model.backbone=mobilenetv2_100", "model.kwargs={pad_type: same}"],
    "mobile-inat": ["model.backbone=mobilenetv2_100", "model.kwargs={pad_type: same}"],
}
CHOOSING = (16, 32, 64, 128, 200, 256)
SIZES, DRAWS, FOLDS = (5, 15, 0), 3, 5  # 0: all
SHARES = (0.25, 0.5, 0.75)
FIELDS = ("net", "set", "images", "draw", "learned", "held_out", "seconds", "floor", "epochs", "floor_right", "epochs_right")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, help="where floors and drawn tables are kept")
    parser.add_argument("--set", action="append", default=[], dest="sets", help="NAME=FOLDER")
    parser.add_argument("--net", action="append", default=[], dest="nets", help="NAME=FILE")
    parser.add_argument("--images", type=int, action="append", help="5, 15 or 0 for all")
    parser.add_argument("--between", type=Path, help="table of the nets between start and end")
    parser.add_argument("overrides", nargs="*", help="of any/plain")
    given = parser.parse_intermixed_args()
    if not given.sets:
        return _table(given.out) if given.between is None else _between_table(given.between)
    torch.set_num_threads(1)
    given.work.mkdir(parents=True, exist_ok=True)
    if not given.out.exists():
        given.out.write_text(f"# {machine()}; any/plain {' '.join(given.overrides)}\n" + ",".join(FIELDS) + "\n")
    for net, file in (pair.split("=", 1) for pair in given.nets):
        for images in given.images or SIZES:
            for name, root in (pair.split("=", 1) for pair in given.sets):
                own = [*SETS[name], *NETS[net], f"model.weights={file}", "train.workers=0", "cache=disk", *given.overrides]
                for draw in range(DRAWS if images else FOLDS):
                    key = {"net": net, "set": name, "images": str(images or "all"), "draw": str(draw)}
                    if any(key.items() <= row.items() for row in _rows(given.out)):
                        continue
                    data = [f"data.root={root}", *GROUPS.get(name, [])]
                    if images:
                        data = _drawn([*own, *data], given.work / f"{name}-{images}-{draw}.csv", images, draw)
                    else:
                        data.append(f"data.fold=[{draw}, {FOLDS}]")
                    row = key | _run([*own, *data], given.work)
                    rights = [row.pop(f"right at {share}") for share in SHARES]
                    if given.between is not None:
                        ends = row["floor_right"], *rights, str(row["epochs_right"]).split()[-1]
                        with given.between.open("a", newline="") as stream:
                            csv.writer(stream).writerow([*key.values(), row["held_out"], *ends])
                    with given.out.open("a", newline="") as stream:
                        csv.DictWriter(stream, FIELDS).writerow(row)
                    print({key: value for key, value in row.items() if "right" not in key}, flush=True)
    return None


def _drawn(overrides: list[str], table: Path, images: int, draw: int) -> list[str]:
    """Settings of a table in which so many train images a class are drawn, and the rest of them validates."""
    index = read_source(api.load_recipe(recipe_file("any/plain"), overrides).data)
    rng = np.random.default_rng([images, draw])
    train = np.flatnonzero(index.splits != SPLITS.index("test"))
    order = rng.permutation(train)
    taken = np.concatenate([order[index.labels[order] == k][:images] for k in range(len(index.classes))])
    rest = np.setdiff1d(train, taken)
    if index.groups is not None:
        rest = rest[~np.isin(index.groups[rest], index.groups[taken])]
    with table.open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["path", "label", "split"])
        for split, own in (("train", np.sort(taken)), ("val", rest)):
            rows.writerows([str(index.paths[i]), index.classes[index.labels[i]], split] for i in own)
    return ["data.kind=csv", f"data.root={index.root}", f"data.file={table.resolve()}"]


def _run(overrides: list[str], work: Path) -> dict[str, object]:
    recipe, started = api.load_recipe(recipe_file("any/plain"), overrides), time.perf_counter()
    with process_group(recipe.train) as process, open_session(recipe, process, out=work) as session:
        net = session.step.net
        weight, bias, floor, _ = fitted_floor(session, work)
        put_head(net, weight, bias)
        if session.ema is not None:
            session.ema.set(net)
        start = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        found = [right_of(session, session.average or net) for _ in epochs(session, work)]
        between = copy.deepcopy(session.average or net)
        end, rights = {name: tensor.clone() for name, tensor in between.state_dict().items()}, {}
        for share in SHARES:
            between.load_state_dict(interpolate_weights(start, end, share))
            rights[f"right at {share}"] = pack(right_of(session, between))
        return {
            "learned": len(session.index.rows("train")), "held_out": len(floor), "floor": percent(floor),
            "epochs": " ".join(percent(right) for right in found), "floor_right": pack(floor),
            "epochs_right": " ".join(pack(right) for right in found), "seconds": round(time.perf_counter() - started), **rights,
        }  # fmt: skip


def _rows(out: Path) -> list[dict[str, str]]:
    with out.open(newline="") as stream:
        return list(csv.DictReader(line for line in stream if not line.startswith("#")))


def _right(row: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """(N,) and (E,N) bool: what the floor and each epoch name rightly."""
    bits = [unpack(one, int(row["held_out"])) for one in (row["floor_right"], *row["epochs_right"].split())]
    return bits[0], np.stack(bits[1:])


def _chosen(floor: np.ndarray, epochs: np.ndarray) -> np.ndarray:
    """(N,) bool: each half of the images by what the other half chooses of the start and the (E,N) epochs, as a run does."""
    right = np.empty_like(floor)
    half = np.random.default_rng(0).permutation(len(floor)) % 2 == 0
    for judged in (half, ~half):
        rule = _better if (~judged).sum() >= FEWEST_TO_CHOOSE else _settled
        right[judged] = rule(floor, epochs, ~judged)[judged]
    return right


def _best(floor: np.ndarray, epochs: np.ndarray, choose: np.ndarray) -> np.ndarray:
    """What the images `choose` (N,) like best of the start and all epochs."""
    candidates = np.concatenate([floor[None], epochs])
    return candidates[candidates[:, choose].mean(axis=1).argmax()]


def _better(floor: np.ndarray, epochs: np.ndarray, choose: np.ndarray) -> np.ndarray:
    """The best of the epochs, if they like it better than the start by more than one standard error; else the start."""
    best = epochs[epochs[:, choose].mean(axis=1).argmax()]
    return best if beats(floor[choose], best[choose]) else floor


def _settled(floor: np.ndarray, epochs: np.ndarray, choose: np.ndarray) -> np.ndarray:
    """The end, or the start where they like that better by more than one standard error."""
    return floor if beats(epochs[-1][choose], floor[choose]) else epochs[-1]


def _end(floor: np.ndarray, epochs: np.ndarray, choose: np.ndarray) -> np.ndarray:
    return epochs[-1]


def _by_images(rows: list[dict[str, str]]) -> None:
    """Print what each rule ships where so many images choose, drawn at random, scored on all others: points over the floor, the
    mean of all rows that have as many, each of 200 draws."""
    rng = np.random.default_rng(0)
    rules = {"best of the start and all epochs": _best, "best epoch if clearly better than the start": _better,
             "end, or a clearly better start": _settled, "end": _end}  # fmt: skip
    print(f"\n| images that choose | rows | {' | '.join(rules)} |\n{'|---' * (2 + len(rules))}|")
    for images in CHOOSING:
        gains = []
        for row in rows:
            floor, epochs = _right(row)
            if len(floor) < 1.5 * images:
                continue
            own = []
            for _ in range(200):
                choose = rng.permutation(len(floor)) < images
                shipped = [rule(floor, epochs, choose) for rule in rules.values()]
                own.append([right[~choose].mean() - floor[~choose].mean() for right in shipped])
            gains.append(np.mean(own, axis=0))
        cells = [f"{100 * gain:+.1f}" for gain in np.mean(gains, axis=0)]
        print(f"| {images} | {len(gains)} | {' | '.join(cells)} |")


def _between_table(file: Path) -> None:
    """Print points over the floor of the nets between start and end, the draws of a cell together."""
    cells: dict[tuple[str, ...], list[list[np.ndarray]]] = {}
    with file.open(newline="") as stream:
        for net, name, images, _, count, *rights in csv.reader(stream):
            cells.setdefault((net, name, images), []).append([unpack(right, int(count)) for right in rights])
    print(f"| net | set | images a class | draws | floor % | {' | '.join(f'at {share}' for share in (*SHARES, 1))} |")
    print(f"|{'---|' * (6 + len(SHARES))}")
    for cell, draws in cells.items():
        floor, *others = (np.concatenate(parts) for parts in zip(*draws, strict=True))
        print(f"| {' | '.join([*cell, str(len(draws)), percent(floor), *(gain(floor, right) for right in others)])} |")


def _table(out: Path) -> None:
    cells: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in _rows(out):
        cells.setdefault((row["net"], row["set"], row["images"]), []).append(row)
    over = "over the floor (95 %)"
    head = ["net", "set", "images a class", "draws", "floor %", "shipped %", over, "end %", over]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    gains = []
    for (net, name, images), rows in cells.items():
        floors, chosen, ends = [], [], []
        for row in rows:
            floor, epochs = _right(row)
            floors.append(floor)
            chosen.append(_chosen(floor, epochs))
            ends.append(epochs[-1])
        floor, shipped, end = (np.concatenate(parts) for parts in (floors, chosen, ends))
        gains.append((shipped.mean() - floor.mean(), end.mean() - floor.mean()))
        said = [net, name, images, str(len(rows)), percent(floor), percent(shipped), gain(floor, shipped)]
        said += [percent(end), gain(floor, end)]
        print(f"| {' | '.join(said)} |")
    shipped, end = 100 * np.mean(gains, axis=0)
    print(f"\nmean over {len(gains)} cells, points: shipped {shipped:+.2f}, end {end:+.2f}")
    _by_images(_rows(out))


if __name__ == "__main__":
    main()
