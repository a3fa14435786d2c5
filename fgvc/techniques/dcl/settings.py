"""Settings of `dcl`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import override

from fgvc.config.knots import Scheduled
from fgvc.config.technique import Requires, TechniqueSettings


class DclSettings(TechniqueSettings):
    """Train also on a jigsaw of every image, with heads that detect it and locate its patches."""

    technique: ClassVar[str] = "fgvc.techniques.dcl.technique:Dcl"

    kind: Literal["dcl"] = "dcl"
    grid: int = Field(7, ge=2, le=32, description="N: the image is cut into N x N patches")
    reach: float = Field(
        2.0,
        gt=0,
        description="k: along either axis a patch moves less than 2k cells, the paper's bound: rows are shuffled, then columns. "
        "The authors' code has no bound: tiles are shuffled as they stream by; a tenth stay (here a fifth), some go far",
    )
    classify: Scheduled = Field(1.0, description="weight of the jigsaw's cross-entropy beside the image's own")
    destroyed: Scheduled = Field(1.0, description="weight of telling original from destroyed (beta)")
    location: Scheduled = Field(
        1.0,
        description="weight of the L1 error of the patches' places (gamma; paper: 0.01 for rigid things like cars). Row and "
        "column of the exact permutation; the authors' code has one number a patch, and guesses the jigsaw's by brightness",
    )
    head: Literal["2-way", "2K-way"] = Field(
        "2-way", description="classes of the destroyed head: original or destroyed, or that and the class"
    )
    bn: Literal["shared", "own"] = Field(
        "shared", description="shared: jigsaws are in the statistics of the batch norms (paper); own: they are not"
    )

    @model_validator(mode="after")
    def _moves(self) -> DclSettings:
        if self.reach <= 0.5:
            raise ValueError("reach: with 0.5 or less no patch ever moves")
        return self

    @property
    @override
    def requires(self) -> Requires:
        return Requires(side=self.grid)  # a pixel a patch
