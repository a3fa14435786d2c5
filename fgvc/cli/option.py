"""Arguments and options that several verbs share, and the class of a verb."""

from __future__ import annotations

import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from fgvc.config.images import MAX_PIXELS
from fgvc.errors import FgvcError

if TYPE_CHECKING:
    from fgvc.config.recipe import Recipe
    from fgvc.data.recipe import Opened



def complete_recipe(incomplete: str) -> list[str]:
    """Ids of recipes that begin so; the shell adds files."""
    from fgvc.config.shipped import recipes

    return [name for name in recipes() if name.startswith(incomplete)]


def complete_setting(incomplete: str) -> list[str]:
    """Keys of a recipe that begin so, up to the `=`."""
    from fgvc.config.recipe import Recipe
    from fgvc.config.usual import settings_of

    return [f"{key}=" for key in sorted(settings_of(Recipe)) if key.startswith(incomplete)]


Config = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE|IMAGES",
        help="A recipe's file, the id of one that comes with fgvc (`fgvc recipes`), or images: a folder of classes, or a table.",
        autocompletion=complete_recipe,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="section.key=value, as many as you like.", autocompletion=complete_setting
    ),
]
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
        options = {option for parameter in self.params for option in parameter.opts}
        try:
            return super().parse_args(ctx, args)
        except UsageError as error:
            settings = [text for text in given if "=" in text and not text.startswith("-") and text in error.message]
            if settings and error.message.startswith("Got unexpected extra argument"):
                hints = [f"{ctx.command_path} takes no settings (section.key=value)"]
                for text in settings:
                    key, _, value = text.partition("=")
                    option = f"--{key.rpartition('.')[2].replace('_', '-')}"
                    hints += [f"{text}: did you mean {option} {value}?"] if option in options else []
                error.message += f". {'; '.join(hints)}. Settings are given to `fgvc train`, or written into a recipe"
            name = str(getattr(error, "option_name", "") or "")
            if name.startswith("-") and "overrides" in {parameter.name for parameter in self.params}:
                error.message += _as_setting(name)
            raise


def _as_setting(option: str) -> str:
    """Hint to write a setting that was given as an option (`--epochs 3`) as `section.key=value`; empty for an option that names
    no setting."""
    from fgvc.config.recipe import Recipe
    from fgvc.config.usual import settings_of, usual_key

    name = option.lstrip("-")
    hint = f"did you mean {name}?" if name in settings_of(Recipe) else usual_key(Recipe, (name,))
    return f". Settings are given as section.key=value: {hint.removesuffix('?')}=...?" if hint.startswith("did") else ""


def following(*words: object) -> None:
    """Say on stderr which command comes next."""
    print(f"next: {shlex.join(['fgvc', *map(str, words)])}", file=sys.stderr)


def following_serve(bundle: Path) -> None:
    """Say on stderr that `fgvc serve` comes next, where the packages that it needs are installed."""
    if find_spec("starlette") is not None:
        following("serve", bundle)


def pixels(megapixels: float | None) -> int | None:
    """Pixels of a number of megapixels; None stays None."""
    return None if megapixels is None else round(megapixels * 1e6)


def opened(config: str, overrides: list[str] | None) -> Opened:
    """Read a recipe by path or id, or images alone, with the command line's overrides; of images, say which recipe is taken.
    Needs no torch, so that mistakes are reported at once."""
    from fgvc.config.shipped import DEFAULT
    from fgvc.data.recipe import open_recipe

    made = open_recipe(config, overrides or [])
    if made.images is not None:
        print(
            f"recipe: {DEFAULT} (`{shlex.join(['fgvc', 'init', '--data', config, 'my.yaml'])}` writes one for these images, "
            "every key explained)",
            file=sys.stderr,
        )
    return made


def recipe_of(config: str, overrides: list[str] | None) -> Recipe:
    """Read a recipe as `opened` does, without where it is from. Raises FgvcError where its data are missing."""
    recipe = opened(config, overrides).recipe
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
