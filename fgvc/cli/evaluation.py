"""Verbs that evaluate, explain and compare trained nets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from fgvc.cli.option import (
    MEGAPIXELS,
    Channels,
    Device,
    Megapixels,
    OtherMegapixels,
    Root,
    Run,
    Select,
    SplitOption,
    following,
    following_serve,
    pixels,
)  # fmt: skip
from fgvc.errors import FgvcError


def evaluate(
    run: Run,
    split: SplitOption = None,
    select: Select = None,
    device: Device = None,
    root: Root = None,
    views: Annotated[
        Literal["flip", "crops", "flip+crops", "refined"] | None,
        typer.Option(
            help="Average over these (refined: a second pass on the crop that the branch, never averaged, attends to); "
            "no bundle does; recorded apart."
        ),
    ] = None,
    megapixels: OtherMegapixels = None,
) -> None:
    """Score a run on one split of its data."""
    from fgvc import api
    from fgvc.cli import show

    limit = pixels(megapixels)
    result = api.evaluate(run, split, select=select, device=device, root=root, views=views, max_pixels=limit)
    show.scores(result)
    chosen = [] if select is None else ["--select", select]
    if result.split == "val" and result.tested:
        following("eval", run, "--split", "test", *chosen)
    else:
        following("export", run, "-o", f"{run}-bundle", *chosen)


def localize(
    run: Run,
    split: SplitOption = None,
    method: Annotated[str, typer.Option(help="That makes the class maps; see `fgvc explain`.")] = "gradcam",
    channels: Channels = None,
    select: Select = None,
    device: Device = None,
    root: Root = None,
    megapixels: OtherMegapixels = None,
) -> None:
    """Where a run looks, beside the boxes and parts of its data: MaxBoxAcc, GT-known and Top-1 Loc, IoU, part coverage.

    MaxBoxAcc is 1 to 3 points below wsolevaluation's for the same maps: boxes are half-open here, at 100 thresholds."""
    from fgvc import api
    from fgvc.cli import show

    show.localisation(
        api.localize(
            run, split, method=method, channels=channels, select=select, device=device, root=root,
            max_pixels=pixels(megapixels),
        )
    )  # fmt: skip
    following("explain", run, "IMAGES", "-o", f"{run}-maps")


def report(
    runs: Annotated[list[Path], typer.Argument(help="The folders of one or more runs, of the same classes.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The page to write.")] = Path("report.html"),
    bundle: Annotated[
        list[Path] | None, typer.Option(help="A bundle that a run was exported to; as many as there are.")
    ] = None,
    split: SplitOption = None,
    select: Select = None,
    device: Device = None,
    root: Root = None,
    images: Annotated[int, typer.Option(min=1, max=50, help="Pictures in a section.")] = 10,
    megapixels: OtherMegapixels = None,
) -> None:
    """Write all that a run shows into one HTML file that needs nothing else."""
    from fgvc import api

    page = api.report(
        runs, out, bundles=bundle or [], split=split, select=select, device=device, root=root, images=images,
        max_pixels=pixels(megapixels),
    )  # fmt: skip
    print(page)
    print(f"{len(runs)} runs in a page of {page.stat().st_size / 1e6:.1f} MB".replace("1 runs", "a run"), file=sys.stderr)
    if bundle:
        following("predict", bundle[0], "IMAGES")
    else:
        following("export", runs[0], "-o", f"{runs[0]}-bundle")


