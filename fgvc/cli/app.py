"""Command line of fgvc. Results go to stdout, everything else to stderr.

Exit codes: 0 success, 1 a check failed, 2 a mistake that fgvc can name, 3 nothing better is shown, 4 no image that the deployed
file has not seen, 5 the images do not decide. Heavy packages are imported inside the verb that needs them, so that --help is
instant.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from fgvc import __version__
from fgvc.cli import data, evaluation, improve, shipping, training
from fgvc.cli.option import Verb
from fgvc.errors import FgvcError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Raise the accuracy of the classifier you already deploy without changing a node of its ONNX graph.",
)
data_app = typer.Typer(no_args_is_help=True, help="Look at data before training on it.")
app.add_typer(data_app, name="data")

VERBS: dict[str, Callable[..., None]] = {
    "improve": improve.improve,
    "recipes": training.recipes,
    "init": training.init,
    "probe": data.probe,
    "train": training.train,
    "interpolate": training.interpolate,
    "eval": evaluation.evaluate,
    "localize": evaluation.localize,
    "explain": evaluation.explain,
    "report": evaluation.report,
    "compare": evaluation.compare,
    "ablate": training.ablate,
    "inspect": shipping.inspect,
    "preprocess": shipping.preprocess,
    "export": shipping.export,
    "verify": shipping.verify,
    "predict": shipping.predict,
    "serve": shipping.serve,
    "triton": shipping.triton,
    "bench": training.bench,
}
DATA_VERBS: dict[str, Callable[..., None]] = {"demo": data.demo, "check": data.check, "preview": data.preview}


def _version(requested: bool) -> None:
    if requested:
        print(f"fgvc {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of fgvc itself, before a verb."""


for group, verbs in ((app, VERBS), (data_app, DATA_VERBS)):
    for name, verb in verbs.items():
        group.command(name, cls=shipping.OptionalInto if verb is shipping.export else Verb)(verb)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: named mistakes become one message and exit code 2. `arguments`: the process's by default."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name need not be UTF-8; JSON reads what this writes instead
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app(arguments)
    except FgvcError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
