"""Hook of mkdocs: pages that lie outside of `docs/`, links as they are on disk, and nothing that is fetched from elsewhere.

Pages link to one another by their places in the repository, so that they can be read there, too. Whatever they link to outside of
`docs/` becomes a part of the site: README.md is its first page, other pages and files lie below `repository/`.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
NAMES = {
    "README.md": "index.md",
    "README.zh-CN.md": "index.zh-CN.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(\]\()([^)\s#]+)")
FETCHED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>", re.IGNORECASE)


def in_site(path: str) -> str:
    """The place in the site of a file of the repository."""
    return NAMES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}")


def in_repository(uri: str) -> str:
    """The file of the repository that is at this place in the site."""
    names = {page: name for name, page in NAMES.items()}
    return names.get(uri) or (uri.removeprefix("repository/") if uri.startswith("repository/") else f"docs/{uri}")


def targets(path: str, text: str) -> dict[str, str]:
    """Link -> the file of the repository that it leads to; `text` is that of the page at `path`."""
    links = (link for _, link in LINK.findall(CODE.sub("", text)) if not re.match(r"[a-z]+:", link))
    places = {link: posixpath.normpath(posixpath.join(posixpath.dirname(path), link)) for link in links}
    return {link: place for link, place in places.items() if not place.startswith("..") and (ROOT / place).is_file()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to outside of `docs/`, and what those pages link to in turn."""
    left = [*NAMES, *(in_repository(file.src_uri) for file in files.documentation_pages())]
    done: set[str] = set()
    while left:
        path = left.pop()
        if path in done or not (ROOT / path).is_file():
            continue
        done.add(path)
        if files.get_file_from_path(in_site(path)) is None:
            files.append(
                File.generated(config, in_site(path), abs_src_path=str(ROOT / path), inclusion=InclusionLevel.INCLUDED)
            )
        if path.endswith(".md"):
            left += targets(path, (ROOT / path).read_text(encoding="utf-8")).values()
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links as they are in the site."""
    path = in_repository(page.file.src_uri)
    folder = posixpath.dirname(page.file.src_uri)
    moved = {link: posixpath.relpath(in_site(place), folder or ".") for link, place in targets(path, markdown).items()}
    return LINK.sub(lambda m: m[1] + moved.get(m[2], m[2]), markdown)


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """Refuse a page that would fetch something."""
    if fetched := FETCHED.findall(re.sub(r"<link[^>]*rel=[\"']?(?:canonical|next|prev)[^>]*>", "", output)):
        raise PluginError(f"{page.file.src_uri}: would fetch {fetched[0]}; the site is read without a network")
    return output
