"""The table of coffee-leaf5 with its groups: per class, photographs in number order, blocks of 8, as its README splits them.

    python benchmarks/base/coffee_table.py COFFEE > coffee.csv
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

BLOCK = 8


def main(root: Path) -> None:
    rows = csv.writer(sys.stdout)
    rows.writerow(["path", "label", "split", "group"])
    for part in ("train", "test"):
        for folder in sorted(path for path in (root / part).iterdir() if path.is_dir()):
            for place, file in enumerate(sorted(folder.iterdir(), key=lambda path: int(path.stem))):
                group = f"{part}-{folder.name}-{place // BLOCK}"
                rows.writerow([file.relative_to(root).as_posix(), folder.name, part, group])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
