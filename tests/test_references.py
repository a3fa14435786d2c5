"""Comments, docstrings and docs point only to what a reader has: papers, and files of this repository."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.config.shape import models_in
from fgvc.errors import FgvcError

ROOT = Path(__file__).parents[1]
SHIPPED = ("fgvc", "docs", "configs", "deploy", "benchmarks", "examples")
TEXT = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".csv", ".html", ".svg", ".sh"}

# Sections of documents that are not in the repository, by the ways in which they were cited.
OUTSIDE = re.compile(
    r"\b[Mm]ethod(?:s,?)? \d|\bDESIGN\b|\b[Tt]raps?,? T?\d|\bR\d+[,)]|\b[Ii]ssue \d|"
    r"\b(?:ecosystem|style|peers|DESIGN)\.md\b|reference/methods"
)
MACHINE = re.compile(r"/work/|/root/|/home/\w")
SCRATCH = re.compile(r"/tmp/")


def texts(*folders: str) -> Iterator[tuple[str, str]]:
    """Path below the root, and content, of every text file in the folders and of those at the root itself."""
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*")] + list(ROOT.glob("*"))
    for path in sorted(paths):
        if path.is_file() and path != Path(__file__) and (path.suffix in TEXT or path.name in ("Makefile", "Dockerfile")):
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


def lines(pattern: re.Pattern[str], *folders: str) -> list[str]:
    return [
        f"{name}:{number}: {line.strip()}"
        for name, text in texts(*folders)
        if pattern.search(text)
        for number, line in enumerate(text.splitlines(), start=1)
        if pattern.search(line)
    ]


@pytest.mark.parametrize(
    ("document", "section"),
    [("methods", "9"), ("Methods,", "12.5"), ("DESIGN", "3"), ("trap", "T5"), ("traps", "T1"), ("issue", "25"), ("by R9)", "")],
)
def test_the_pattern_knows_how_such_documents_are_cited(document: str, section: str) -> None:
    assert OUTSIDE.search(f"a comment ({document} {section})")  # in two pieces, so that this file can be searched as well


@pytest.mark.parametrize(
    "fine", ["see docs/methods.md", "k = 4", "R50 of timm", "a trap: timm's tag", "two methods: 1. cam", "get(method, 1)"]
)
def test_the_pattern_lets_other_words_alone(fine: str) -> None:
    assert not OUTSIDE.search(fine)


def test_nothing_points_to_documents_outside_of_the_repository() -> None:
    assert not lines(OUTSIDE, *SHIPPED, "tests")


def test_no_place_of_a_developers_machine_is_in_the_project() -> None:
    assert not lines(MACHINE, *SHIPPED, "tests")
    paths = lines(SCRATCH, *SHIPPED)
    assert not paths


def test_documents_that_the_code_names_are_there() -> None:
    named = {
        (name, document)
        for name, text in texts("fgvc", "deploy", "benchmarks")
        for document in re.findall(r"(?<![\w/])docs/[\w./-]+\.(?:md|csv|py)\b", text)
    }
    assert named
    assert not [(name, document) for name, document in sorted(named) if not (ROOT / document).is_file()]


@pytest.mark.parametrize("document", sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")))
def test_modules_that_the_documents_name_are_there(document: str) -> None:
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    assert not [name for name in re.findall(r"\bfgvc(?:\.[A-Za-z_]\w*)+", text) if not is_there(name.split("."))]


def test_classes_and_functions_that_the_design_names_are_there() -> None:
    """Words in code quotes that are called as classes, methods and private functions are."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    words = set(re.findall(r"`(?:[a-z_]+\.)?([A-Z][a-z]\w+)(?:\.(\w+))?`", text))
    words |= {(word, "") for word in re.findall(r"`(_[a-z]\w+)`", text)}
    sources = "\n".join(source for _, source in texts("fgvc"))
    defined = set(re.findall(r"(?m)(?:\bclass |\bdef |^    )(\w+)(?=[(:])", sources))
    assert words
    named = {word for pair in words for word in pair if word}
    assert not sorted(named - defined - OTHERS)


