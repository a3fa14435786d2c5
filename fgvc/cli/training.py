"""Verbs that make runs: recipes, training, interpolation, studies, benchmarks."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fgvc.cli.option import Config, Device, Overrides, Root, Run, following, opened, recipe_of
from fgvc.config.loading import drop_replaced, merge
from fgvc.errors import FgvcError
from fgvc.io.files import refuse_file, write_atomic, writing
from fgvc.io.places import is_data

if TYPE_CHECKING:
    from fgvc.config.recipe import Recipe


def recipes(
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a recipe, for editors.")] = False,
) -> None:
    """List the recipes that come with fgvc."""
    from fgvc.config import shipped, template

    if schema:
        import json

        from fgvc.config.schema import recipe_schema

        print(json.dumps(recipe_schema(), indent=1))
        return
    for name, path in shipped.recipes().items():
        text = f"{name:<22} {(template.header(path) or [''])[0]}"
        print(textwrap.fill(text, max(60, min(shutil.get_terminal_size().columns, 120)), subsequent_indent=" " * 23))
    following("init", shipped.DEFAULT, "my.yaml")


def init(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="[RECIPE] FILE",
            help="The id or file of a recipe, see `fgvc recipes`, and the file to write. The file alone with --data, where the "
            "settings are chosen by the images and a timed step, and with --deployed.",
        ),
    ],
    deployed: Annotated[
        Path | None, typer.Option(help="A deployed classifier's .onnx file: its network is trained, and how it is fed is found.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Labelled images: a folder of classes, CUB's layout, or a table.")] = None,
    seen: Annotated[
        str | None,
        typer.Option(
            help="With --deployed, what it was trained on: train, none (of these images), a file that lists them, or its bundle."
        ),
    ] = None,
    unseen: Annotated[
        Path | None, typer.Option(help="With --deployed, a folder of labelled images that it was not trained on, beside --data.")
    ] = None,
) -> None:
    """Write a recipe out with every key explained, to own and change."""
    from fgvc.config import shipped

    if settings := [name for name in names if "=" in name]:
        raise FgvcError(
            f"fgvc init takes no settings (section.key=value): {', '.join(settings)}. Settings are given to `fgvc train`, or "
            "written into a recipe"
        )
    if len(names) > 2 or (len(names) < 2 and deployed is None and data is None):
        raise FgvcError(
            "fgvc init --data IMAGES FILE, fgvc init RECIPE FILE (`fgvc recipes` lists them), or fgvc init --deployed net.onnx "
            "--data IMAGES FILE"
        )
    if len(names) == 2 and names[0] not in shipped.recipes() and is_data(Path(names[0])):
        raise FgvcError(f"{names[0]}: is no recipe but images: {shlex.join(['fgvc', 'init', '--data', *names])}")
    out = Path(names[-1])
    if out.exists():
        raise FgvcError(f"{out}: exists already; remove it, or choose another name")
    source = shipped.recipe_file(names[0] if len(names) == 2 else shipped.DEFAULT)
    if deployed is None:
        if seen is not None or unseen is not None:
            raise FgvcError("--seen and --unseen: are of a deployed file; name it with --deployed")
        if data is not None and len(names) == 1:
            text = _proposed_recipe(source, data, out)
        else:
            text = _recipe(source, {} if data is None else {"data": {"root": str(data.absolute())}})
    elif data is None:
        raise FgvcError("--deployed: on which images is it to be trained? Name them with --data")
    else:
        text = _deployed_recipe(source, deployed, data, seen, unseen, out)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    if data is None:
        print(f"{out}: set data.root, the folder of your images, and look at model.weights in it")
        following("data", "check", out, "data.root=IMAGES")
    else:
        print(f"{out}: look at it, model.weights above all")
        following("train", out)


def _recipe(source: Path, settings: dict[str, Any], *, top: list[str] | None = None) -> str:
    """A recipe with settings laid over it, written out, with its schema for editors. `top`: lines above, in place of its own."""
    from fgvc.config import template
    from fgvc.config.recipe import Recipe, with_weight_defaults
    from fgvc.config.schema import MODELINE, modeline

    def fill(tree: dict[str, Any]) -> dict[str, Any]:
        drop_replaced(Recipe, tree, [(name, key) for name, section in settings.items() for key in section])
        merge(tree, settings)
        return with_weight_defaults(tree)

    lines = [line for line in (template.header(source) if top is None else top) if not line.startswith(MODELINE)]
    return template.commented(Recipe, source, fill=fill, top=[modeline(), *lines])


def _proposed_recipe(source: Path, data: Path, out: Path) -> str:
    """A recipe whose settings are chosen by the images and by what a step takes here."""
    from fgvc.training.proposal import propose

    made = propose(data, progress=lambda line: print(line, file=sys.stderr))
    print("\n".join(made.reasons))
    reasons = [f"  {line}" for reason in made.reasons for line in textwrap.wrap(reason, 114, subsequent_indent="  ")]
    top = [f"Training on {data}: fgvc train {out.name}", "Chosen by `fgvc init`, and why:", *reasons]
    return _recipe(source, made.tree, top=top)


def _deployed_recipe(
    source: Path, deployed: Path, data: Path, seen: str | None, unseen: Path | None, out: Path
) -> str:
    """A recipe for a deployed file; where nothing states its labels, their order is written beside it."""
    from fgvc.evaluation.deployed_recipe import deployed_recipe

    labels = out.with_suffix(".labels.txt")
    refuse_file(labels)
    made = deployed_recipe(deployed, data, seen=seen, unseen=unseen, progress=lambda line: print(line, file=sys.stderr))
    if made.search is not None:
        print("\n".join(made.search.lines()))
    if made.labels is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(labels, "".join(f"{name}\n" for name in made.labels))
        made.tree["deploy"]["labels"] = str(labels.absolute())
    top = [f"Training {deployed.name} from its own weights, on {data}: fgvc train {out.name}"]
    return _recipe(source, made.tree, top=top)


def train(
    config: Config,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The run's folder. Default: runs/NAME by the recipe or the images, runs/NAME-2 and so on where that holds a run "
            "of other settings."
        ),
    ] = None,
    resume: Annotated[
        str, typer.Option(help="auto: go on with the unfinished run in --out | never | PATH of a run.")
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Lose the run that is in --out.")] = False,
    recorded: Annotated[
        bool,
        typer.Option(
            "--recorded",
            help="Go on with the images that the run began with, whatever came to its data since; all must be there.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what a step costs; train nothing.")
    ] = False,
) -> None:
    """Train a run, or go on with one."""
    made = opened(config, overrides)
    recipe, first = made.recipe, out or Path("runs") / made.name
    if not (first / "config.yaml").is_file():  # a finished run needs its data no more
        recipe.data.folder()
    from fgvc import api
    from fgvc.cli import show

    if dry_run:
        print("reading the images, building the net and timing its steps: a minute or so", file=sys.stderr)
        show.forecast(api.forecast(recipe))
        return
    folder = out or _default_folder(made.name, recipe, resume=resume, overwrite=overwrite)
    try:
        run = api.train(recipe, folder, resume=resume, overwrite=overwrite, recorded=recorded)
    except KeyboardInterrupt as stop:
        done = str(stop) or "before the first step of this session"
        print(f"interrupted, {done}; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    if os.environ.get("RANK", "0") == "0":  # torchrun's
        print(run.folder)
        following("eval", run.folder)


def _default_folder(name: str, recipe: Recipe, *, resume: str, overwrite: bool) -> Path:
    """The folder of a run where none is given."""
    from fgvc.runs.numbered import RUNS, default_folder

    if overwrite:
        return RUNS / name
    if resume != "auto" and os.environ.get("WORLD_SIZE", "1") != "1":
        raise FgvcError("--resume: with several processes it goes with --out, so that all of them name one folder")
    folder, reason = default_folder(name, recipe, anew=resume != "auto")
    if reason and os.environ.get("RANK", "0") == "0":
        print(reason, file=sys.stderr)
    return folder


def interpolate(
    run: Run,
    out: Annotated[Path, typer.Option("-o", "--out", help="The new run's folder.")],
    share: Annotated[
        float | None,
        typer.Option(help="From 0, the start, to 1, the end. Default: of 0, 0.1 ... 1 the one that validation likes best."),
    ] = None,
    root: Root = None,
    device: Device = None,
) -> None:
    """Make a run of the net between a run's start and its end (WiSE-FT): near the start it knows more of other images."""
    from fgvc import api
    from fgvc.cli import show

    show.interpolation(api.interpolate(run, out, share=share, root=root, device=device))


