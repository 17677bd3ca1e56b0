"""One pure training step: micro-batches, mixed precision, clipping, the guard, the update, the running average."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from layers.axes import moved
from maxlike.errors import UserError
from maxlike.guard import Guard
from maxlike.metrics import Mean
from maxlike.model import AbstractModel
from maxlike.optimizers.moments import Moments

_ROUNDING = 0x726E64  # sets the noise of stochastic rounding apart from the micro-batches' own


class Step:
    """How one update is made. The state it maps is one pytree of pure dicts, see `init`.

    micro_batches: the batch is cut into this many parts, run one after another; losses and gradients are summed and
        divided once by the summed weights, so parts with more tokens count more, exactly as in one big batch.
    clip_norm: the gradient is scaled down to this global norm; None: never.
    ema_decay: keep an exponential average of the parameters with this decay, used by evaluation, generation and
        export; None: do not.
    accumulate_dtype: dtype in which gradients wait for those of the next micro-batch; bfloat16 halves them and rounds
        each sum.
    moments: how the optimizer's state is kept: bfloat16, or in the host's memory.
    compute_dtype: dtype of the forward and backward pass. Parameters, their gradients and the optimizer stay float32.
    guard: what to do when a loss is not finite or spikes.
    gradients: factory such as `one_f_one_b.OneFOneB` of a schedule that computes loss and gradients by itself; None:
        they are those of the objective by automatic differentiation.

    Raises UserError for micro_batches < 1, clip_norm <= 0, ema_decay outside (0, 1), or an accumulate_dtype where
    nothing is accumulated.
    """

    def __init__(
        self,
        *,
        micro_batches: int = 1,
        clip_norm: float | None = 1.0,
        ema_decay: float | None = None,
        compute_dtype: Literal["float32", "bfloat16"] = "float32",
        accumulate_dtype: Literal["float32", "bfloat16"] = "float32",
        moments: Moments | None = None,
        guard: Guard | None = None,
        gradients: Callable | None = None,
    ):
        if micro_batches < 1:
            raise UserError(f"Step.micro_batches={micro_batches}: it must be at least 1")
        if clip_norm is not None and clip_norm <= 0:
            raise UserError(f"Step.clip_norm={clip_norm}: give a positive norm, or None not to clip")
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise UserError(f"Step.ema_decay={ema_decay}: it must lie between 0 and 1, or be None")
        if accumulate_dtype != "float32" and micro_batches == 1:
            raise UserError(
                f"Step.accumulate_dtype={accumulate_dtype!r} accumulates nothing: raise Step.micro_batches above 1, or "
                "leave it float32"
            )
        self.micro_batches = micro_batches
        self.accumulate_dtype = accumulate_dtype
        self.moments = Moments() if moments is None else moments
        self.clip_norm = clip_norm
        self.ema_decay = ema_decay
        self.compute_dtype = compute_dtype
        self.guard = Guard() if guard is None else guard
        self.gradients = None if gradients is None else gradients()

    def init(self, params: dict, buffers: dict, optimizer: optax.GradientTransformation, seed: jax.Array) -> dict:
        """The train state of step 0.

        step: updates tried so far. seed: of all noise; in the state, so that another seed compiles nothing anew.
        """
        state = {
            "step": jnp.zeros((), jnp.int32),
            "seed": seed,
            "params": params,
            "buffers": buffers,
            "opt": self.moments.pack(optimizer.init(params), jax.random.key(seed)),
            "guard": self.guard.init(),
        }
        return state if self.ema_decay is None else state | {"ema": jax.tree.map(jnp.copy, params)}

    def update(
        self,
        state: dict,
        batch: dict[str, jax.Array],
        allow: jax.Array,
        *,
        model: AbstractModel,
        objective: Callable,
        optimizer: optax.GradientTransformation,
        progress: jax.Array | float,
    ) -> tuple[dict, dict[str, jax.Array]]:
        """(next state, metrics) of one batch. Where `allow` is false the update is dropped (a rewound bad step).
        progress: share of the run that is done, for rules of buffers that change over it."""
        key = jax.random.fold_in(jax.random.key(state["seed"]), state["step"])
        state = state | {"opt": self.moments.fetch(state["opt"])}
        loss, metrics, grads, statistics = self._gradients(state, batch, key, model, objective)
        grads = jax.tree.map(lambda g: g / loss.weight, grads)
        grad_norm = optax.tree.norm(grads)
        if self.clip_norm is not None:
            scale = jnp.minimum(1.0, self.clip_norm / jnp.maximum(grad_norm, 1e-12))
            grads = jax.tree.map(lambda g: g * scale, grads)
        bad, watch = self.guard.judge(state["guard"], loss.value(), grad_norm, allow)
        updates, opt = optimizer.update(grads, self.moments.unpack(state["opt"]), state["params"])
        opt = self.moments.pack(opt, jax.random.fold_in(key, _ROUNDING))
        params = optax.apply_updates(state["params"], updates)
        statistics = jax.tree.map(lambda s: s / self.micro_batches, statistics)
        buffers = jax.tree.map(
            lambda rule, b, s: moved(rule, b, s, progress), model.buffer_rules, state["buffers"], statistics
        )
        changed = {"params": params, "buffers": buffers, "opt": opt}
        if self.ema_decay is not None:
            decay = self.ema_decay
            changed["ema"] = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state["ema"], params)
        keep = bad | ~allow
        old = {name: state[name] for name in changed}
        changed = jax.tree.map(lambda new, before: jnp.where(keep, before, new), changed, old)
        state = state | changed | {"step": state["step"] + 1, "guard": watch}
        report = {name: mean.value() for name, mean in metrics.items()}
        report |= {
            "grad_norm": grad_norm,
            "bad": bad,
            "skipped": watch["skipped"],
            "bad_in_a_row": watch["bad_in_a_row"],
        }
        return state, report

    def loss(self, params: dict, buffers: dict, batch: dict, key: Any, model: AbstractModel, objective) -> tuple:
        """(loss, metrics) of one batch in the compute dtype; key None evaluates without noise."""
        cast = model.cast(params, jnp.dtype(self.compute_dtype))
        return objective(model.merge(cast, buffers), batch, key)

    def _gradients(
        self, state: dict, batch: dict, key: jax.Array, model: AbstractModel, objective: Callable
    ) -> tuple[Mean, dict[str, Mean], dict, dict]:
        """Summed loss, metrics, gradients and statistics of the buffers over the micro-batches."""

        def total(params: dict, buffers: dict, part: dict, key: jax.Array):
            loss, metrics = self.loss(params, buffers, part, key, model, objective)
            return loss.total, (loss, metrics)

        def summed(part: dict, key: jax.Array) -> tuple[Mean, dict[str, Mean], dict, dict]:
            if self.gradients is not None:
                cast = model.cast(state["params"], jnp.dtype(self.compute_dtype))
                return self.gradients(cast, state["buffers"], part, key, model, objective)
            differentiate = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
            (_, (loss, metrics)), (grads, statistics) = differentiate(state["params"], state["buffers"], part, key)
            return loss, metrics, grads, statistics

        if self.micro_batches == 1:
            return summed(batch, key)
        # Part m takes rows m, m + M, m + 2M, ...: every device then holds its share of every part.
        parts = jax.tree.map(lambda x: x.reshape(-1, self.micro_batches, *x.shape[1:]).swapaxes(0, 1), batch)
        keys = jax.random.split(key, self.micro_batches)
        first = jax.tree.map(lambda x: x[0], parts)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(summed, first, keys[0]))

        dtype = jnp.dtype(self.accumulate_dtype)

        def stored(sums: tuple) -> tuple:
            loss, metrics, grads, statistics = sums
            return loss, metrics, jax.tree.map(lambda g: g.astype(dtype), grads), statistics

        def add(sums: tuple, part_and_key: tuple) -> tuple[tuple, None]:
            return stored(jax.tree.map(jnp.add, sums, summed(*part_and_key))), None

        loss, metrics, grads, statistics = jax.lax.scan(add, stored(zeros), (parts, keys))[0]
        return loss, metrics, jax.tree.map(lambda g: g.astype(jnp.float32), grads), statistics
