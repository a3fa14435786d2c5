"""Export of the independent plain model: built in a fresh process from name, K and kwargs only.

`python -m fgvc.exporting.reference FOLDER` reads one JSON object from its input and writes `0.onnx` and `1.onnx` there:
the same plain model with two draws of random weights. Initializers that differ between the two files are weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from torch import nn

from fgvc.config.exporting import Exporter
from fgvc.errors import FgvcError
from fgvc.exporting.canonical import weight_positions
from fgvc.exporting.onnx import Interface, export_onnx, serialised
from fgvc.io.files import cache_folder, make_folder, write_atomic
from fgvc.models.backbone import deployed, plain_model

SEEDS = (1, 2)
CACHED_GRAPHS = 8  # at most; the one that was not used for longest is removed
SOURCES = ("exporting/*.py", "models/backbone.py", "models/class_maps.py", "models/deformable.py", "models/tokens.py")


@dataclass(frozen=True, slots=True)
class Plain:
    """A float graph, the exported one or the independent plain model's, and which of its initializers are weights."""

    proto: onnx.ModelProto
    weights: frozenset[int]  # positions in canonical form
    size: tuple[int, int]  # height, width of the input


def independent_plain(
    *, backbone: str, num_classes: int, kwargs: Mapping[str, Any], interface: Interface, exporter: Exporter
) -> tuple[onnx.ModelProto, frozenset[int]]:
    """ONNX graph of the plain model, and the positions of its weights among the canonical form's initializers.

    Takes one start of Python and two exports, once in a process for equal arguments. Raises FgvcError where the process fails.
    """
    return _with_positions(_two_draws(_request(backbone, num_classes, kwargs, interface, exporter)))


def cached_plain(
    *, backbone: str, num_classes: int, kwargs: Mapping[str, Any], interface: Interface, exporter: Exporter
) -> tuple[onnx.ModelProto, frozenset[int], Literal["cached", "fresh"]]:
    """The result of `independent_plain`, from the cache where there is one, and whether it was cached or made fresh.

    A cached one was made with equal arguments, versions of the packages that shape a graph, and sources of fgvc. Both draws are
    stored with their SHA-256: a damaged one is made anew.
    """
    request = _request(backbone, num_classes, kwargs, interface, exporter)
    key = hashlib.sha256(json.dumps([request, sorted(versions().items()), _sources()]).encode()).hexdigest()
    folder = cache_folder() / "plain" / key[:32]
    if (draws := _read_cache(folder)) is not None:
        return *_with_positions(draws), "cached"
    draws = _two_draws(request)
    with suppress(FgvcError, OSError):  # a disk that is full costs the next export half a minute, and this one nothing
        _write_cache(folder, draws)
    return *_with_positions(draws), "fresh"


def versions() -> dict[str, str]:
    """Versions of the packages that shape a graph. `2.14.1+cu130` and `2.14.1+cpu` export alike."""
    names = ("torch", "timm", "onnx", "onnxscript", "onnxruntime")
    return {name: metadata.version(name).partition("+")[0] for name in names}


def _request(
    backbone: str, num_classes: int, kwargs: Mapping[str, Any], interface: Interface, exporter: Exporter
) -> str:
    request = {
        "backbone": backbone,
        "num_classes": num_classes,
        "kwargs": dict(kwargs),
        "interface": asdict(interface),
        "exporter": exporter,
        "seeds": SEEDS,
    }
    return json.dumps(request)


def _with_positions(draws: tuple[bytes, bytes]) -> tuple[onnx.ModelProto, frozenset[int]]:
    first, second = map(onnx.load_from_string, draws)
    return first, weight_positions(first, second)


@cache
def _sources() -> str:
    """SHA-256 of the code that determines a plain model's file."""
    home, sha256 = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in home.glob(pattern)):
        sha256.update(path.relative_to(home).as_posix().encode() + path.read_bytes())
    return sha256.hexdigest()


def _read_cache(folder: Path) -> tuple[bytes, bytes] | None:
    """Read both draws from a folder of the cache, which then count as used now; None where they are damaged."""
    try:
        hashes = json.loads((folder / "sha256.json").read_text(encoding="utf-8"))
        first, second = ((folder / f"{draw}.onnx").read_bytes() for draw in range(2))
        if [hashlib.sha256(content).hexdigest() for content in (first, second)] != hashes:
            return None
        os.utime(folder)
    except (OSError, ValueError):
        return None
    return first, second


def _write_cache(folder: Path, draws: tuple[bytes, bytes]) -> None:
    """Write two draws into the cache, the hashes last, and remove those that were not used for longest."""
    make_folder(folder)
    hashes = [write_atomic(folder / f"{draw}.onnx", content) for draw, content in enumerate(draws)]
    write_atomic(folder / "sha256.json", json.dumps(hashes).encode())
    others = sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in others[CACHED_GRAPHS:]:
        shutil.rmtree(old, ignore_errors=True)


@lru_cache(maxsize=4)
def _two_draws(request: str) -> tuple[bytes, bytes]:
    with tempfile.TemporaryDirectory(prefix="fgvc-reference-") as folder:
        process = subprocess.run(
            [sys.executable, "-m", "fgvc.exporting.reference", folder],
            input=request, cwd=folder, env=_environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        if process.returncode:
            tail = "\n".join(process.stderr.strip().splitlines()[-5:])
            backbone = json.loads(request)["backbone"]
            raise FgvcError(f"the independent plain model of {backbone!r} can't be exported:\n{tail}")
        return Path(folder, "0.onnx").read_bytes(), Path(folder, "1.onnx").read_bytes()


def randomise(net: nn.Module, seed: int) -> None:
    """Distinct random values in every floating tensor of the state dict, in place: none zero, variances positive.

    Fresh weights won't do: exporters merge equal tensors and drop zero biases, which changes the graph (`fgvc.exporting.ties`).
    Constants that are not in the state dict stay what they are: they are part of the graph.
    """
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in net.state_dict().values():
            if not value.is_floating_point():
                continue
            if value.ndim > 1:
                fan_in = max(1, value[0].numel())
                value.copy_(torch.randn(value.shape, generator=rng) / fan_in**0.5)
            else:  # variances, scales, means, biases
                value.copy_(torch.rand(value.shape, generator=rng) + 0.5)


def _environment() -> dict[str, str]:
    """Environment in which the child process finds the same fgvc, even if that is not installed."""
    home = str(Path(__file__).resolve().parents[2])
    if home in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        return dict(os.environ)
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))}


def main(arguments: Sequence[str]) -> None:
    """Export both draws into the folder that `arguments` names; the request comes by standard input."""
    folder = Path(arguments[0])
    request = json.load(sys.stdin)
    interface = request["interface"] | {"axes": {int(dim): name for dim, name in request["interface"]["axes"].items()}}
    for draw, seed in enumerate(request["seeds"]):
        plain = plain_model(request["backbone"], request["num_classes"], request["kwargs"])
        randomise(plain, seed)
        proto = export_onnx(deployed(plain), exporter=request["exporter"], **interface)
        (folder / f"{draw}.onnx").write_bytes(serialised(proto))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except FgvcError as error:
        sys.exit(str(error))
