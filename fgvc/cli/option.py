"""Arguments and options that several verbs share, and the class of a verb."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from fgvc.config.images import MAX_PIXELS
from fgvc.errors import FgvcError

if TYPE_CHECKING:
    from fgvc.config.recipe import Recipe

Config = Annotated[str, typer.Argument(help="A recipe file, or the id of one that comes with fgvc.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, as many as you like.")]
Run = Annotated[Path, typer.Argument(help="The folder of a run.")]
SplitOption = Annotated[
    Literal["val", "test"] | None, typer.Option("--split", help="Default: val where there is one, else test.")
]
Select = Annotated[
    Literal["last", "best", "ema", "swa", "start", "floor"] | None,
    typer.Option(
        "--select",
        help="Other weights than the recipe selects; start: those before the first step; floor: the same with a head that is "
        "fitted to the frozen net.",
    ),
]
Channels = Annotated[
    int | None,
    typer.Option(
        min=0, help="How many channels scorecam, sscam and ablationcam try; 0: all. Default: 64, or what is cheap."
    ),
]
Root = Annotated[
    Path | None, typer.Option("--root", help="Where the run's data lie now; default: where its recipe says.")
]
Device = Annotated[str | None, typer.Option("--device", help="auto | cpu | cuda | mps; default: the recipe's.")]
Megapixels = Annotated[
    float,
    typer.Option(
        "--megapixels",
        min=0.001,
        max=4000,
        help="Most pixels of a picture, in millions; above 50, JPEGs are decoded at 1/2, 1/4 or 1/8 of their sides.",
    ),
]
MEGAPIXELS = MAX_PIXELS / 1e6
OtherMegapixels = Annotated[
    float | None,
    typer.Option(
        "--megapixels",
        min=0.001,
        max=4000,
        help="Most pixels of a picture, in millions; default: data.max_megapixels of the run or recipe, else 50.",
    ),
]


UsageError: Any = typer.BadParameter.__base__  # of click, which newer versions of typer have inside


class Verb(TyperCommand):
    """A verb, which says where a setting is given when it takes none."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except UsageError as error:
            settings = [text for text in given if "=" in text and not text.startswith("-") and text in error.message]
            if settings and error.message.startswith("Got unexpected extra argument"):
                options = {option for parameter in self.params for option in parameter.opts}
                hints = [f"{ctx.command_path} takes no settings (section.key=value)"]
                for text in settings:
                    key, _, value = text.partition("=")
                    option = f"--{key.rpartition('.')[2].replace('_', '-')}"
                    hints += [f"{text}: did you mean {option} {value}?"] if option in options else []
                error.message += f". {'; '.join(hints)}. Settings are given to `fgvc train`, or written into a recipe"
            raise


def pixels(megapixels: float | None) -> int | None:
    return None if megapixels is None else round(megapixels * 1e6)


def recipe_path(config: str) -> Path:
    """Path of a recipe, by path or id."""
    from fgvc.config.template import recipe_file

    return recipe_file(config)


def recipe_of(config: str, overrides: list[str] | None, *, out: Path | None = None) -> Recipe:
    """Load a recipe by path or id, with the command line's overrides, whose data are there. Needs no torch, so that mistakes are
    reported at once. `out`: the folder of its run, which needs no data any more once it is finished."""
    from fgvc.data.recipe import load_recipe

    recipe = load_recipe(recipe_path(config), overrides or [])
    if out is None or not (out / "config.yaml").is_file():
        recipe.data.folder()
    return recipe


def sides(text: str) -> tuple[int, int]:
    """Parse the height and width of --size: `160` or `112x224`. Raises FgvcError where they are none that an image may have."""
    height, _, width = text.lower().partition("x")
    try:
        pair = int(height), int(width or height)
    except ValueError:
        raise FgvcError(f"--size {text}: HEIGHTxWIDTH in pixels, such as 112x224, or one number, such as 160") from None
    if min(pair) < 8 or max(pair) > 4096:
        raise FgvcError(f"--size {text}: between 8 and 4096 pixels a side")
    return pair
