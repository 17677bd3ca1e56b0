"""GPTQ: rounding one input after another, each rounding error made up for by the inputs that are left."""

import functools

import jax
import jax.numpy as jnp

from maxlike.errors import UserError
from maxlike.quantize.grid import Grid, Quantized

MOST_DAMP = 1.0  # share of the mean diagonal beyond which a Hessian is not worth its name


class GPTQ:
    """GPTQ (Frantar et al. 2023, arXiv 2210.17323): the weight that minimises tr((W - Q)^T H (W - Q)), greedily.

    w_IO, hessian_II -> Quantized. H = 2/n sum x x^T over the layer's inputs x, float32.

    grid: the values to round to; its scales are fitted to the weight as it stands when a group begins, or once to the
        original weight where grid.group is None.
    damp > 0: share of H's mean diagonal added to it. Where H is still not positive definite it is raised tenfold until
        it is; Quantized.damp says what was used.
    block: inputs whose errors are handed to the rest together, at most; speed alone depends on it.
    act_order: inputs with the largest diagonal of H first. static_groups: scales of groups are fitted to the original
        weight before the first rounding.
    Refuses act_order with groups that are not static: their inputs would not lie together; a Hessian of another size.
    """

    needs_hessian = True

    def __init__(
        self,
        grid: Grid,
        *,
        damp: float = 0.01,
        block: int = 128,
        act_order: bool = False,
        static_groups: bool = False,
    ):
        if not 0 < damp <= MOST_DAMP:
            raise UserError(f"GPTQ.damp={damp} must lie above 0 and not above {MOST_DAMP:g}")
        if block < 1:
            raise UserError(f"GPTQ.block={block} must be at least 1 input")
        if act_order and grid.group is not None and not static_groups:
            raise UserError("GPTQ.act_order=True with groups needs GPTQ.static_groups=True, or Grid.group=None")
        self.grid, self.damp, self.act_order, self.static_groups = grid, damp, act_order, static_groups
        # Scales of a group need its inputs with all errors so far: a block may not reach into the next group.
        self.block = block if grid.group is None else _largest_divisor(grid.group, block)

    def check(self, inputs: int, outputs: int, layer: str) -> None:
        self.grid.check(inputs, layer)

    def cost(self, inputs: int, outputs: int) -> float:
        return self.grid.cost(inputs)

    def __call__(self, w_IO: jax.Array, hessian_II: jax.Array) -> Quantized:
        inputs = w_IO.shape[0]
        self.grid.check(inputs, "this matrix")
        if hessian_II.shape != (inputs, inputs):
            raise UserError(f"GPTQ of {inputs} inputs got a Hessian of shape {hessian_II.shape}")
        w_IO, hessian_II, order_I = _prepare(w_IO.astype(jnp.float32), hessian_II.astype(jnp.float32), self.act_order)
        damp = self.damp
        factor_II = _factor(hessian_II, damp)
        while not bool(jnp.all(jnp.isfinite(factor_II))):
            damp *= 10
            if damp > MOST_DAMP:
                raise UserError(
                    f"a Hessian of {inputs} inputs is not positive definite at any damping up to {MOST_DAMP:g}: "
                    "are the calibration's activations finite?"
                )
            factor_II = _factor(hessian_II, damp)
        static = self.static_groups or self.grid.group is None
        weight_IO, codes_IO, scales_GO, zeros_GO = _round(self.grid, self.block, static, w_IO, factor_II, order_I)
        return Quantized(weight_IO, codes_IO, scales_GO, zeros_GO, self.grid.cost(inputs), damp)


def _largest_divisor(n: int, most: int) -> int:
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)


