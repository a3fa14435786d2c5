"""Preprocessing and labels of a deployed file that states none: tests whether they are a run's, by the file's answers about the
run's images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fgvc.errors import FgvcError
from fgvc.evaluation.file_preprocessing import FileSearch, search_file
from fgvc.images.preprocess import described
from fgvc.runs.loaded import LoadedRun
from fgvc.runtime.stack import Agreement, Stack, agreement

SECONDS = 60.0  # that the search may take, as part of an export


def by_its_answers(run: LoadedRun, deployed: Stack, stated: Agreement, *, say: Callable[[str], None]) -> Agreement:
    """Complete `stated` by the file's answers: with the run's preprocessing, and with its labels where those are not stated
    either. The run's preprocessing is taken for the file's where no other is likelier for certain.

    Asks only where the preprocessing is stated nowhere; where the answers don't tell, all stays as stated. Raises FgvcError where
    they say that the file is fed, or read, otherwise than the run is.
    """
    if stated.preprocess != "not known" or deployed.preprocess is not None:
        return stated
    say(f"{deployed.path}: nothing states how it is fed; it is asked about the run's images")
    try:
        search = search_file(
            deployed.model, run.folder, index=run.index, size=run.recipe.image.size, given=run.preprocess, seconds=SECONDS
        )
    except FgvcError as error:
        say(f"its answers do not tell: {error}")
        return stated
    ours = Stack(path=run.folder, preprocess=run.preprocess, labels=tuple(run.index.classes))
    _refuse_other(search, ours, deployed)
    if search.search.undecided:
        say(f"its answers do not tell: {', '.join(a.factor for a in search.search.undecided)} may be another")
        return stated
    completed = replace(deployed, preprocess=ours.preprocess)
    if completed.labels is None and search.search.order.assigned == ours.labels:
        completed = replace(completed, labels=ours.labels)
    best = search.search.best
    words = f"by its answers about {search.search.images} images ({100 * best.accuracy:.1f} % right)"
    say(f"{deployed.path}: fed as the run is, {words}, of {search.search.trials} preprocessings")
    return replace(agreement(ours, completed), answers=words)


def _refuse_other(search: FileSearch, ours: Stack, deployed: Stack) -> None:
    given, best = search.search.given, search.search.best
    assert given is not None
    assert ours.preprocess is not None
    if given.decided:
        raise FgvcError(
            f"{ours.path} is not a drop-in for {deployed.path}, by the file's answers about {search.search.images} images:\n"
            f"  likeliest: {described(best.spec)}: {100 * best.accuracy:.1f} % right, loss {best.loss:.3f}\n"
            f"  as the run: {described(ours.preprocess)}: {100 * given.trial.accuracy:.1f} % right, loss {given.low:+.3f} to "
            f"{given.high:+.3f}\n"
            "Train as it is fed (the recipe's deploy section), or state how it is fed with --preprocess FILE"
        )
    order = search.search.order
    if deployed.labels is None and order.other and order.decided:
        raise FgvcError(
            f"{ours.path} is not a drop-in for {deployed.path}, by the file's answers:\n  {search.lines()[-1]}\n"
            "State the order of its outputs with --labels FILE"
        )
