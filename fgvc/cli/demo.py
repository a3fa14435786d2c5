"""Demonstration of fgvc on a set that it draws itself (`make demo`); it prints the true results.

python -m fgvc.cli.demo FOLDER
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fgvc import api
from fgvc.config.shipped import recipe_file
from fgvc.data.drawn.beetles import draw_demo

ARMS = ("plain", "trained")


def main(folder: Path) -> int:
    """Draw, train plainly and with techniques, export both with all proofs, predict, and print a table with the floor.

    Returns 0 where the contract holds, else 1.
    """
    started, console = time.monotonic(), Console(highlight=False)
    data = folder / "data"
    if not data.exists():
        console.print(f"drawing the demonstration set into {data}")
        draw_demo(data)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for number, column in enumerate(
        ("run", "test top-1 %", "graph sha256", "nodes", "fold error", "onnxruntime - torch")
    ):
        table.add_column(column, justify="left" if number == 0 else "right")
    hashes = set()
    for arm in ARMS:
        console.rule(f"demo/{arm}")
        run, bundle = folder / "runs" / arm, folder / f"bundle-{arm}"
        overrides = [f"data.root={data}", f"cache_dir={folder / 'cache'}"]
        api.train(api.load_recipe(recipe_file(f"demo/{arm}"), overrides), run, overwrite=True)
        if arm == ARMS[0]:
            floor = api.evaluate(run, "test", select="floor").scores
            table.add_row("floor", f"{100 * floor.top1:.1f}", *[""] * 4)
        scores = api.evaluate(run, "test").scores
        proven = api.export(run, bundle, overwrite=True).proven
        assert proven.structural is not None
        hashes.add(proven.structural.sha256)
        table.add_row(
            arm,
            f"{100 * scores.top1:.1f}",
            proven.structural.sha256[:12],
            str(proven.contract["proofs"]["structural"]["nodes"]),
            f"{proven.numeric.folded_float64:.0e}",
            f"{proven.behavioural.worst:.0e}",
        )
    images = sorted((data / "images").rglob("*.jpg"))[::97][:4]
    console.rule("fgvc predict (onnxruntime, no torch)")
    sys.stdout.flush()
    command = [sys.executable, "-m", "fgvc", "predict", str(folder / "bundle-trained"), *map(str, images)]
    subprocess.run(command, check=True)
    console.rule("what came out")
    console.print(table)
    same = len(hashes) == 1
    console.print(f"contract hashes {'equal' if same else 'NOT EQUAL'}; {time.monotonic() - started:.0f} s in all")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo")))
