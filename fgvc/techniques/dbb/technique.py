"""Diverse Branch Block (Ding et al., CVPR 2021, arXiv:2103.13425), around any timm convolution that can take it.

Every square k x k convolution gets a 1x1, a 1x1 - k x k and an average - 1x1 branch beside it; a depthwise one a
1x1 - k x k of twice its channels and an average. After stripping nothing is left: the branches are folded into the plain
kernels, exactly.
"""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from fgvc.reparam.kinds import dbb
from fgvc.techniques.api import Technique
from fgvc.techniques.branches import add_branches
from fgvc.techniques.dbb.settings import DbbSettings
from fgvc.techniques.plan import Plan


class Dbb(Technique):
    """Diverse branches: y = conv(x) + BN(1x1(x)) + BN(kxk(BN(1x1(x)))) + BN(1x1(mean(x))), the last gammas 0 at first."""

    source: ClassVar[str] = "Ding et al., CVPR 2021, arXiv:2103.13425"
    leaves: ClassVar[str] = "nothing: folded into the plain kernels"

    def __init__(self, config: DbbSettings) -> None:
        self.config = config

    @override
    def setup(self, plan: Plan) -> None:
        """Add the branches. Raises FgvcError where a pattern fits no convolution, or nothing can be replaced."""
        add_branches(plan, self.config, dbb)
