"""Demonstration of fgvc on a set that it draws itself (`make demo`): a deployed file is made and improved; all output is real.

python -m fgvc.cli.demo FOLDER
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.console import Console

from fgvc.cli.app import main as fgvc

BUDGET = "3m"
PICTURE = "images/001.Rhino_Spotted_Collared/Rhino_Spotted_Collared_0093.jpg"


def main(folder: Path) -> int:
    """Draw a set, train and export a classifier plainly for a short time, improve that file, and compare both.

    Returns the exit code of the first command that fails, or of `fgvc improve`."""
    started, console = time.monotonic(), Console(highlight=False)
    data, deployed, better = folder / "data", folder / "deployed", folder / "better"
    commands = [
        *([] if data.exists() else [f"data demo {data}"]),
        f"train any/plain data.root={data} image.size=96 train.epochs=2 --out {folder / 'runs' / 'plain'} --overwrite",
        f"export {folder / 'runs' / 'plain'} -o {deployed} --overwrite",
        f"improve {deployed / 'model.onnx'} {data} --budget {BUDGET} -o {better}",
        f"compare {deployed / 'model.onnx'} {better / 'bundle'} --data {data}",
        f"verify {better / 'bundle' / 'model.onnx'} --into {deployed / 'model.onnx'}",
        f"predict {better / 'bundle'} {data / PICTURE} --top-k 2",
    ]
    for number, command in enumerate(commands, 1):
        console.rule(f"{number} of {len(commands)}")
        console.print(f"$ fgvc {command}", markup=False, soft_wrap=True)
        if code := _run(command):
            return code
    console.rule()
    console.print(f"{time.monotonic() - started:.0f} s in all; the page: {better / 'report.html'}")
    if (activate := Path(sys.prefix, "bin", "activate")).is_file():
        console.print(f"to have the command in this shell: source {activate}", markup=False, soft_wrap=True)
    return 0


def _run(command: str) -> int:
    try:
        fgvc(command.split())
    except SystemExit as end:
        return int(end.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo")))
