"""How results show themselves: one line where they are printed, a table in a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from fgvc.io.names import one_line


class Display:
    """A result that is shown by its facts. Dataclasses of this kind are made with `repr=False`."""

    __slots__ = ()

    @property
    def facts(self) -> Mapping[str, object]:
        """What it is, in a few words each; a name is empty where its fact needs none."""
        raise NotImplementedError

    def __repr__(self) -> str:
        words = (f"{name} {fact}".strip() for name, fact in self.facts.items())
        return one_line(f"{type(self).__name__}({', '.join(words)})")

    def _repr_html_(self) -> str:
        return table([(name or type(self).__name__.lower(), fact) for name, fact in self.facts.items()])


def table(rows: Iterable[Sequence[object]], *, head: Sequence[str] = ()) -> str:
    """An HTML table; text in it is escaped, what has `_repr_html_` is shown by it."""
    top = f"<thead><tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr></thead>" if head else ""
    lines = ("".join(f'<td style="text-align: left">{_cell(cell)}</td>' for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table>{top}<tbody>{body}</tbody></table>"


def _cell(value: object) -> str:
    if isinstance(value, Html):
        return value
    return escape(str(value))


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()
