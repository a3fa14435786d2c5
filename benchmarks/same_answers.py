"""Do all ways to run a trained net say the same? Logits of `fgvc eval`, then class and probability by every other way.

    python benchmarks/same_answers.py RUN BUNDLE --images 200 --serve http://127.0.0.1:8000 --ray http://127.0.0.1:8001 \
        --out docs/results/same-answers.csv

--serve: `fgvc serve BUNDLE`; --ray: deploy/ray_serve/app.py with the same bundle; each is left out where it is not named.
The images are spread evenly over the test split. A way agrees where its first class is that of `fgvc eval` on every image and no
probability among the first five differs by more than 1e-4; exit code 1 where one does not.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fgvc.runs.loaded import load_run
from fgvc.runtime.bundle import load_bundle
from fgvc.runtime.engine import answers
from fgvc.runtime.predict import predict_files

TOLERANCE, TOP = 1e-4, 5


def by_predict(bundle: Path, paths: list[Path]) -> Iterator[dict]:
    """What `fgvc predict --json` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        predict_files(bundle, paths, as_json=True, top_k=TOP)
    return map(json.loads, printed.getvalue().splitlines())


def by_http(url: str, paths: list[Path]) -> Iterator[dict]:
    for path in paths:
        request = urllib.request.Request(f"{url}/v1/classify?top_k={TOP}", path.read_bytes(), method="POST")
        request.add_header("Content-Type", "image/jpeg")
        with urllib.request.urlopen(request) as answer:
            yield json.load(answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--serve", help="address of `fgvc serve`")
    parser.add_argument("--ray", help="address of Ray Serve")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    opened, bundle = load_run(options.run), load_bundle(options.bundle)
    assert opened.classes == bundle.labels
    _, rows = opened.rows_of("test")
    rows = rows[np.linspace(0, len(rows) - 1, options.images).round().astype(int)]
    evaluated = opened.answers(rows)
    assert not evaluated.unreadable
    order = np.argsort(evaluated.rows)
    paths = [opened.index.path(int(row)) for row in evaluated.rows[order]]
    expected = answers(bundle, evaluated.logits[order], top_k=len(bundle.labels))

    ways = {"fgvc predict": by_predict(options.bundle, paths)}
    ways |= {"POST /v1/classify": by_http(options.serve, paths)} if options.serve else {}
    ways |= {"Ray Serve": by_http(options.ray, paths)} if options.ray else {}
    table = []
    for way, said in ways.items():
        same, worst = 0, 0.0
        for one, by_eval in zip(said, expected, strict=True):
            p = {q.index: q.probability for q in by_eval.predictions}
            same += one["predictions"][0]["index"] == by_eval.predictions[0].index
            worst = max(worst, *(abs(q["probability"] - p[q["index"]]) for q in one["predictions"]))
        table.append({"way": way, "images": len(paths), "same first class": same, "largest difference": f"{worst:.1e}"})
        print(table[-1])
    with options.out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    good = all(
        row["same first class"] == row["images"] and float(str(row["largest difference"])) <= TOLERANCE for row in table
    )
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
