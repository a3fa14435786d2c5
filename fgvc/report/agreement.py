"""The page of a smaller file: how far it answers as the float file, and the images for which it does not."""

from __future__ import annotations

from collections.abc import Sequence

from fgvc.data.index import ImageIndex, decode_row
from fgvc.evaluation.agreement import Agreement, Bars
from fgvc.exporting.variant import VariantFile
from fgvc.report.render import picture, render

SHOWN = 60  # images


def agreement_page(index: ImageIndex, made: VariantFile, found: Agreement, bars: Bars, failed: Sequence[str]) -> str:
    """`failed`: the bars that are missed, in words; empty: the file was written."""
    return render(
        "agreement.html",
        title=f"{made.variant} beside float",
        made=made,
        how=made.contract,
        found=found,
        bars=bars,
        failed=failed,
        classes=index.classes,
        shown=[
            (one, picture(decode_row(index, one.row)), str(index.paths[one.row])) for one in found.differing[:SHOWN]
        ],
    )
