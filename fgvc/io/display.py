"""Display of results: one line where they are printed, a table or a picture in a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TypeVar

from fgvc.io.names import one_line

SHOWN = 24  # of several results; a notebook keeps what it shows
T = TypeVar("T", covariant=True)


class Display:
    """A result that is shown by its facts. A dataclass of this kind is made with `repr=False`."""

    __slots__ = ()

    @property
    def facts(self) -> Mapping[str, object]:
        """Names and values of the result in a few words each; an empty name where the value needs none."""
        raise NotImplementedError

    def __repr__(self) -> str:
        words = (f"{name} {fact}".strip() for name, fact in self.facts.items())
        return one_line(f"{type(self).__name__}({', '.join(filter(None, words))})")

    def _repr_html_(self) -> str:
        return table((name or type(self).__name__, fact) for name, fact in self.facts.items())


class Results(tuple[T, ...]):
    """Several results, in order."""

    __slots__ = ()

    def __repr__(self) -> str:
        more = f", and {len(self) - 1} more" if len(self) > 1 else ""
        return f"Results({self[0]!r}{more})" if self else "Results()"

    def _repr_html_(self) -> str:
        parts = [_html(result) for result in self[:SHOWN]]
        return "".join(parts) + (f"<p>and {len(self) - SHOWN} more</p>" if len(self) > SHOWN else "")


def table(rows: Iterable[Sequence[object]], *, head: Sequence[str] = ()) -> str:
    """An HTML table. Text in it is escaped; a result is shown as it shows itself."""
    top = f"<thead><tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr></thead>" if head else ""
    lines = ("".join(f'<td style="text-align: left">{_html(cell)}</td>' for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table>{top}<tbody>{body}</tbody></table>"


def figure(addresses: Sequence[str], caption: str, *, side: int = 160) -> str:
    """HTML of pictures beside each other with a caption below, figures beside figures. `addresses`: of the pictures; `side`:
    pixels of each."""
    look = f"width: {side}px; height: auto; margin: 0 4px 0 0; background: #fff"  # charts are transparent, their letters black
    images = "".join(f'<img src="{address}" style="{look}">' for address in addresses)
    width = f"width: {len(addresses) * (side + 4)}px; " if addresses else ""
    style = f"{width}display: inline-block; vertical-align: top; margin: 0 12px 12px 0; font-size: 0.85em"
    text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure style="{style}"><div style="display: flex">{images}</div>{text}</figure>'


def _html(value: object) -> str:
    show = getattr(value, "_repr_html_", None)
    return escape(str(value)) if show is None else str(show())
