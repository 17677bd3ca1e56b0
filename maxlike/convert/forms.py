"""How an array lies in a checkpoint file and how it lies here: pure maps both ways.

A form knows the file's shape from ours, so that a header can be checked before anything is read.
"""

import dataclasses
import math
from typing import Protocol

import numpy as np

Shape = tuple[int, ...]


class Form(Protocol):
    """One tensor of the file <-> the parameters that it holds, usually one."""

    def shape(self, shapes: tuple[Shape, ...]) -> Shape:
        """The tensor's shape in the file, from the shapes of the parameters."""

    def load(self, tensor: np.ndarray, shapes: tuple[Shape, ...]) -> tuple[np.ndarray, ...]:
        """The parameters out of the tensor."""

    def store(self, arrays: tuple[np.ndarray, ...]) -> np.ndarray:
        """The tensor made of the parameters."""


@dataclasses.dataclass(frozen=True)
class Flat:
    """The same numbers in the same order with the dimensions merged into one: gains, and biases [H, K] -> [H K]."""

    def shape(self, shapes: tuple[Shape, ...]) -> Shape:
        return (math.prod(shapes[0]),)

    def load(self, tensor: np.ndarray, shapes: tuple[Shape, ...]) -> tuple[np.ndarray, ...]:
        return (tensor.reshape(shapes[0]),)

    def store(self, arrays: tuple[np.ndarray, ...]) -> np.ndarray:
        return arrays[0].reshape(-1)


@dataclasses.dataclass(frozen=True)
class Same:
    """The same array: embedding tables."""

    def shape(self, shapes: tuple[Shape, ...]) -> Shape:
        return shapes[0]

    def load(self, tensor: np.ndarray, shapes: tuple[Shape, ...]) -> tuple[np.ndarray, ...]:
        return (tensor,)

    def store(self, arrays: tuple[np.ndarray, ...]) -> np.ndarray:
        return arrays[0]


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A Linear's kernel (*inputs, *outputs) as [inputs, outputs] (GPT-2's Conv1D). inputs: how many dimensions of the
    kernel are input: 1, or 2 for a projection out of heads [H, K, D]."""

    inputs: int = 1

    def shape(self, shapes: tuple[Shape, ...]) -> Shape:
        return math.prod(shapes[0][: self.inputs]), math.prod(shapes[0][self.inputs :])

    def load(self, tensor: np.ndarray, shapes: tuple[Shape, ...]) -> tuple[np.ndarray, ...]:
        return (tensor.reshape(shapes[0]),)

    def store(self, arrays: tuple[np.ndarray, ...]) -> np.ndarray:
        return arrays[0].reshape(self.shape((arrays[0].shape,)))


@dataclasses.dataclass(frozen=True)
class Transposed:
    """A Linear's kernel (*inputs, *outputs) as [outputs, inputs]: torch's Linear. inputs: as for Matrix."""

    inputs: int = 1

    def shape(self, shapes: tuple[Shape, ...]) -> Shape:
        return Matrix(self.inputs).shape(shapes)[::-1]

    def load(self, tensor: np.ndarray, shapes: tuple[Shape, ...]) -> tuple[np.ndarray, ...]:
        return (tensor.T.reshape(shapes[0]),)

    def store(self, arrays: tuple[np.ndarray, ...]) -> np.ndarray:
        return Matrix(self.inputs).store(arrays).T


@dataclasses.dataclass(frozen=True)
class Fused:
    """Several parameters one after another along `axis` of the file's tensor, each in the form `part`: gate and up,
    or query, key and value, in one matrix. In torch's layout the outputs are axis 0, in Conv1D's they are axis 1."""

    part: Form
    axis: int = 0

    def _sizes(self, shapes: tuple[Shape, ...]) -> list[int]:
        return [self.part.shape((shape,))[self.axis] for shape in shapes]

    def shape(self, shapes: tuple[Shape, ...]) -> Shape:
        whole = list(self.part.shape((shapes[0],)))
        whole[self.axis] = sum(self._sizes(shapes))
        return tuple(whole)

    def load(self, tensor: np.ndarray, shapes: tuple[Shape, ...]) -> tuple[np.ndarray, ...]:
        cuts = np.cumsum(self._sizes(shapes))[:-1]
        pieces = np.split(tensor, cuts, self.axis)
        return tuple(self.part.load(piece, (shape,))[0] for piece, shape in zip(pieces, shapes, strict=True))

    def store(self, arrays: tuple[np.ndarray, ...]) -> np.ndarray:
        return np.concatenate([self.part.store((array,)) for array in arrays], self.axis)


@dataclasses.dataclass(frozen=True)
class Shifted:
    """`part` of the parameter less 1: the gain of a zero-centred norm, x (1 + w)."""

    part: Form = Flat()

    def shape(self, shapes: tuple[Shape, ...]) -> Shape:
        return self.part.shape(shapes)

    def load(self, tensor: np.ndarray, shapes: tuple[Shape, ...]) -> tuple[np.ndarray, ...]:
        return self.part.load(tensor.astype(np.float32) + 1, shapes)

    def store(self, arrays: tuple[np.ndarray, ...]) -> np.ndarray:
        return self.part.store((arrays[0] - 1,))


@dataclasses.dataclass(frozen=True)
class Taps:
    """The kernel [taps, *channels] of a convolution along the row as [channels, 1, taps]: torch's depthwise Conv1d."""

    def shape(self, shapes: tuple[Shape, ...]) -> Shape:
        return math.prod(shapes[0][1:]), 1, shapes[0][0]

    def load(self, tensor: np.ndarray, shapes: tuple[Shape, ...]) -> tuple[np.ndarray, ...]:
        return (tensor[:, 0].T.reshape(shapes[0]),)

    def store(self, arrays: tuple[np.ndarray, ...]) -> np.ndarray:
        return arrays[0].reshape(len(arrays[0]), -1).T[:, None]


