"""Verbs on what ships: bundles, and their answers."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fgvc.cli.option import MEGAPIXELS, Megapixels, Root, Run, Select, Verb, following, following_serve, sides
from fgvc.errors import FgvcError, UndecidedError
from fgvc.io.files import as_json

DeployedLabels = Annotated[
    Path | None,
    typer.Option(
        "--labels",
        help="Of a deployed .onnx without labels.json beside it: a JSON list in its order, or a class a line.",
    ),
]
DeployedPreprocess = Annotated[
    Path | None,
    typer.Option(
        "--preprocess", help="How a deployed .onnx without preprocess.json beside it is fed, with all of its keys."
    ),
]


OWN = ""  # the value of --into without one


class OptionalInto(Verb):
    """A command whose --into may stand without a value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        bare = [at for at, word in enumerate(args) if word == "--into" and args[at + 1 : at + 2] in ([], ["--"])]
        bare += [at for at, word in enumerate(args[:-1]) if word == "--into" and args[at + 1].startswith("-")]
        for at in sorted(set(bare), reverse=True):
            args = [*args[: at + 1], OWN, *args[at + 1 :]]
        return super().parse_args(ctx, args)


def export(
    run: Run,
    out: Annotated[Path, typer.Option("-o", "--out", help="The bundle's folder.")],
    against: Annotated[
        Path | None,
        typer.Option(
            help="The deployed bundle or .onnx that this must be a drop-in for: exporter, opset, norms and names are chosen so "
            "that the graph is that file's, or equal to it but for spelling."
        ),
    ] = None,
    into: Annotated[
        str | None,
        typer.Option(
            metavar="[FILE]",
            help="Write into the run's deployed file (model.onnx), or into FILE, which may differ from it in weights alone. "
            "Default for such runs.",
        ),
    ] = None,
    labels: DeployedLabels = None,
    preprocess: DeployedPreprocess = None,
    select: Select = None,
    root: Root = None,
    keep: Annotated[
        float,
        typer.Option(
            help='Share of the right answers on validation that the threshold for "none of these" keeps; 1: no threshold.'
        ),
    ] = 0.95,
    temperature: Annotated[
        bool,
        typer.Option(
            "--temperature/--no-temperature",
            help="Whether the last layer of a deployed file is divided by the temperature that validation fitted: the same "
            "answers, and probabilities to rely on.",
        ),
    ] = True,
    stack_threshold: Annotated[
        float | None,
        typer.Option(help="The confidence from which on the stack accepts an answer: coverage and precision, old file and new."),
    ] = None,
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
    exporter: Annotated[
        Literal["dynamo", "torchscript"] | None,
        typer.Option(help="Another of torch's than the recipe's; not with --against."),
    ] = None,
    opset: Annotated[
        int | None, typer.Option(min=11, max=26, help="Another opset than the recipe's; not with --against.")
    ] = None,
    batch_norm: Annotated[
        Literal["fold", "keep"] | None,
        typer.Option(help="Batch norms folded into convolutions, or kept, other than the recipe says; not with --against."),
    ] = None,
) -> None:
    """Strip, fuse, export and prove; writes no bundle where a proof fails."""
    from fgvc import api
    from fgvc.cli import show_export

    int8_settings = api.Int8(images=int8_images, first=int8_float, reduce_range=reduce_range) if int8 else None
    variants = api.Variants(int8=int8_settings, fp16=fp16, agreement=agreement)
    done = api.export(
        run, out, against=against, into=None if into is None else "own" if into == OWN else Path(into), labels=labels,
        preprocess=preprocess, select=select, keep=keep, overwrite=overwrite,
        variants=variants, exporter=exporter, opset=opset, batch_norm=batch_norm, root=root, temperature=temperature,
        stack_threshold=stack_threshold,
    )  # fmt: skip
    show_export.contract(done)
    following("predict", out, "IMAGES")


