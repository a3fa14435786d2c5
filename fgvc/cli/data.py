"""Verbs on data before training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from fgvc.cli.option import Config, Overrides, following, recipe_of, sides


def demo(
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    seed: Annotated[int, typer.Option(help="Another seed draws other pictures.")] = 0,
) -> None:
    """Draw the demonstration set: eight kinds of beetle that differ only in small parts."""
    from fgvc.data.drawn.beetles import draw_demo

    draw_demo(folder, seed=seed)
    print(folder)
    following("train", folder)


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
    write_clean: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.csv",
            help="A list to write of the images that are fit to learn from, for data.kind=csv data.file=FILE.csv.",
        ),
    ] = None,
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
    recipe = recipe_of(config, overrides)
    from fgvc import api
    from fgvc.cli import show

    report = api.check(recipe, suspects=suspects, likeness=likeness, page=out, table=csv, clean=write_clean)
    show.check(report)
    if write_clean is not None:
        show.clean(report, write_clean)
    for written in filter(None, (out, csv, write_clean)):
        print(written)
    if report.ok:
        following("train", config, *(overrides or []))
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
    recipe = recipe_of(config, overrides)
    from fgvc import api

    sheets = api.preview(recipe, out, images=images, epoch=epoch - 1, run=run)
    for note in sheets.notes:
        print(f"warning: {note}", file=sys.stderr)
    for sheet in sheets.sheets:
        print(sheet)
    print(f"{len(sheets.sheets)} sheets of {images} samples", file=sys.stderr)
    following("train", config, *(overrides or []))


def probe(
    source: Annotated[
        str, typer.Argument(metavar="DATA", help="A folder or table of images, a recipe file, or a recipe's id.")
    ],
    overrides: Overrides = None,
    start: Annotated[
        list[str] | None,
        typer.Option(
            help="A net to try: NAME=FILE, NAME=hub or NAME=packaged, with timm's name; FILE; a run; a bundle. Several times; "
            "the first, or the recipe's own, is what is deployed."
        ),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(
            help="Of the input in pixels: 160, or 112x224 (height x width); several times. Default: the recipe's, else the "
            "net's own."
        ),
    ] = None,
    crop: Annotated[
        list[float] | None,
        typer.Option(
            min=0.05, max=1, help="Share that the evaluation crop keeps; several times. Default: the net's own, and 1."
        ),
    ] = None,
    images: Annotated[
        int,
        typer.Option(min=10, help="Most images that are looked at; of more a sample is drawn, of each class 5 or more."),
    ] = 3000,
    json: Annotated[
        str | None, typer.Option(metavar="FILE|-", help="All figures as JSON; - for stdout, and no table.")
    ] = None,
) -> None:
    """How accurate frozen nets with a logistic regression are on a set, what limits that, and how to go on. Trains nothing.

    Cross-validated within the images to learn from; the test split is not read."""
    from fgvc import api
    from fgvc.cli import show
    from fgvc.io.files import as_json, refuse_file, write_atomic
    from fgvc.studies.advice import summary

    out = None if json in (None, "-") else Path(str(json))
    if out is not None:
        refuse_file(out)
    sizes = [sides(text) for text in size or []]
    probed = api.probe(source, overrides or [], starts=start or [], sizes=sizes, crops=crop or [], images=images)
    if out is not None:
        write_atomic(out, as_json(summary(probed)))
    if json == "-":
        print(as_json(summary(probed)), end="")
    else:
        show.probe(probed)
