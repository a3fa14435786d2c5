"""RepVGG's block (Ding et al., CVPR 2021, arXiv:2101.03697), around any timm convolution that can take it.

Every square k x k convolution gets a 1x1 branch beside it and, where it keeps channels and size, the identity, each with
its own batch norm. After stripping nothing is left: the branches are folded into the plain kernels, exactly.
"""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from fgvc.reparam.kinds import repvgg
from fgvc.techniques.api import Technique
from fgvc.techniques.branches import add_branches
from fgvc.techniques.plan import Plan
from fgvc.techniques.repvgg.settings import RepvggSettings


class Repvgg(Technique):
    """1x1 and identity branches: y = conv(x) + BN(1x1(x)) + BN(x), the new gammas 0 at first; no BN(x) where channels or
    size change."""

    source: ClassVar[str] = "Ding et al., CVPR 2021, arXiv:2101.03697"
    leaves: ClassVar[str] = "nothing: folded into the plain kernels"

    def __init__(self, config: RepvggSettings) -> None:
        self.config = config

    @override
    def setup(self, plan: Plan) -> None:
        """Add the branches. Raises FgvcError where a pattern fits no convolution, or nothing can be replaced."""
        add_branches(plan, self.config, repvgg)
