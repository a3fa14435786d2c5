"""Verbs that look at data before training on it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from fgvc.cli.option import Config, Overrides, recipe_path


def demo(
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    seed: Annotated[int, typer.Option(help="Another seed draws other pictures.")] = 0,
) -> None:
    """Draw the demonstration set: eight kinds of beetle that differ only in small parts."""
    from fgvc.data.demo import draw_demo

    draw_demo(folder, seed=seed)
    print(folder)


def check(
    config: Config,
    overrides: Overrides = None,
    suspects: Annotated[
        bool,
        typer.Option(
            "--suspects", help="Look for wrong labels, too: a forward per image, and a probe of the features."
        ),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="An HTML file to write, with the images.")] = None,
    csv: Annotated[Path | None, typer.Option(help="A CSV file to write, a line for each image and finding.")] = None,
    likeness: Annotated[
        float,
        typer.Option(
            min=0.5,
            max=1,
            help="From which correlation of thumbnails on two pictures are near copies. Raise it for a fixed camera.",
        ),
    ] = 0.98,
    fail_on: Annotated[
        Literal["error", "warning", "never"], typer.Option(help="What makes the exit code 1.")
    ] = "error",
) -> None:
    """Balance, unreadable files, copies and near copies, colours, and with --suspects labels that look wrong."""
    from fgvc import api, show

    recipe = api.load_recipe(recipe_path(config), overrides or [])
    report = api.check(recipe, suspects=suspects, likeness=likeness, page=out, table=csv)
    show.check(report)
    for written in filter(None, (out, csv)):
        print(written)
    worst = "error" if report.errors else "warning" if report.warnings else ""
    sys.exit(1 if worst and fail_on in (worst, "warning") else 0)


def preview(
    config: Config,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="The folder for the sheets.")] = Path("preview"),
    images: Annotated[int, typer.Option(min=1, help="Samples on a sheet.")] = 6,
    epoch: Annotated[int, typer.Option(min=1, help="Whose first step is shown.")] = 1,
    run: Annotated[
        Path | None, typer.Option(help="A run whose trained weights make the maps; default: the first weights.")
    ] = None,
) -> None:
    """Contact sheets of what the network will really see, technique by technique: images, targets, maps and masks."""
    from fgvc import api

    recipe = api.load_recipe(recipe_path(config), overrides or [])
    found = api.preview(recipe, out, images=images, epoch=epoch - 1, run=run)
    for note in found.notes:
        print(f"warning: {note}", file=sys.stderr)
    for sheet in found.sheets:
        print(sheet)