def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE.onnx", help="A classifier, by whatever program.")],
    images: Annotated[
        list[Path] | None, typer.Argument(help="Images, or folders of images, to answer in the place of noise.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH in pixels, or one number, where the file leaves them open.")
    ] = None,
    output: Annotated[str | None, typer.Option(help="Which of several outputs has the classes.")] = None,
    labels: DeployedLabels = None,
    preprocess: DeployedPreprocess = None,
    json_: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Say what a deployed file is, and what of it can be trained. Exit code 1 where that is another function than the file."""
    from fgvc import api

    inspection = api.inspect(
        file, None if size is None else sides(size), output=output, images=images or (), labels=labels, preprocess=preprocess
    )
    print(as_json(inspection.numbers()) if json_ else "\n".join(inspection.lines()))
    if not inspection.agrees:
        raise typer.Exit(1)
    if not json_:
        following("init", "--deployed", file, "--data", "IMAGES", "my.yaml")


def preprocess(
    file: Annotated[Path, typer.Argument(metavar="FILE.onnx", help="A classifier, by whatever program.")],
    images: Annotated[
        Path, typer.Argument(help="Labelled images: a folder of classes, CUB's layout, or a table. The file may know them.")
    ],
    labels: Annotated[
        Path | None, typer.Option(help="A table (.csv, .tsv) of the labels of the images, where their folders don't tell.")
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="preprocess.json to write, as a bundle has it.")] = None,
    size: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH in pixels, or one number, where the file leaves them open.")
    ] = None,
    output: Annotated[str | None, typer.Option(help="Which of several outputs has the classes.")] = None,
    limit: Annotated[int, typer.Option("--images", min=8, help="Most images that it is asked about.")] = 500,
    json_: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Find how a deployed file is fed, by asking it about labelled images under the usual preprocessings.

    Exit code 5 where the images do not decide it; 2, and labels.found.txt, where its outputs are in another order than stated."""
    from fgvc import api
    from fgvc.io.files import refuse_file, write_atomic

    listed = (out or Path("preprocess.json")).with_name("labels.found.txt")
    for target in filter(None, (out, listed)):
        refuse_file(target)
    result = api.find_preprocess(
        file, images, table=labels, size=None if size is None else sides(size), output=output, limit=limit,
        progress=lambda line: print(line, file=sys.stderr),
    )  # fmt: skip
    print(as_json(result.numbers()) if json_ else "\n".join(result.lines()))
    if result.search.undecided:
        ways = "; ".join(f"{other.factor}: {other.trial.value(other.factor)}" for other in result.search.undecided)
        raise UndecidedError(
            f"these images do not tell how {file} is fed ({ways} may be right as well): give more of them, or state it in "
            "deploy.* or a preprocess.json yourself"
        )
    if out is not None:
        write_atomic(out, as_json(result.spec.model_dump(mode="json")))
    if not result.order_holds:
        write_atomic(listed, "".join(f"{name}\n" for name in result.labels))
        message = (
            f"the outputs of {file} are not in the order of {result.labels_source}: {listed} has the likeliest; look at it, and "
            "state it with deploy.labels or as labels.txt beside the file"
        )
        raise FgvcError(message) if result.search.order.decided else UndecidedError(message)
    if not json_:
        following("init", "--deployed", file, "--data", images, "my.yaml")


