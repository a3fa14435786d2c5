"""The pages as a site: each has its place in the navigation, and the reference names all that there is."""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel
from typer.main import get_command

from fgvc import api
from fgvc.cli.app import app
from fgvc.config.recipe import Recipe
from fgvc.runtime.bundle import MANIFEST, OPTIONAL, REQUIRED

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?![a-z]+:)([^)\s#]+)")


class _Site(yaml.SafeLoader):
    """mkdocs.yml with its one Python function as nothing."""


_Site.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def test_the_tables_of_the_pages_are_those_of_the_code_and_of_the_csv_files(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    tables = runpy.run_path(str(ROOT / "docs/tables.py"))
    assert tables["main"](["--check"]) == 0, capsys.readouterr().out


def pages_of(nav: Any) -> Iterator[str]:
    """Files of the repository that the navigation leads to."""
    if isinstance(nav, str):
        root = {"index.md": "README.md", "index.zh-CN.md": "README.zh-CN.md"}
        root |= {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
        yield root.get(nav) or (nav.removeprefix("repository/") if nav.startswith("repository/") else f"docs/{nav}")
    elif isinstance(nav, dict):
        yield from pages_of(list(nav.values()))
    else:
        for part in nav:
            yield from pages_of(part)


def test_every_page_has_one_place_in_the_navigation() -> None:
    site = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), _Site)
    pages = list(pages_of(site["nav"]))
    there = [path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]]
    assert len(pages) == len(set(pages))
    assert set(there) <= set(pages)
    assert not [page for page in pages if not (ROOT / page).is_file()]


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field may hold, itself or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in sections_in(part)]


def settings_of(model: type[BaseModel], path: str = "") -> Iterator[str]:
    """Every key of a recipe as on the command line, those of all kinds of a section included."""
    for key, field in model.model_fields.items():
        inner = sections_in(field.annotation)
        for part in inner:
            yield from settings_of(part, f"{path}{key}.")
        is_tag = key == "kind" and get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1
        if not inner and not is_tag:
            yield path + key


def test_every_setting_is_in_the_reference() -> None:
    text = "".join((REFERENCE / page).read_text(encoding="utf-8") for page in ("settings.md", "techniques.md"))
    named = set(re.findall(r"^\| `([a-z]\w*(?:\.\w+)+|select|select_by|cache|cache_dir)` \|", text, re.MULTILINE))
    keys = set(settings_of(Recipe))
    assert len(keys) > 200
    assert not keys - named
    assert not [name for name in named - keys if not any(key.startswith(f"{name}.") for key in keys)]


def test_every_verb_and_option_is_in_the_reference() -> None:
    sections = dict(
        re.findall(r"^## (fgvc .+?)\n(.*?)(?=^## |\Z)", (REFERENCE / "verbs.md").read_text(), re.DOTALL | re.MULTILINE)
    )
    commands = get_command(app).commands
    verbs = {f"fgvc {name}": command for name, command in commands.items() if name != "data"}
    verbs |= {f"fgvc data {name}": command for name, command in commands["data"].commands.items()}
    assert set(sections) == set(verbs)
    for name, command in verbs.items():
        options = [word for parameter in command.params for word in parameter.opts + parameter.secondary_opts]
        assert not [word for word in options if word.startswith("-") and f"`{word}`" not in sections[name]], name
        arguments = [parameter for parameter in command.params if not parameter.opts[0].startswith("-")]
        usage = re.search(r"```text\n(.*)\n```", sections[name])
        assert usage is not None
        assert len(usage[1].replace("[OPTIONS]", "").replace("...", "").split()) >= len(name.split()) + len(arguments)


def test_every_file_of_a_bundle_is_in_the_reference() -> None:
    text = (REFERENCE / "bundle.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in (*REQUIRED, *OPTIONAL, MANIFEST))


def test_every_function_of_the_api_is_in_the_reference() -> None:
    """mkdocstrings shows what `__all__` names: nothing public is left out of it."""
    assert "::: fgvc.api\n" in (REFERENCE / "python.md").read_text(encoding="utf-8")
    modules = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "fgvc" / "api").glob("*.py")]
    kinds = ast.FunctionDef | ast.ClassDef
    defined = {node.name for module in modules for node in module.body if isinstance(node, kinds)}
    internal = {"as_recipe", "default_folder"}
    assert {name for name in defined if not name.startswith("_")} - internal <= set(api.__all__)


def test_links_lead_to_files() -> None:
    """Those within the repository, as they are read there; anchors are looked at when the site is built (`make check`)."""
    pages = [
        *ROOT.glob("*.md"),
        *(path for folder in ("docs", "deploy", "benchmarks") for path in (ROOT / folder).rglob("*.md")),
    ]
    links = [(page, link) for page in pages for link in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8")))]
    assert len(links) > 100
    assert not [f"{page.relative_to(ROOT)}: {link}" for page, link in links if not (page.parent / link).exists()]
