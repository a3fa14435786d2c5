"""Page of a smaller file: its agreement with the float file, and the images on which they differ."""

from __future__ import annotations

from collections.abc import Sequence

from fgvc.data.index import ImageIndex, decode_row
from fgvc.evaluation.agreement import Agreement, AgreementLimits
from fgvc.exporting.variant import VariantFile
from fgvc.images.address import picture
from fgvc.report.render import render

SHOWN = 60  # images


def agreement_page(
    index: ImageIndex, variant: VariantFile, agreement: Agreement, limits: AgreementLimits, failures: Sequence[str]
) -> str:
    """Render the page. `failures`: the limits that are not kept, in words; empty: the file was written."""
    return render(
        "agreement.html",
        title=f"{variant.variant} beside float",
        variant=variant,
        contract=variant.contract,
        agreement=agreement,
        limits=limits,
        failures=failures,
        classes=index.classes,
        shown=[
            (image, picture(decode_row(index, image.row)), str(index.paths[image.row])) for image in agreement.differing[:SHOWN]
        ],
    )
