"""MobileOne's over-parameterisation (Vasu et al., CVPR 2023, arXiv:2206.04040), around any convolution that can take it.

Every square convolution, 1x1 ones too, gets copies of its own size beside it, a 1x1 branch and, where it keeps channels
and size, the identity, each with its own batch norm. After stripping nothing is left: the branches are folded into the
plain kernels, exactly.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from typing_extensions import override

from fgvc.reparam.kinds import overparam
from fgvc.techniques.api import Technique
from fgvc.techniques.branches import add_branches
from fgvc.techniques.overparam.settings import OverparamSettings
from fgvc.techniques.plan import Plan


class Overparam(Technique):
    """Parallel branches: y = conv(x) + sum_n BN(conv_n(x)) + BN(1x1(x)) + BN(x), the new gammas 0 at first; no BN(x)
    where channels or size change, and no separate 1x1 beside a 1x1."""

    source: ClassVar[str] = "MobileOne, Vasu et al., CVPR 2023, arXiv:2206.04040"
    leaves: ClassVar[str] = "nothing: folded into the plain kernels"

    def __init__(self, config: OverparamSettings) -> None:
        self.config = config

    @override
    def setup(self, plan: Plan) -> None:
        """Add the branches. Raises FgvcError where a pattern fits no convolution, or nothing can be replaced."""
        add_branches(plan, self.config, partial(overparam, branches=self.config.branches), smallest=1)