def explain(
    subject: Annotated[
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
    megapixels: Megapixels = MEGAPIXELS,
) -> None:
    """Show where a network looks: overlays, panels side by side, raw maps. Exit code 1 where an image could not be read."""
    from fgvc.runtime.explain import explain_bundles, is_bundle

    paths_to_explain = [subject, *([against] if against is not None else [])]
    if all(is_bundle(path) for path in paths_to_explain):
        if select is not None or device is not None or channels is not None:
            raise FgvcError("--select, --device and --channels go with a run, not with a bundle")
        code = explain_bundles(
            paths_to_explain, paths, out, methods=method or ["cam"], target=target, batch=batch, overwrite=overwrite,
            max_pixels=round(megapixels * 1e6),
        )  # fmt: skip
        if not code:
            following_serve(subject)
        sys.exit(code)
    from fgvc import api

    code = api.explain(
        subject, paths, out, methods=method or ["gradcam"], against=against, target=target, select=select, device=device,
        channels=channels, batch=batch, overwrite=overwrite, max_pixels=round(megapixels * 1e6),
    )  # fmt: skip
    if not code:
        following("report", subject)
    sys.exit(code)


def compare(
    a: Annotated[Path, typer.Argument(help="What is deployed: a run, a bundle, or an .onnx file.")],
    b: Annotated[Path, typer.Argument(help="What is to take its place: a run, a bundle, or an .onnx file.")],
    data: Annotated[
        str | None,
        typer.Option(help="A folder of class folders, a recipe or a run; default: the data of A's run, or of B's."),
    ] = None,
    split: Annotated[
        Literal["val", "test"] | None,
        typer.Option(help="Default: val where there is one, else test; with a deployed file, what it was not trained on."),
    ] = None,
    seen: Annotated[
        str | None,
        typer.Option(
            help="What a deployed file was trained on: train (default), none of these, a file that lists images, or its bundle."
        ),
    ] = None,
    unseen: Annotated[
        Path | None, typer.Option(help="A folder of images that a deployed file was not trained on: these judge, and no others.")
    ] = None,
    root: Root = None,
    labels: Annotated[
        list[Path] | None,
        typer.Option(
            help="For an .onnx without labels.json beside it: a JSON list, or a class a line; twice: A's, then B's."
        ),
    ] = None,
    preprocess: Annotated[
        list[Path] | None,
        typer.Option(
            help="For an .onnx without preprocess.json beside it; twice: A's, then B's. Default: assumed as the other side's, "
            "which a gate refuses."
        ),
    ] = None,
    max_negative_flips: Annotated[
        str | None,
        typer.Option(help="Gate: at most so many images (12), or such a share (0.5%), right before, wrong now."),
    ] = None,
    min_gain: Annotated[
        float | None, typer.Option(help="Gate: B's accuracy minus A's in points, at least; may be negative.")
    ] = None,
    stack_threshold: Annotated[
        float | None,
        typer.Option(help="The confidence from which on the stack accepts an answer: coverage and precision of A and of B."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A page (.html) with the flipped images; a .csv of all beside it.")
    ] = None,
    megapixels: OtherMegapixels = None,
) -> None:
    """Two classifiers on the same images: gain, chance, and what breaks.

    Exit code 1 where a gate says no; 4 where a deployed file may have been trained on all of the images."""
    from fgvc import api
    from fgvc.cli import show
    from fgvc.evaluation.paired import Gate
    from fgvc.evaluation.stack_threshold import refuse_threshold
    from fgvc.report.compare import refuse_out, write_page
    from fgvc.runtime.explain import is_bundle

    gate = Gate(max_negative_flips, min_gain)
    refuse_threshold(stack_threshold)
    if out is not None:
        refuse_out(out)
    answers = api.compare(
        a, b, data=data, split=split, labels=labels, preprocess=preprocess, certain=gate.shut, root=root,
        max_pixels=pixels(megapixels), seen=seen, unseen=unseen,
    )  # fmt: skip
    failures = gate.failures(answers.paired)
    show.comparison(answers, failures, stack_threshold)
    if out is not None:
        write_page(answers, out, failures=failures, stack_threshold=stack_threshold)
    if not failures and is_bundle(b):
        following_serve(b)
    elif not failures and b.is_dir():
        following("export", b, "-o", f"{b}-bundle")
    sys.exit(1 if failures else 0)
