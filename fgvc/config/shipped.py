"""Files of recipes and studies that come with fgvc, by their ids."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fgvc.errors import FgvcError
from fgvc.io.names import nearest
from fgvc.io.places import entries, what_it_is

STUDIES = "studies/"  # below configs/
DEFAULT = "any/plain"  # the recipe for whatever data


def recipes_folder() -> Path:
    """The folder of fgvc's recipes: `fgvc/configs` in an installed wheel, `configs` beside the package in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def recipes() -> dict[str, Path]:
    """fgvc's recipes: id (path under configs/ without suffix) -> file."""
    return {name: path for name, path in _configs().items() if not name.startswith(STUDIES)}


def studies() -> dict[str, Path]:
    """fgvc's studies, for `fgvc ablate`: id -> file."""
    return {name.removeprefix(STUDIES): path for name, path in _configs().items() if name.startswith(STUDIES)}


def _configs() -> dict[str, Path]:
    folder = recipes_folder()
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def recipe_file(name: str) -> Path:
    """The file of a recipe, by path or id. Raises FgvcError with the nearest id or file."""
    return _file(name, recipes(), "recipe", "a recipe's id", "`fgvc recipes` lists them")


def study_file(name: str) -> Path:
    """The file of a study, by path or id. Raises FgvcError with the nearest id or file, or all ids."""
    files = studies()
    return _file(name, files, "study", "a study's id", f"there are {', '.join(files)}")


def _file(name: str, files: Mapping[str, Path], kind: str, ids: str, otherwise: str) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    if name in files:
        return files[name]
    if path.exists():
        raise FgvcError(f"{name}: is no {kind}{what_it_is(path)}")
    setting, equals, value = name.partition("=")
    if equals:
        meant = f"; did you mean {value}?" if Path(value).exists() or value in files else ""
        raise FgvcError(f"{setting}=...: a setting, where a {kind} or images come first and settings after them{meant}")
    beside = [str(path.parent / other) for other in entries(path.parent)]
    near = nearest(name, [*files, *beside])
    raise FgvcError(f"{name}: no such file, nor {ids}; " + (f"did you mean {near[0]}?" if near else otherwise))


def run_name(path: Path) -> str:
    """The default name of a recipe's runs: the id if it is one of fgvc's (`cub50-plain`), else the file's name."""
    ids = {file.resolve(): name for name, file in recipes().items()}
    return ids.get(path.resolve(), path.stem).replace("/", "-")