@dataclasses.dataclass(frozen=True)
class ByHead:
    """Several kernels [inputs, heads, width] one after another within each head: keys and values of latent attention,
    queries and their gates. In torch's layout, [heads (width + width + ...), inputs].

    groups: into how many the outputs of each kernel are cut in place of its heads, None for the first one's heads.
    inputs: 1, or 0 for offsets [heads, width].
    """

    groups: int | None = None
    inputs: int = 1

    def _cut(self, shape: Shape, groups: int) -> Shape:
        return *shape[: self.inputs], groups, math.prod(shape[self.inputs :]) // groups

    def _cuts(self, shapes: tuple[Shape, ...]) -> list[Shape]:
        groups = shapes[0][self.inputs] if self.groups is None else self.groups
        return [self._cut(shape, groups) for shape in shapes]

    def _joined(self, shapes: tuple[Shape, ...]) -> Shape:
        cuts = self._cuts(shapes)
        return *cuts[0][:-1], sum(cut[-1] for cut in cuts)

    @property
    def _part(self) -> Form:
        return Transposed() if self.inputs else Flat()

    def shape(self, shapes: tuple[Shape, ...]) -> Shape:
        return self._part.shape((self._joined(shapes),))

    def load(self, tensor: np.ndarray, shapes: tuple[Shape, ...]) -> tuple[np.ndarray, ...]:
        whole = self._part.load(tensor, (self._joined(shapes),))[0]
        pieces = np.split(whole, np.cumsum([cut[-1] for cut in self._cuts(shapes)])[:-1], -1)
        return tuple(piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True))

    def store(self, arrays: tuple[np.ndarray, ...]) -> np.ndarray:
        cuts = self._cuts(tuple(array.shape for array in arrays))
        whole = np.concatenate([array.reshape(cut) for array, cut in zip(arrays, cuts, strict=True)], -1)
        return self._part.store((whole,))
