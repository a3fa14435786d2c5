"""The command line: verbs. Heavy packages are imported inside the verb that needs them, so that --help is instant.

Results go to stdout, everything else to stderr. Exit codes: 0 fine, 1 a check said no, 2 a mistake that fgvc can name.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from fgvc.disk import refuse_file, writing
from fgvc.types import FgvcError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Raise the accuracy of the classifier you already deploy without changing a node of its ONNX graph.",
)
data = typer.Typer(no_args_is_help=True, help="Look at data before training on it.")
app.add_typer(data, name="data")

Config = Annotated[str, typer.Argument(help="A recipe file, or the id of one that comes with fgvc.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, as many as you like.")]
Run = Annotated[Path, typer.Argument(help="The folder of a run.")]
Part = Annotated[
    Literal["val", "test"] | None, typer.Option("--split", help="Default: val where there is one, else test.")
]
Select = Annotated[
    Literal["last", "best", "ema", "swa"] | None,
    typer.Option("--select", help="Other weights than the recipe selects."),
]
Channels = Annotated[
    int | None,
    typer.Option(
        min=0, help="How many channels scorecam, sscam and ablationcam try; 0: all. Default: 64, or what is cheap."
    ),
]
Device = Annotated[str | None, typer.Option("--device", help="auto | cpu | cuda | mps; default: the recipe's.")]


def main(arguments: list[str] | None = None) -> None:
    """Entry point: named mistakes become one message and exit code 2. `arguments`: those of the process by default."""
    if isinstance(
        sys.stdout, io.TextIOWrapper
    ):  # a file's name need not be UTF-8; JSON reads what this writes in its place
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app(arguments)
    except FgvcError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@app.command()
def recipes(
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a recipe, for editors.")] = False,
) -> None:
    """List the recipes that come with fgvc."""
    from fgvc import template

    if schema:
        import json

        from fgvc.recipe import Recipe

        print(json.dumps(Recipe.model_json_schema(), indent=1))
        return
    for name, path in template.recipes().items():
        print(f"{name:<22} {(template.header(path) or [''])[0]}")


@app.command()
def init(
    recipe: Annotated[str, typer.Argument(help="The id of a recipe, see `fgvc recipes`.")],
    out: Annotated[Path, typer.Argument(help="The file to write.")],
) -> None:
    """Write a recipe out with every key explained, to own and change."""
    from fgvc import template
    from fgvc.recipe import Recipe

    if out.exists():
        raise FgvcError(f"{out}: exists already; remove it, or choose another name")
    text = template.commented(Recipe, template.recipe_file(recipe))
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    print(f"{out}: set data.root and model.weights in it, then: fgvc data check {out}")


@data.command("demo")
def data_demo(
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    seed: Annotated[int, typer.Option(help="Another seed draws other pictures.")] = 0,
) -> None:
    """Draw the demonstration set: eight kinds of beetle that differ only in small parts."""
    from fgvc.data.demo import draw_demo

    draw_demo(folder, seed=seed)
    print(folder)


@data.command("check")
def data_check(
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

    recipe = api.load_recipe(_recipe(config), overrides or [])
    report = api.check(recipe, suspects=suspects, likeness=likeness, page=out, table=csv)
    show.check(report)
    for written in filter(None, (out, csv)):
        print(written)
    worst = "error" if report.errors else "warning" if report.warnings else ""
    sys.exit(1 if worst and fail_on in (worst, "warning") else 0)


@data.command("preview")
def data_preview(
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

    recipe = api.load_recipe(_recipe(config), overrides or [])
    found = api.preview(recipe, out, images=images, epoch=epoch - 1, run=run)
    for note in found.notes:
        print(f"warning: {note}", file=sys.stderr)
    for sheet in found.sheets:
        print(sheet)


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; default runs/<id or name of the recipe>.")] = None,
    resume: Annotated[
        str, typer.Option(help="auto: go on with the unfinished run in --out | never | PATH of a run.")
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Lose the run that is in --out.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what a step costs and what conflicts; train nothing.")
    ] = False,
) -> None:
    """Train a run, or go on with one."""
    from fgvc import api, show
    from fgvc.template import run_name

    path = _recipe(config)
    recipe = api.load_recipe(path, overrides or [])
    if dry_run:
        show.forecast(api.forecast(recipe))
        return
    try:
        run = api.train(recipe, out or Path("runs") / run_name(path), resume=resume, overwrite=overwrite)
    except KeyboardInterrupt as stop:
        done = str(stop) or "before the first step of this session"
        print(f"interrupted, {done}; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    if os.environ.get("RANK", "0") == "0":  # torchrun's
        print(run)


@app.command("eval")
def evaluate(
    run: Run,
    split: Part = None,
    select: Select = None,
    device: Device = None,
    views: Annotated[
        Literal["flip", "crops", "flip+crops", "refined"] | None,
        typer.Option(
            help="Average over these (refined: a second pass on the crop that the branch, never averaged, attends to); "
            "no bundle does; recorded apart."
        ),
    ] = None,
) -> None:
    """Score a run on a part of its data."""
    from fgvc import api, show

    show.scores(api.evaluate(run, split, select=select, device=device, views=views))


@app.command()
def localize(
    run: Run,
    split: Part = None,
    method: Annotated[str, typer.Option(help="That makes the class maps; see `fgvc explain`.")] = "gradcam",
    channels: Channels = None,
    select: Select = None,
    device: Device = None,
) -> None:
    """Where a run looks, beside the boxes and parts of its data: MaxBoxAcc, GT-known and Top-1 Loc, IoU, part coverage."""
    from fgvc import api, show

    show.localisation(api.localize(run, split, method=method, channels=channels, select=select, device=device))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="The folders of one or more runs, of the same classes.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The page to write.")] = Path("report.html"),
    bundle: Annotated[
        list[Path] | None, typer.Option(help="A bundle that a run was exported to; as many as there are.")
    ] = None,
    split: Part = None,
    select: Select = None,
    device: Device = None,
    images: Annotated[int, typer.Option(min=1, max=50, help="Pictures in a section.")] = 10,
) -> None:
    """Write all that a run shows into one HTML file that needs nothing else."""
    from fgvc import api

    print(api.report(runs, out, bundles=bundle or [], split=split, select=select, device=device, images=images))


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Option("-o", "--out", help="The bundle's folder.")],
    against: Annotated[Path | None, typer.Option(help="The deployed .onnx that this must be a drop-in for.")] = None,
    select: Select = None,
    keep: Annotated[
        float,
        typer.Option(
            help='Share of the right answers on validation that the threshold for "none of these" keeps; 1: no threshold.'
        ),
    ] = 0.95,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bundle that is there.")] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Also a model.int8.onnx: smaller, faster, not quite as exact.")
    ] = False,
    fp16: Annotated[
        bool, typer.Option("--fp16", help="Also a model.fp16.onnx, for GPUs; most CPUs run it slower.")
    ] = False,
    agreement: Annotated[
        float | None,
        typer.Option(
            help="Share of the images for which these must name the float file's class. [int8: 0.98, fp16: 0.99]"
        ),
    ] = None,
    int8_images: Annotated[int, typer.Option(help="Train images to calibrate int8 with.")] = 200,
    int8_float: Annotated[
        int, typer.Option(help="How many of the first layers stay in float; the last always does.")
    ] = 6,
    reduce_range: Annotated[
        bool | None,
        typer.Option(
            "--reduce-range/--full-range",
            help="Weights of 7 bits, for x86 CPUs without VNNI. Default: as the CPU here needs it.",
        ),
    ] = None,
) -> None:
    """Strip, fuse, export and prove; writes no bundle where a proof fails."""
    from fgvc import api, show

    wanted = api.Int8(images=int8_images, first=int8_float, reduce_range=reduce_range) if int8 else None
    variants = api.Variants(int8=wanted, fp16=fp16, agreement=agreement)
    done = api.export(run, out, against=against, select=select, keep=keep, overwrite=overwrite, variants=variants)
    show.contract(done)


@app.command()
def triton(
    bundle: Annotated[Path, typer.Argument(help="A bundle that fgvc exported.")],
    repository: Annotated[Path, typer.Argument(help="Triton's model repository; made where there is none.")],
    name: Annotated[str | None, typer.Option(help="The model's name; default: the bundle's folder's.")] = None,
    device: Annotated[
        Literal["auto", "cpu", "gpu"], typer.Option(help="Where Triton runs it; auto: on GPUs, where there are any.")
    ] = "auto",
    instances: Annotated[
        int, typer.Option(min=1, help="Copies that run side by side; each takes one core, or a share of the GPU.")
    ] = 1,
) -> None:
    """Put a bundle into the model repository of a Triton server (or KServe), queue bounded; see deploy/README.md."""
    from fgvc.export.bundle import load_bundle
    from fgvc.export.triton import write_model

    print(write_model(load_bundle(bundle), repository, name=name, device=device, instances=instances))


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="A bundle, or an .onnx file.")],
    against: Annotated[Path | None, typer.Option(help="The deployed .onnx to compare an .onnx with.")] = None,
) -> None:
    """Prove a bundle again, or say where two .onnx files differ. Exit code 1 where they do."""
    from fgvc import api, show

    result = api.verify(path, against=against)
    show.verification(result)
    sys.exit(0 if result.passed else 1)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="What is deployed: a run, a bundle, or an .onnx file.")],
    b: Annotated[Path, typer.Argument(help="What is to take its place: a run, a bundle, or an .onnx file.")],
    data: Annotated[
        str | None,
        typer.Option(help="A folder of class folders, or a recipe; default: the data of A's run, or of B's."),
    ] = None,
    split: Part = None,
    labels: Annotated[
        Path | None, typer.Option(help="For an .onnx without labels.json beside it: a JSON list, or a class a line.")
    ] = None,
    preprocess: Annotated[
        Path | None, typer.Option(help="For an .onnx without preprocess.json beside it; default: as the other side.")
    ] = None,
    max_negative_flips: Annotated[
        str | None,
        typer.Option(help="Gate: at most so many images (12), or such a share (0.5%), right before, wrong now."),
    ] = None,
    min_gain: Annotated[
        float | None, typer.Option(help="Gate: B's accuracy minus A's in points, at least; may be negative.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A page (.html) with the flipped images; a .csv of all beside it.")
    ] = None,
) -> None:
    """Two classifiers on the same images: gain, chance, and what breaks. Exit code 1 where a gate says no."""
    from fgvc import api, show
    from fgvc.evaluate.compare import Gate
    from fgvc.page.compare import refuse_out, write_page

    gate = Gate(max_negative_flips, min_gain)
    if out is not None:
        refuse_out(out)
    found = api.compare(a, b, data=data, split=split, labels=labels, preprocess=preprocess)
    failed = gate.failures(found.paired)
    show.versus(found, failed)
    if out is not None:
        write_page(found, out, failed=failed)
    sys.exit(1 if failed else 0)


@app.command()
def ablate(
    study: Annotated[str, typer.Argument(help="A study's file, or the id of one that comes with fgvc.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The study's folder; default studies/<its name>.")] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Time the arms' steps and say how long the study takes; train nothing.")
    ] = False,
    arm: Annotated[list[str] | None, typer.Option(help="Only this arm; may be given several times.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Only this seed; may be given several times.")] = None,
    test: Annotated[
        bool, typer.Option("--test", help="Score on test what validation chose. Once: it is recorded.")
    ] = False,
) -> None:
    """Train what a study lists, seed by seed, and compare all arms with the first. Exit code 1 where a run failed."""
    from fgvc import show
    from fgvc.ablate import run
    from fgvc.ablate.study import read_study
    from fgvc.template import study_file

    path = study_file(study)
    plan, place = read_study(path, overrides or []), out or Path("studies") / path.stem
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
    sys.exit(1 if failures else 0)


@app.command()
def predict(
    bundle: Annotated[Path, typer.Argument(help="A bundle that fgvc exported.")],
    paths: Annotated[list[Path], typer.Argument(help="Images, or folders of images.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    top_k: Annotated[int, typer.Option(min=1, help="How many classes to name.")] = 1,
    variant: Annotated[
        Literal["float", "int8", "fp16"], typer.Option(help="Which file of the bundle answers.")
    ] = "float",
) -> None:
    """Classify images with onnxruntime. Exit code 1 where an image could not be read."""
    from fgvc.serve.predict import predict_files

    sys.exit(predict_files(bundle, paths, as_json=as_json, top_k=top_k, variant=variant))


@app.command()
def serve(
    bundles: Annotated[
        list[str],
        typer.Argument(metavar="[NAME=]BUNDLE", help="Bundles, by the names of their folders, or by others."),
    ],
    host: Annotated[str, typer.Option(help="0.0.0.0 for all of the machine's addresses.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free; it is printed.")] = 8000,
    concurrency: Annotated[int, typer.Option(min=0, help="Requests at a time; 0: as many as CPUs / threads.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="In a request; more shorten it, but fewer are answered.")] = 1,
    queue: Annotated[int, typer.Option(min=0, help="Requests that wait; more are refused with 503.")] = 32,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds from a request to its answer, else 504.")] = 30.0,
    grace: Annotated[float, typer.Option(min=0, help="Seconds after SIGTERM for the requests that are there.")] = 20.0,
    image_mib: Annotated[float, typer.Option(min=0.001, help="Largest picture, in MiB.")] = 10.0,
    tensor_mib: Annotated[float, typer.Option(min=0.001, help="Largest tensor request, in MiB.")] = 32.0,
    megapixels: Annotated[float, typer.Option(min=0.001, help="Most pixels of a picture, in millions.")] = 40.0,
    batch: Annotated[int, typer.Option(min=1, help="Most images in a tensor request.")] = 16,
    poll: Annotated[
        float, typer.Option(min=0, help="Look every so many seconds for a new bundle in a place; 0: on SIGHUP only.")
    ] = 0.0,
    api_key_file: Annotated[
        Path | None, typer.Option(help="Clients must bring its content; else FGVC_API_KEY, where that is set.")
    ] = None,
) -> None:
    """Serve bundles over HTTP with onnxruntime: images at /v1/classify, tensors at /v2 (Open Inference Protocol)."""
    try:
        from fgvc.serve.limits import MIB, Limits, read_key
        from fgvc.serve.models import parse_places
        from fgvc.serve.run import Settings
        from fgvc.serve.run import serve as run
    except ModuleNotFoundError as error:
        raise FgvcError(f"fgvc serve: {error.name} is not installed: pip install 'fgvc[serve]'") from error

    limits = Limits(
        image_bytes=int(image_mib * MIB), tensor_bytes=int(tensor_mib * MIB), pixels=int(megapixels * 1e6), batch=batch,
        seconds=timeout,
    )  # fmt: skip
    settings = Settings(
        host=host, port=port, threads=threads, concurrency=concurrency or None, queue=queue, grace=grace, poll=poll,
        key=read_key(api_key_file), limits=limits,
    )  # fmt: skip
    sys.exit(run(parse_places(bundles), settings))


@app.command()
def explain(
    seen: Annotated[
        Path, typer.Argument(metavar="RUN|BUNDLE", help="A run, or a bundle (class activation maps, no torch).")
    ],
    paths: Annotated[list[Path], typer.Argument(metavar="IMG", help="Images, or folders of images.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder of the results.")],
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="cam | gradcam | gradcam++ | smoothgradcam++ | scorecam | sscam | ablationcam | finercam | hirescam | xgradcam "
            "| layercam | eigencam | ...; may be given several times. Default: gradcam; of a bundle cam."
        ),
    ] = None,
    target: Annotated[str, typer.Option(help="Whose maps: predicted, or a class by name.")] = "predicted",
    against: Annotated[Path | None, typer.Option(help="A second run or bundle, side by side.")] = None,
    channels: Channels = None,
    select: Select = None,
    device: Device = None,
    batch: Annotated[int, typer.Option(min=1, help="Images a forward.")] = 16,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Lose the results that are in --out.")] = False,
) -> None:
    """Show where a network looks: overlays, panels side by side, raw maps. Exit code 1 where an image could not be read."""
    from fgvc.serve.explain import explain_bundles, is_bundle

    both = [seen, *([against] if against is not None else [])]
    if all(is_bundle(path) for path in both):
        if select is not None or device is not None or channels is not None:
            raise FgvcError("--select, --device and --channels go with a run, not with a bundle")
        methods = method or ["cam"]
        sys.exit(explain_bundles(both, paths, out, methods=methods, target=target, batch=batch, overwrite=overwrite))
    from fgvc import api

    sys.exit(
        api.explain(
            seen, paths, out, methods=method or ["gradcam"], against=against, target=target, select=select, device=device,
            channels=channels, batch=batch, overwrite=overwrite,
        )
    )  # fmt: skip


@app.command()
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
        from fgvc.serve.bench import bench_serve, show_figures, write_figures

        figures = bench_serve(Path(config))
        show_figures(figures)
        if out is not None:
            write_figures(out, figures)
        return
    from fgvc import api, show
    from fgvc import bench as measure

    recipe = api.load_recipe(_recipe(config), overrides or [])
    if each and what != "train":
        raise FgvcError("--each goes with `fgvc bench train`")
    if what == "train":
        count = pairs or 30
        found = measure.bench_each(recipe, pairs=count) if each else [measure.bench_train(recipe, pairs=count)]
        found += measure.bench_maps(recipe, pairs=count) if each else []
    elif what == "export":
        found = [measure.bench_export(recipe, pairs=pairs or 3)]
    else:
        found = [measure.bench_load(recipe, workers=workers, pairs=pairs or 12) for workers in (0, 1, 2)]
    show.ratios(found)
    if out is not None:
        measure.write_csv(out, found)


def _recipe(config: str) -> Path:
    from fgvc.template import recipe_file

    return recipe_file(config)


if __name__ == "__main__":
    main()
