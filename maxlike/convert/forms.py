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
