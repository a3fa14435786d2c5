"""What all who race have in common: the same images, the same start, the same view, a clock, and a table of answers."""

from __future__ import annotations

import argparse
import csv
import time
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

import torch
import torchvision.transforms as transforms
from PIL import Image

MINUTES = 20.0


def arguments(doc: str | None) -> Namespace:
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("images", type=Path, help="images.csv of an improvement: path, label, split")
    parser.add_argument("root", type=Path)
    parser.add_argument("weights", type=Path, help="of the start, safetensors")
    parser.add_argument("answers", type=Path)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


class Race:
    """The images of train and val may be used as one likes; those of test are answered once, at the end."""

    def __init__(self, options: Namespace) -> None:
        self.options, self.started = options, time.monotonic()
        rows = list(csv.DictReader(options.images.read_text(encoding="utf-8").splitlines()))
        self.learn = [row for row in rows if row["split"] != "test"]
        self.judge = [row for row in rows if row["split"] == "test"]
        self.classes = sorted({row["label"] for row in rows})
        size = options.size
        self.view_of = transforms.Compose(
            [
                transforms.Resize(int(size / 0.875), transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(size),
                transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3),
            ]
        )  # fmt: skip

    @property
    def left(self) -> float:
        """Seconds."""
        return 60 * self.options.minutes - (time.monotonic() - self.started)

    def picture(self, row: dict[str, str]) -> Image.Image:
        return Image.open(self.options.root / row["path"]).convert("RGB")

    def view(self, row: dict[str, str]) -> torch.Tensor:
        """The picture as it is judged."""
        return self.view_of(self.picture(row))

    def write(self, labels: Iterable[str]) -> None:
        with self.options.answers.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label", "answer", "seconds"])
            seconds = round(time.monotonic() - self.started)
            right = 0
            for row, answer in zip(self.judge, labels, strict=True):
                writer.writerow([row["path"], row["label"], answer, seconds])
                right += row["label"] == answer
        print(f"{self.options.answers}: {100 * right / len(self.judge):.1f} % of {len(self.judge)}, {seconds} s")
