"""ACNet's asymmetric branches (Ding et al., ICCV 2019, arXiv:1908.03930), around any timm convolution that can take them.

Every square k x k convolution gets a 1 x k and a k x 1 branch beside it, each with its own batch norm. After stripping
nothing is left: the branches are folded into the plain kernels, exactly.
"""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from fgvc.reparam.kinds import acb
from fgvc.techniques.acb.settings import AcbSettings
from fgvc.techniques.api import Technique
from fgvc.techniques.branches import add_branches
from fgvc.techniques.plan import Plan


class Acb(Technique):
    """Asymmetric branches: y = conv(x) + BN(conv_1xk(x)) + BN(conv_kx1(x)), the new gammas 0 at first."""

    source: ClassVar[str] = "ACNet, Ding et al., ICCV 2019, arXiv:1908.03930"
    leaves: ClassVar[str] = "nothing: folded into the plain kernels"

    def __init__(self, config: AcbSettings) -> None:
        self.config = config

    @override
    def setup(self, plan: Plan) -> None:
        """Add the branches. Raises FgvcError where a pattern fits no convolution, or nothing can be replaced."""
        add_branches(plan, self.config, acb)
