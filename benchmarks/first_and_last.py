"""One line a run from docs/results/old-base/erasing/.

python benchmarks/first_and_last.py > docs/results/old-base/erasing-runs.csv
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

LOGS = Path(__file__).parents[1] / "docs" / "results" / "old-base" / "erasing"


def main() -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["run", "epochs", "base_first", "base_last", "val_top1_first", "val_top1_last"])
    for log in sorted(LOGS.glob("*.csv")):
        with log.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        ends = [f"{float(row[key]):.3f}" for key in ("base", "val_top1") for row in (rows[0], rows[-1])]
        writer.writerow([log.stem, len(rows), *ends])


if __name__ == "__main__":
    main()