@functools.partial(jax.jit, static_argnums=2)
def _prepare(w_IO: jax.Array, hessian_II: jax.Array, act_order: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weight and Hessian with inputs that never occur taken out, in the order of rounding, and that order."""
    diagonal_I = jnp.diagonal(hessian_II)
    dead_I = diagonal_I == 0
    hessian_II = hessian_II + jnp.diag(dead_I.astype(jnp.float32))
    w_IO = jnp.where(dead_I[:, None], 0.0, w_IO)
    order_I = jnp.argsort(-diagonal_I) if act_order else jnp.arange(len(diagonal_I))
    return w_IO, hessian_II[order_I][:, order_I], order_I


@jax.jit
def _factor(hessian_II: jax.Array, damp: float) -> jax.Array:
    """Upper triangular U with U^T U = (H + damp mean(diag H) I)^-1, NaN where that is not positive definite.

    From one Cholesky factor of H read backwards, H = V V^T with V upper triangular, U = V^-1: the inverse of H, whose
    own Cholesky factor is asked for, is never formed.
    """
    inputs = len(hessian_II)
    hessian_II = hessian_II + damp * jnp.mean(jnp.diagonal(hessian_II)) * jnp.eye(inputs)
    v_II = jnp.linalg.cholesky(hessian_II[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(v_II, jnp.eye(inputs), lower=False)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _round(grid: Grid, block: int, static: bool, w_IO, factor_II, order_I) -> tuple:
    """(weight, codes, scales, zeros), in the original order of the inputs, of a weight that is still in it."""
    inputs, outputs = w_IO.shape
    group = grid.group or inputs
    w_GgO = jnp.reshape(w_IO, (-1, group, outputs))
    scales_GO, zeros_GO = grid.fit(w_GgO)  # where groups are not static, overwritten as each begins
    group_I = order_I // group
    pad = -inputs % block  # of zero weights that touch nothing: a grid holds 0 exactly
    w_IO = jnp.pad(w_IO[order_I], ((0, pad), (0, 0)))
    u_II = jnp.pad(factor_II, ((0, pad), (0, pad))) + jnp.diag((jnp.arange(inputs + pad) >= inputs).astype(jnp.float32))
    group_I = jnp.pad(group_I, (0, pad))
    index_I = jnp.arange(inputs + pad)

    def fit(state, first):
        w_IO, scales_GO, zeros_GO, _, _ = state
        scale_O, zero_O = grid.fit(jax.lax.dynamic_slice_in_dim(w_IO, first, group))
        g = first // group
        return scales_GO.at[g].set(scale_O), zeros_GO.at[g].set(zero_O)

    def one_block(b, state):
        first = b * block
        if not static:
            begins = first % group == 0
            new = jax.lax.cond(begins, lambda: fit(state, first), lambda: state[1:3])
            state = (state[0], *new, *state[3:])
        w_IO, scales_GO, zeros_GO, weight_IO, codes_IO = state
        rows_bI = jax.lax.dynamic_slice_in_dim(u_II, first, block)
        within_bb = jax.lax.dynamic_slice_in_dim(rows_bI, first, block, 1)
        groups_b = jax.lax.dynamic_slice_in_dim(group_I, first, block)

        def one_input(i, inner):
            w_bO, errors_bO, weight_bO, codes_bO = inner
            scale_O, zero_O = scales_GO[groups_b[i]], zeros_GO[groups_b[i]]
            near_1O, codes_1O = grid.round(w_bO[i][None], scale_O, zero_O)
            error_O = (w_bO[i] - near_1O[0]) / within_bb[i, i]
            w_bO = w_bO - within_bb[i][:, None] * error_O  # row i of U is zero before i: earlier inputs stay
            return w_bO, errors_bO.at[i].set(error_O), weight_bO.at[i].set(near_1O[0]), codes_bO.at[i].set(codes_1O[0])

        start = jax.lax.dynamic_slice_in_dim(w_IO, first, block)
        zeros_bO = jnp.zeros_like(start)
        _, errors_bO, weight_bO, codes_bO = jax.lax.fori_loop(
            0, block, one_input, (start, zeros_bO, zeros_bO, zeros_bO)
        )
        later_bI = jnp.where(index_I >= first + block, rows_bI, 0.0)
        w_IO = w_IO - jnp.matmul(later_bI.T, errors_bO, precision=jax.lax.Precision.HIGHEST)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=first, axis=0)
        return w_IO, scales_GO, zeros_GO, put(weight_IO, weight_bO), put(codes_IO, codes_bO)

    empty_IO = jnp.zeros_like(w_IO)
    state = (w_IO, scales_GO, zeros_GO, empty_IO, empty_IO)
    _, scales_GO, zeros_GO, weight_IO, codes_IO = jax.lax.fori_loop(0, len(w_IO) // block, one_block, state)
    back_I = jnp.argsort(order_I)
    weight_IO, codes_IO = weight_IO[:inputs][back_I], codes_IO[:inputs][back_I]
    return weight_IO, codes_IO.astype(grid.code_dtype), scales_GO, zeros_GO.astype(jnp.int32)
