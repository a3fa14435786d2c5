"""Does erasing hit the object? The share of what is erased that lies inside the object's box, guided against random.

    python benchmarks/erasing_hits.py RUN... --out docs/results/old-base/erasing-hits.csv

Each RUN was trained on a data set with boxes, with one technique that erases, drops or crops by a map. Its own step, with its
own weights, looks at the validation images (whole, as evaluation fits them), and what it erases is set beside the same
regions moved to random places (round the edges, so that every area stays).
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fgvc.config.data import SPLITS, Augment
from fgvc.data.augment import Augmenter
from fgvc.data.loader import train_loader
from fgvc.errors import FgvcError
from fgvc.report.preview import load_trained
from fgvc.runs.distributed import process_group
from fgvc.runs.environment import environment
from fgvc.runs.folder import read_run
from fgvc.techniques.masks import shifted
from fgvc.training.batch import to_batch
from fgvc.training.epoch_start import epoch_start
from fgvc.training.log import Events
from fgvc.training.session import Session, open_session

PLACES = 20  # random ones for every region
WHOLE = Augment(crop="fit", crop_scale=(1, 1), flip=0, brightness=0, contrast=0, saturation=0)
REGIONS = ("erased", "dropped")  # what techniques call them, with more after it


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("runs", nargs="+", type=Path)
    arguments.add_argument("--out", required=True, type=Path)
    given = arguments.parse_args()
    try:
        rows = [row for run in given.runs for row in study(run)]
    except FgvcError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with given.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return 0


def study(run: Path) -> list[dict[str, str]]:
    """One line for every kind of region that the run's techniques make."""
    recipe = read_run(run)
    rng = np.random.default_rng(0)
    found: dict[str, list[np.ndarray]] = {}
    with process_group(recipe.train) as process, open_session(recipe, process) as session:
        if session.index.boxes is None or not len(session.index.rows("val")):
            raise FgvcError(f"{run}: needs data with boxes and a validation split")
        load_trained(session, run)
        validation = np.where(session.index.splits == SPLITS.index("val"), SPLITS.index("train"), SPLITS.index("test"))
        session.index = replace(session.index, splits=validation.astype(np.int8))
        for name, mask, inside in regions(session, run):
            area = mask.sum((1, 2))
            hit = (mask & inside).sum((1, 2)) / area.clamp_min(1)
            by_chance = []
            for _ in range(PLACES):
                where = torch.from_numpy(rng.random((len(mask), 2), dtype=np.float32))
                by_chance.append((shifted(mask, where) & inside).sum((1, 2)) / area.clamp_min(1))
            some = area > 0
            share = area / mask[0].numel()
            columns = [share, hit, torch.stack(by_chance).mean(0)]
            found.setdefault(name, []).append(torch.stack(columns, dim=1)[some].numpy())
    return [line(run, name, np.concatenate(parts)) for name, parts in found.items()]


def line(run: Path, name: str, values: np.ndarray) -> dict[str, str]:
    """Means over images, and the ratio's 95 % interval by bootstrap."""
    rng = np.random.default_rng(0)
    share, guided, chance = values.mean(0)
    drawn = values[rng.integers(len(values), size=(2000, len(values)))].mean(1)
    low, high = np.quantile(drawn[:, 1] / drawn[:, 2], [0.025, 0.975])
    env = environment()
    return {
        "run": run.name, "region": name, "images": str(len(values)), "area": f"{share:.3f}",
        "inside_guided": f"{guided:.3f}", "inside_random": f"{chance:.3f}",
        "ratio": f"{guided / chance:.2f}", "low": f"{low:.2f}", "high": f"{high:.2f}",
        "torch": env["torch"], "timm": env["timm"],
    }  # fmt: skip


def regions(session: Session, run: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, region and inside of the box, both (B,H,W) bool, for all validation images, some at a time."""
    between = dict(session.step.hooks("before_epoch"))
    rows = session.index.rows("train")
    augmenter = Augmenter(WHOLE, session.preprocess, seed=0)
    loader = train_loader(session.index, rows, augmenter=augmenter, batch_size=25, seed=0, workers=0)
    size = session.preprocess.size
    with tempfile.TemporaryDirectory() as scratch:
        events = Events(Path(scratch), session.recipe.log, active=False)
        for kind, prepare in between.items():  # as at the end of its first round
            end = -(-session.recipe.train.epochs // getattr(session.recipe.techniques, kind).rounds)
            session.progress.epoch, session.progress.history = end, [{"base": 1.0}] * end
            session.progress.micro = 0
            session.step.techniques[kind].load_state_dict({"round": 0})
            prepare(epoch_start(session, Path(scratch), events, stop=threading.Event()))
        # Two passes: what is recorded in the first is erased in the second (source: previous_epoch).
        for epoch in range(2):
            for step, raw in enumerate(loader.epoch(epoch)):
                batch = to_batch(raw, session.normalise, size)
                inside = boxes_inside(session, batch.index.numpy(), batch.geometry, size)
                session.step(batch, session.step.draw(batch, 0.9, seed=0, step=step))
                for kind, context in session.step.contexts.items():
                    for name, (_, mask) in context.shown.items() if epoch else ():
                        if name.startswith(REGIONS) and mask.dtype == torch.bool:
                            fine = F.interpolate(mask[:, None].float(), size, mode="nearest-exact")[:, 0] > 0
                            yield f"{kind}: {name}", fine, inside
                for kind, after in session.step.hooks("after_step"):
                    after(session.step.contexts[kind])
                for kind in between if epoch else ():
                    masks = [erased_before(session, kind, row, size) for row in batch.index.tolist()]
                    yield f"{kind}: erased", torch.stack(masks), whole_inside(session, batch.index.numpy(), size)


def erased_before(session: Session, kind: str, row: int, size: tuple[int, int]) -> Tensor:
    """(H,W) bool: what a technique erases from the whole image before any geometry."""
    blank = np.full((*size, 3), 1, dtype=np.uint8)
    hook = session.step.techniques[kind].on_sample
    return torch.from_numpy((hook(blank.copy(), row) != blank).any(2))


def boxes_inside(session: Session, rows: np.ndarray, geometry: Tensor, size: tuple[int, int]) -> Tensor:
    """(B,H,W) bool: the pixels of crops, with their matrices to the originals, inside the object's box."""
    height, width = size
    down, across = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    points = torch.stack([across, down, torch.ones_like(down)], dim=-1)
    at = torch.einsum("bij,hwj->bhwi", geometry, points)
    left, top, right, bottom = torch.from_numpy(session.index.corners(rows))[:, :, None, None].unbind(1)
    return (at[..., 0] >= left) & (at[..., 0] < right) & (at[..., 1] >= top) & (at[..., 1] < bottom)


def whole_inside(session: Session, rows: np.ndarray, size: tuple[int, int]) -> Tensor:
    """As `boxes_inside`, of whole images squashed to `size`."""
    from fgvc.images.decode import decode

    sides = [decode(session.index.path(int(row))).size for row in rows]
    matrices = [[[w / size[1], 0.0, 0.0], [0.0, h / size[0], 0.0]] for w, h in sides]
    return boxes_inside(session, rows, torch.tensor(matrices), size)


if __name__ == "__main__":
    sys.exit(main())