OTHERS = {"Conv2d", "Conv2dSame", "Makefile"}  # of torch and timm, and a file


def is_there(parts: list[str]) -> bool:
    """Whether a dotted name is a module, or a word of one."""
    place = ROOT
    for at, part in enumerate(parts):
        if (place / part).is_dir():
            place = place / part
        elif (file := place / f"{part}.py").is_file():
            rest = parts[at + 1 :]
            return not rest or re.search(rf"\b{rest[0]}\b", file.read_text(encoding="utf-8")) is not None
        else:  # a name of a package
            return re.search(rf"\b{part}\b", (place / "__init__.py").read_text(encoding="utf-8")) is not None
    return True


def renames() -> ModuleType:
    spec = importlib.util.spec_from_file_location("renames", ROOT / "docs" / "renames.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_was_renamed_is_there() -> None:
    assert not [(old, new) for old, new in renames().names().items() if not is_there(new.split("."))]


def test_benchmarks_and_examples_import_what_is_there() -> None:
    """No test runs the scripts that take hours, so that a move of what they import is noticed by nobody."""
    missing = [
        f"{path}: {node.module}.{name.name}"
        for path, text in texts("benchmarks", "examples")
        if path.endswith(".py")
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "fgvc"
        for name in node.names
        if not is_there([*(node.module or "").split("."), name.name])
    ]
    assert not missing


def test_scripts_are_put_right() -> None:
    module = renames()
    script = (
        "from fgvc.config import Section, load\nfrom fgvc.train import checkpoint\nfrom fgvc import disk\n"
        "from fgvc.types import FgvcError\nimport fgvc.serve.engine\nfgvc.serve.engine.Engine\n'fgvc.train.loop.take_step'\n"
    )
    after = module.rewritten(script, module.names())
    assert after == (
        "from fgvc.config.section import Section\nfrom fgvc.config.loading import load\nfrom fgvc.runs import checkpoint\n"
        "from fgvc.io import files as disk\nfrom fgvc.errors import FgvcError\nimport fgvc.runtime.engine\n"
        "fgvc.runtime.engine.Engine\n'fgvc.training.optimizer_step.optimizer_step'\n"
    )
    assert module.rewritten(after, module.names()) == after


def test_keys_are_put_right_in_recipes_and_overrides() -> None:
    module = renames()
    recipe = (
        "optim:\n  # clip_norm is below\n  clip_norm: 1  # norm\ntrain: {accumulate: 2, recompute: true}\n"
        "data: {clip_norm: 3}\n"
    )
    assert module.with_keys(recipe, module.keys(), recipe=True) == (
        "optim:\n  # clip_norm is below\n  clip_grad: 1  # norm\ntrain: {grad_accum_steps: 2, grad_checkpointing: true}\n"
        "data: {clip_norm: 3}\n"
    )
    plan = "plain: optim.clip_norm=1 train.accumulate=2 train.accumulated=1 'deploy.crop_fraction=.9'\n"
    assert module.with_keys(plan, module.keys(), recipe=False) == (
        "plain: optim.clip_grad=1 train.grad_accum_steps=2 train.accumulated=1 'deploy.crop_pct=.9'\n"
    )


def test_the_table_of_renamed_keys_is_the_sections_own() -> None:
    """An error names the new key of each, and no other."""
    fields = {name: field.annotation for name, field in Recipe.model_fields.items()}
    own = {
        f"{section}.{old}": f"{section}.{new}"
        for section, annotation in fields.items()
        for model in models_in(annotation)
        for old, new in model.renamed.items()
    }
    assert own == renames().keys()
    for old, new in own.items():
        section, _, key = old.partition(".")
        with pytest.raises(FgvcError, match=rf"{re.escape(old)}: is called '{new.partition('.')[2]}' now"):
            validate(Recipe, {section: {key: 1}}, where="recipe")


def test_tests_that_the_makefile_names_are_there() -> None:
    named = re.findall(r"(tests/[\w/]+\.py)::(\w+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert named
    assert not [name for file, name in named if f"def {name}(" not in (ROOT / file).read_text(encoding="utf-8")]
