"""A classifier's file as it is, fed as its net is: whatever its layout, type and batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fgvc.models.onnxnet.net import OnnxNet
from fgvc.runtime.engine import load_session


class FileSession:
    """onnxruntime on a file. Raises FgvcError where it can't load it."""

    def __init__(self, path: Path, net: OnnxNet, *, threads: int | None = None) -> None:
        """`net`: of the file, or of one with the same graph."""
        self._session = load_session(path, threads=threads)
        self._net = net

    def outputs(self, x: NDArray[np.floating], *names: str) -> list[NDArray[np.floating]]:
        """The outputs of these names, or that with the classes, for images x (B,3,H,W) as the file takes them but for layout and
        type; where the file's batch is fixed, in pieces."""
        net, step = self._net, self._net.batch or len(x)
        images = x if net.layout == "NCHW" else x.transpose(0, 2, 3, 1)
        fed = np.ascontiguousarray(np.rint(images) if net.dtype == "uint8" else images).astype(net.dtype)
        pieces = [fed[at : at + step] for at in range(0, len(fed), step)]
        pieces[-1] = np.resize(pieces[-1], (step, *fed.shape[1:]))
        wanted, name = list(names) or [net.output_name], self._session.get_inputs()[0].name
        results = [self._session.run(wanted, {name: piece}) for piece in pieces]
        return [np.concatenate(parts)[: len(x)] for parts in zip(*results, strict=True)]

    def answers(self, x: NDArray[np.floating]) -> NDArray[np.float64]:
        """What the file says of the classes, (B,K): logits, or probabilities where it ends so."""
        return self.outputs(x)[0].reshape(len(x), -1).astype(np.float64)