def ablate(
    study: Annotated[str, typer.Argument(help="A study's file, or the id of one that comes with fgvc.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The study's folder; default studies/<its name>.")] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Time the arms' steps and say how long the study takes; train nothing.")
    ] = False,
    arm: Annotated[list[str] | None, typer.Option(help="Only this arm; may be given several times.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Only this seed; may be given several times.")] = None,
    done: Annotated[
        Path | None,
        typer.Option(help="A runs.csv of another machine or study: runs of the same settings are not trained again."),
    ] = None,
    test: Annotated[
        bool, typer.Option("--test", help="Score on test what validation chose. Once: it is recorded.")
    ] = False,
) -> None:
    """Train what a study lists, seed by seed, and compare all arms with the first. Exit code 1 where a run failed."""
    from fgvc.cli import show
    from fgvc.config.shipped import study_file
    from fgvc.studies import run
    from fgvc.studies.study import read_study

    if test and (arm or seed or estimate):
        raise FgvcError(
            "--test reads the test split for all that validation chose: it goes without --arm, --seed and --estimate"
        )
    path = study_file(study)
    plan, place = read_study(path, overrides or []), out or Path("studies") / path.stem
    if done is not None:
        print(f"{done}: {run.import_results(plan, place, done)} runs of these settings", file=sys.stderr)
    if estimate:
        show.estimate(run.estimate(plan, place, arms=arm or [], seeds=seed or []))
        return
    failures = []
    if test:
        run.read_test(plan, place)
    else:
        try:
            failures = run.ablate(plan, place, arms=arm or [], seeds=seed or [])
        except KeyboardInterrupt:
            print("interrupted; the same command goes on", file=sys.stderr)
            sys.exit(130)
    for failure in failures:
        print(f"failed: {failure.run}: {failure.reason}", file=sys.stderr)
    print(place / "table.html")
    if not failures and not test:
        following("ablate", study, *(overrides or []), *(["--out", out] if out is not None else []), "--test")
    sys.exit(1 if failures else 0)


