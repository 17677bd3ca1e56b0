"""Rounding to nearest."""

import functools

import jax
import jax.numpy as jnp

from maxlike.quantize.grid import Grid, Quantized


class RTN:
    """Round to nearest: the grid applied directly. w_IO, inputs first -> Quantized."""

    needs_hessian = False

    def __init__(self, grid: Grid):
        self.grid = grid

    def check(self, inputs: int, outputs: int, layer: str) -> None:
        self.grid.check(inputs, layer)

    def cost(self, inputs: int, outputs: int) -> float:
        return self.grid.cost(inputs)

    def __call__(self, w_IO: jax.Array, hessian: None = None) -> Quantized:
        inputs = len(w_IO)
        self.grid.check(inputs, "this matrix")
        weight_IO, codes_IO, scales_GO, zeros_GO = _nearest(self.grid, w_IO.astype(jnp.float32))
        return Quantized(weight_IO, codes_IO, scales_GO, zeros_GO, self.grid.cost(inputs))


@functools.partial(jax.jit, static_argnums=0)
def _nearest(grid: Grid, w_IO: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    w_GgO = jnp.reshape(w_IO, (-1, grid.group or w_IO.shape[0], w_IO.shape[1]))
    scales_GO, zeros_GO = grid.fit(w_GgO)
    weight_GgO, codes_GgO = grid.round(w_GgO, scales_GO, zeros_GO)
    return (
        jnp.reshape(weight_GgO, w_IO.shape),
        jnp.reshape(codes_GgO, w_IO.shape).astype(grid.code_dtype),
        scales_GO,
        zeros_GO.astype(jnp.int32),
    )
