"""What several tests look at and takes long to make: data sets, runs, bundles. The first who asks makes it, once a session.

The workers of pytest-xdist share it: it lies beside their own folders, and a lock keeps a second worker waiting while the first
makes it. What is given out is for reading. A test that trains on, scores into or damages a run takes a copy (`copied`).
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from fgvc.config.recipe import Recipe


@dataclass(frozen=True)
class Once:
    """Folders by name in `place`, which all workers of a session know."""

    place: Path

    def made(self, name: str, fill: Callable[[Path], object]) -> Path:
        """The folder of this name; `fill` gets the empty folder where nobody has made it. A `fill` that fails leaves nothing,
        and whoever asks next tries again."""
        folder, done = self.place / name, self.place / f"{name}.done"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (self.place / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    def run(self, recipe: Recipe, *, name: str = "run") -> Path:
        """The folder of the run that this recipe gives, called `name`."""
        from fgvc import api

        key = hashlib.sha256(recipe.model_dump_json().encode()).hexdigest()[:16]
        return self.made(f"runs/{key}-{name}", lambda place: api.train(recipe, place / name)) / name

    def bundle(self, run: Path, *, select: str | None = None) -> Path:
        """The bundle of a run that `run` has given."""
        from fgvc import api

        key = f"bundles/{run.parent.name}-{select}"
        return self.made(key, lambda place: api.export(run, place / "bundle", select=select)) / "bundle"


def copied(run: Path, folder: Path) -> Path:
    """A run, or a bundle, of one's own: `folder/<its name>`."""
    return Path(shutil.copytree(run, folder / run.name, symlinks=True))


@contextmanager
def copied_at(step: int, folder: Path) -> Iterator[None]:
    """Copy a run that trains within this as `folder`, right after its checkpoint of `step` is saved: what a kill would leave."""
    from fgvc.runs import checkpoint

    save = checkpoint.save

    def saved(place: Path, state: checkpoint.State, **settings: bool | int) -> None:
        save(place, state, **settings)  # type: ignore[arg-type]
        if state.progress.step == step:
            shutil.copytree(place.parent, folder, symlinks=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", saved)
        yield
    assert folder.is_dir(), f"no checkpoint was saved at step {step}"
