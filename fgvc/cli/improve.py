"""The verb that does it all: improve."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from fgvc.cli.option import sides


def improve(
    target: Annotated[
        str, typer.Argument(metavar="FILE|NAME", help="A deployed classifier's .onnx file, or timm's name of a net.")
    ],
    data: Annotated[Path, typer.Argument(metavar="IMAGES", help="Labelled images: class folders, CUB's layout, or a table.")],
    budget: Annotated[str, typer.Option("--budget", help="Working time from start to exit: 20m, 1.5h, 2d; at least 2m.")] = "1h",
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder of everything; the same command goes on there.")] = Path(
        "better"
    ),
    labels: Annotated[Path | None, typer.Option(help="The deployed class order, a class a line.")] = None,
    preprocess: Annotated[
        Path | None, typer.Option(help="How the deployed file is fed, as a bundle's preprocess.json; default: it is found.")
    ] = None,
    seen: Annotated[
        str,
        typer.Option(
            help="What the file was trained on: train (the set's own train split; a flat folder has none), none (all images are "
            "newer than the file), or a list of paths, or fgvc's bundle with the file."
        ),
    ] = "train",
    unseen: Annotated[
        Path | None, typer.Option(help="A folder of images that the file has not seen; IMAGES are then learned from.")
    ] = None,
    unlabelled: Annotated[
        Path | None, typer.Option(help="A folder of more images, without labels: the best network so far names them.")
    ] = None,
    start: Annotated[
        list[str] | None, typer.Option(help="Other pretrained weights, NAME=FILE; larger nets teach. Several times.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Of the network's input, HxW, where no file says it.")] = None,
    min_gain: Annotated[float | None, typer.Option(help="Points that the gain must reach.")] = None,
    max_negative_flips: Annotated[
        str | None, typer.Option(help="Most images that the file names rightly now and would not then: 12, or 0.5%.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of splits and trainings.")] = 0,
    search: Annotated[
        bool, typer.Option("--search", help="Search around the winner's settings by Optuna; a second such command shares it.")
    ] = False,
    on: Annotated[
        Literal["ray"] | None, typer.Option("--on", help="Where the search runs: ray, on a cluster (RAY_ADDRESS).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop when the plan is made.")] = False,
) -> None:
    """Find better weights for a deployed file, and show that they are better: exit code 0; 3 where nothing better is shown."""
    from fgvc.improvement.improve import improve as run

    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        result = run(
            target,
            data,
            out,
            budget=budget,
            starts=start or (),
            labels=labels,
            preprocess=preprocess,
            seen=seen,
            unseen=unseen,
            unlabelled=unlabelled,
            size=None if size is None else sides(size),
            min_gain=min_gain,
            max_negative_flips=max_negative_flips,
            seed=seed,
            search=search,
            on=on,
            dry_run=dry_run,
        )
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
    if result.bundle is not None:
        print(result.bundle / "model.onnx")
    elif result.candidate is not None:
        print(result.candidate)
    sys.exit(result.exit_code)
