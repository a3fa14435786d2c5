"""Tables as text."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from fgvc.io.files import finite_or_none


def as_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> str:
    """`columns` and all others that any row has, in the order of their first appearance; what a row lacks is left empty, and so
    is a number that is none."""
    text = io.StringIO()
    columns = list(dict.fromkeys([*columns, *(key for row in rows for key in row)]))
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(finite_or_none(row) for row in rows)
    return text.getvalue()