def bench(
    what: Annotated[
        Literal["train", "load", "export", "serve"],
        typer.Argument(
            help="train: a step against a bare one; load: steps with loading against steps alone; "
            "export: with all proofs against torch's alone; serve: a bundle's server against onnxruntime alone."
        ),
    ],
    config: Annotated[
        str, typer.Argument(help="A recipe file, or the id of one that comes with fgvc; of serve a bundle.")
    ],
    overrides: Overrides = None,
    pairs: Annotated[
        int, typer.Option(min=0, help="Pairs of measurements; default 30, 12 blocks of steps, or 3 exports.")
    ] = 0,
    each: Annotated[
        bool,
        typer.Option(
            "--each", help="train: every technique's step, and every class map, against the step without any."
        ),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="CSV to write.")] = None,
) -> None:
    """Measure speed as ratios against bare references, in one run."""
    if out is not None:
        refuse_file(out)
    if what == "serve":
        from fgvc.studies.serving_speed import bench_serve, show_figures, write_figures

        figures = bench_serve(Path(config))
        show_figures(figures)
        if out is not None:
            write_figures(out, figures)
        following("serve", config)
        return
    recipe = recipe_of(config, overrides)
    from fgvc.cli import show
    from fgvc.studies import speed as measure

    if each and what != "train":
        raise FgvcError("--each goes with `fgvc bench train`")
    if what == "train":
        count = pairs or 30
        ratios = measure.bench_each(recipe, pairs=count) if each else [measure.bench_train(recipe, pairs=count)]
        ratios += measure.bench_maps(recipe, pairs=count) if each else []
    elif what == "export":
        ratios = [measure.bench_export(recipe, pairs=pairs or 3)]
    else:
        ratios = [measure.bench_load(recipe, workers=workers, pairs=pairs or 12) for workers in (0, 1, 2)]
    show.ratios(ratios)
    if out is not None:
        measure.write_csv(out, ratios)
    following("train", config, *(overrides or []))
