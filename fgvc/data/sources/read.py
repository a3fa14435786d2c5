"""Reading of a set by its settings, whatever its kind."""

from __future__ import annotations

from fgvc.config.data import AutoData, CsvData, CubData, FolderData, HfData, NamedData, Source
from fgvc.data.index import Contents, ImageIndex
from fgvc.data.sources import auto, cub, folder, huggingface, named, table
from fgvc.errors import FgvcError


def resolved(data: Source) -> Source:
    """The settings with `kind: auto` replaced by the kind that the files are of. Raises FgvcError if none fits, or several do."""
    return auto.resolved(data) if isinstance(data, AutoData) else data


def read_source(data: Source) -> ImageIndex:
    """The index of a set's labelled images. Raises FgvcError, with file and line, if something is missing or malformed."""
    match resolved(data):
        case CubData() as source:
            return cub.read(source)
        case FolderData() as source:
            return folder.read(source)
        case CsvData() as source:
            return table.read(source)
        case NamedData() as source:
            return named.read(source)
        case HfData() as source:
            return huggingface.read(source)
        case other:
            raise FgvcError(f"data: no reader for {type(other).__name__}")


def source_contents(data: Source) -> Contents | None:
    """The images of a set that are no files, for an index that was recorded; None where they are files. Raises FgvcError."""
    return huggingface.contents(data) if isinstance(data, HfData) else None
