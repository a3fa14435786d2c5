"""Values of an ONNX graph during its conversion: known numbers, stored tensors, and results that depend on the image.

*Known*: numbers that nothing trains, such as shapes and bounds; where they depend on the batch they are held for several
batches. *Stored*: a tensor of floats in the file, maybe through views (Transpose, Reshape, Cast), which becomes a parameter.
*Live*: what is computed from images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Known:
    """An array for each of the batches; the same object where it does not depend on them."""

    arrays: tuple[Array, ...]

    @property
    def fixed(self) -> bool:
        """Whether the array is the same for each batch."""
        first = self.arrays[0]
        return all(array is first or (array.shape == first.shape and (array == first).all()) for array in self.arrays[1:])

    @property
    def array(self) -> Array:
        """The array of a value that does not depend on the batch."""
        return self.arrays[0]


@dataclass(frozen=True, slots=True)
class View:
    """A step from a stored tensor to what reads it, and back."""

    kind: str  # permute | reshape
    argument: tuple[int, ...]
    before: tuple[int, ...]  # shape

    def __call__(self, array: Tensor) -> Tensor:
        return array.permute(self.argument) if self.kind == "permute" else array.reshape(self.argument)

    def back(self, array: Tensor) -> Tensor:
        """Undo the view."""
        if self.kind == "reshape":
            return array.reshape(self.before)
        return array.permute([self.argument.index(axis) for axis in range(len(self.argument))])


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the file, read through views."""

    name: str
    array: Array  # as it is stored
    views: tuple[View, ...] = ()

    def tensor(self) -> Tensor:
        """The values as the views show them, contiguous: float64 where the file has that, else float32."""
        value = torch.from_numpy(np.array(self.array, np.float64 if self.array.dtype == np.float64 else np.float32))
        for view in self.views:
            value = view(value)
        return value.contiguous()

    def viewed(self, kind: str, argument: tuple[int, ...]) -> Stored:
        """The tensor through one more view."""
        return Stored(self.name, self.array, (*self.views, View(kind, argument, self.shape)))

    def transposed(self) -> Stored:
        """The transposed matrix; a transposition of a transposed one is undone."""
        if self.views and (self.views[-1].kind, self.views[-1].argument) == ("permute", (1, 0)):
            return Stored(self.name, self.array, self.views[:-1])
        return self.viewed("permute", (1, 0))

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.array.shape
        for view in self.views:
            shape = tuple(shape[axis] for axis in view.argument) if view.kind == "permute" else view.argument
        return tuple(shape)


@dataclass(frozen=True, slots=True)
class Live:
    """A node of the fx graph, and its value without data for each of the batches."""

    node: fx.Node
    metas: tuple[Tensor, ...]

    @property
    def shape(self) -> torch.Size:
        """Shape for the first batch."""
        return self.metas[0].shape

    @property
    def rank(self) -> int:
        return self.metas[0].dim()

    @property
    def batch_axis(self) -> int | None:
        """The first axis that grows with the batch; None: none does."""
        pairs = zip(self.metas[0].shape, self.metas[1].shape, strict=True)
        return next((axis for axis, (one, two) in enumerate(pairs) if one != two), None)


Value = Known | Stored | Live


@dataclass(frozen=True, slots=True)
class Size:
    """A number of images in a shape: `times` the batch."""

    times: int


@dataclass(frozen=True, slots=True)
class Columns:
    """The step back from the weight (K,C+D) of two linear layers that were joined to that of one."""

    start: int
    end: int

    def back(self, array: Tensor) -> Tensor:
        """The columns (K,`end` - `start`) of the joined weight that are this layer's."""
        return array[:, self.start : self.end]


@dataclass(frozen=True, slots=True)
class Doubled:
    """The step back from the mean of two biases (K,) to one of them, the other being fixed."""

    offset: Tensor  # float64: the bias as it was, minus twice the mean

    def back(self, array: Tensor) -> Tensor:
        """The bias (K,) whose mean with the fixed one is `array`."""
        return 2 * array + self.offset.to(array)


@dataclass(slots=True)
class Slot:
    """Place of a stored tensor in the module: a parameter or buffer, and the views back to the file's shape."""

    target: str  # name in the module
    views: tuple[View, ...]
    trained: bool
    joined: Columns | Doubled | None = None  # where it is a part of the parameter: a step more

    def to_file(self, value: Tensor) -> Tensor:
        """Convert a parameter's value to the shape that the tensor has in the file."""
        value = value if self.joined is None else self.joined.back(value)
        for view in reversed(self.views):
            value = view.back(value)
        return value
