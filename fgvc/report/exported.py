"""Page of an export into a deployed file: what was written, which images judge it, and what a stack's threshold accepts."""

from __future__ import annotations

from collections.abc import Sequence

from fgvc.evaluation.stack_threshold import StackThreshold
from fgvc.report.render import render

PAGE = "reports/export.html"  # in the run


def export_page(facts: Sequence[tuple[str, str]], stack: StackThreshold | None) -> str:
    """Render the page. `facts`: names and values; `stack`: None where no threshold was given."""
    return render("exported.html", title="Written into a deployed file", facts=facts, stack=stack)
