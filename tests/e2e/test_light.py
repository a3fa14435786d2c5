"""What needs no network is told at once: no verb that only reads a recipe imports torch or timm."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "timm", "onnx", "onnxruntime", "sklearn", "matplotlib", "albumentations"}
CODE = f"""
import sys
from fgvc.cli.app import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    code = end.code
else:
    code = 0
print(code or 0, sorted({HEAVY} & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--help"], 0, ""),
        (["recipes"], 0, ""),
        (["recipes", "--schema"], 0, ""),
        (["init", "demo/plain", "OUT"], 0, ""),
        (["train", "nothere.yaml"], 2, "no such file, nor a recipe's id"),
        (["train", "data=fgvc", "model=resnet18"], 2, "images come first and settings after them; did you mean fgvc?"),
        (["train", "doc"], 2, "no such file, nor a recipe's id; did you mean docs?"),
        (["train", "demo/plain", "data.root=DATA", "train.epoch=3"], 2, "did you mean 'epochs'?"),
        (["train", "demo/plain", "data.root=DATA", "optim.lr=fast"], 2, "optim.lr: "),
        (["train", "any/plain", "data.root=DATA"], 2, "no set of images that fgvc recognises"),
        (["train", "demo/plain", "data.root=nothere"], 2, "nothere: data.root is not there"),
        (["data", "check", "demo/plain", "data.root=nothere"], 2, "nothere: data.root is not there"),
        (["data", "check", "demo/plain", "data.roots=DATA"], 2, "did you mean 'root'?"),
        (["data", "preview", "demo/plain", "data.roots=DATA"], 2, "did you mean 'root'?"),
        (["bench", "train", "demo/plain", "data.roots=DATA"], 2, "did you mean 'root'?"),
    ],
)
def test_reading_a_recipe_needs_no_torch(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    places = {"OUT": str(tmp_path / "my.yaml"), "data.root=DATA": f"data.root={tmp_path / 'data'}"}
    words = [places.get(word, word) for word in arguments]
    process = subprocess.run([sys.executable, "-c", CODE, *words], capture_output=True, text=True, check=False)
    assert process.stderr.splitlines()[-1] == f"{code} []"
    assert message in process.stderr
