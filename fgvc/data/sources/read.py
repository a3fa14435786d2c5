"""From the settings of a set to its images."""

from __future__ import annotations

from fgvc.config.data import AutoData, CsvData, CubData, FolderData, NamedData, Source
from fgvc.data.index import ImageIndex
from fgvc.data.sources import auto, cub, folder, named, table
from fgvc.errors import FgvcError


def decided(data: Source) -> Source:
    """The same settings with the kind that the files are of, where that was left to them (`kind: auto`). Raises FgvcError."""
    return auto.resolved(data) if isinstance(data, AutoData) else data


def read_source(data: Source) -> ImageIndex:
    """The labelled images of a set, split. Raises FgvcError for what is missing or malformed, with file and line."""
    match decided(data):
        case CubData() as found:
            return cub.read(found)
        case FolderData() as found:
            return folder.read(found)
        case CsvData() as found:
            return table.read(found)
        case NamedData() as found:
            return named.read(found)
        case other:
            raise FgvcError(f"data: no reader for {type(other).__name__}")