def verify(
    path: Annotated[Path, typer.Argument(help="A bundle, or an .onnx file.")],
    against: Annotated[Path | None, typer.Option(help="The deployed bundle or .onnx to compare it with.")] = None,
    into: Annotated[
        Path | None, typer.Option(help="The deployed .onnx that it was written into: weights alone may differ, in their bytes.")
    ] = None,
    labels: DeployedLabels = None,
    preprocess: DeployedPreprocess = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Graphs that are equal but for spelling fail, too: not a node may differ.")
    ] = False,
    differences: Annotated[Path | None, typer.Option(help="A file for every difference of the graphs, a line each.")] = None,
) -> None:
    """Prove a bundle again, or say where it differs from what is deployed. Exit code 1 where it does."""
    from fgvc import api
    from fgvc.cli import show
    from fgvc.exporting.verify import Comparison
    from fgvc.io.files import refuse_file, write_atomic

    if differences is not None:
        if against is None:
            raise FgvcError("--differences is of two graphs: name the deployed one with --against")
        refuse_file(differences)
    result = api.verify(path, against=against, into=into, labels=labels, preprocess=preprocess, strict=strict)
    show.verification(result)
    if differences is not None and isinstance(result, Comparison):
        write_atomic(differences, "".join(f"{difference}\n" for difference in result.differences))
    if result.passed and path.is_dir():
        following("predict", path, "IMAGES")
    sys.exit(0 if result.passed else 1)


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
    from fgvc.exporting.triton import write_model
    from fgvc.runtime.bundle import load_bundle

    print(write_model(load_bundle(bundle), repository, name=name, device=device, instances=instances))
    print(f"next: tritonserver --model-repository={shlex.quote(str(repository))}", file=sys.stderr)


def predict(
    bundle: Annotated[Path, typer.Argument(help="A bundle that fgvc exported.")],
    paths: Annotated[list[Path], typer.Argument(help="Images, or folders of images.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    top_k: Annotated[int, typer.Option(min=1, help="How many classes to name.")] = 1,
    variant: Annotated[
        Literal["float", "int8", "fp16"], typer.Option(help="Which file of the bundle answers.")
    ] = "float",
    megapixels: Megapixels = MEGAPIXELS,
) -> None:
    """Classify images with onnxruntime. Exit code 1 where an image could not be read."""
    from fgvc.runtime.predict import predict_files

    code = predict_files(bundle, paths, as_json=as_json, top_k=top_k, variant=variant, max_pixels=round(megapixels * 1e6))
    if not as_json and not code:
        following_serve(bundle)
    sys.exit(code)


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
    megapixels: Megapixels = MEGAPIXELS,
    batch: Annotated[int, typer.Option(min=1, help="Most images in a tensor request.")] = 16,
    poll: Annotated[
        float, typer.Option(min=0, help="Look every so many seconds for a new bundle in a place; 0: on SIGHUP only.")
    ] = 0.0,
    any_bundle: Annotated[
        bool,
        typer.Option("--any-bundle", help="On a reload take a bundle of other labels or another preprocessing, too."),
    ] = False,
    examples: Annotated[
        list[Path] | None,
        typer.Option(help="Pictures, or folders of them, that the page at / offers to try: up to 8, spread over all."),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="Clients must bring its content; else FGVC_API_KEY, where that is set.")
    ] = None,
) -> None:
    """Serve bundles over HTTP with onnxruntime: images at /v1/classify, tensors at /v2 (Open Inference Protocol)."""
    try:
        from fgvc.serving.api_key import read_key
        from fgvc.serving.limits import MIB, Limits
        from fgvc.serving.models import parse_places
        from fgvc.serving.server import Settings
        from fgvc.serving.server import serve as run
    except ModuleNotFoundError as error:
        way = "pip install 'fgvc[serve]', or '.[serve]' in a clone"
        raise FgvcError(f"fgvc serve: {error.name} is not installed: {way}") from error

    limits = Limits(
        image_bytes=int(image_mib * MIB), tensor_bytes=int(tensor_mib * MIB), pixels=round(megapixels * 1e6), batch=batch,
        seconds=timeout,
    )  # fmt: skip
    settings = Settings(
        host=host, port=port, threads=threads, concurrency=concurrency or None, queue=queue, grace=grace, poll=poll,
        any_bundle=any_bundle, key=read_key(api_key_file), limits=limits, examples=tuple(examples or ()),
    )  # fmt: skip
    sys.exit(run(parse_places(bundles), settings))
