"""Block: a mixer and a feed-forward, each in a residual branch."""

import zlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from layers import axes
from layers.context import AnyOrder, Context, CutsLength, ReadsFuture, ReadsPrefix

Aux = dict[str, jax.Array]
# A branch reads all positions; its output is summed into a residual stream whose positions are spread over the devices
# that share the branch: two gathers and two reduce-scatters a block, where each would else hold and norm all of it.
WHOLE = ("batch", "length", "act_embed")
RESIDUAL = ("batch", "residual_length", "act_embed")


def enter(h_BTD: jax.Array) -> jax.Array:
    """The input of a branch: gathered; its gradient is spread again before anything else is done with it."""
    return axes.constrain(axes.constrain(h_BTD, *RESIDUAL), *WHOLE)


def leave(y_BTD: jax.Array) -> jax.Array:
    """The output of a branch as it enters the residual stream (the remat policy "branches" keeps it): spread; its
    gradient is gathered before the branch sees it."""
    return checkpoint_name(axes.constrain(axes.constrain(y_BTD, *WHOLE), *RESIDUAL), "branch")


class Block(nnx.Module):
    """x <- x + mixer(x), then x <- x + ffn(x), with norms where `order` says (s = residual_scale):

        pre        x + s f(norm(x))            Llama, GPT-2
        post       norm(x + s f(x))            the original transformer
        sandwich   x + s norm(f(norm(x)))      Gemma 2, GLM-4
        swin       x + s norm(f(x))            Swin v2 (arXiv 2111.09883), OLMo 2, Chameleon
        deepnorm   a h + s f(h), h = norm(x)   GLM-130B (arXiv 2210.02414), a = (2 depth)^0.5; a = skip_scale

    x and y: [B, T, D]. aux: the children's, their losses summed under "loss", metrics under "mixer/NAME", "ffn/NAME".

    Knobs: mixer, ffn, norm: factories; ffn None for a block that only mixes; order; residual_scale > 0; skip_scale > 0,
    of "deepnorm" alone; mixer_norm: factory of the mixer's norm where it differs from `norm`, or None; mixer_dropout,
    ffn_dropout in [0, 1): share of the numbers of f(...) that a training step replaces by zero, the others divided by
    1 - share (Srivastava et al. 2014); attention's probabilities and the embedding are never dropped.
    Refuses dropout without randomness in the context, a prefix (Context.prefix_BT) where the mixer would ignore it, and
        rows that a mesh cuts along their length or that are out of order (Context.order_BT) where the mixer cannot
        work on them.
    """

    def __init__(
        self,
        dim: int,
        *,
        mixer: Callable,
        ffn: Callable | None,
        norm: Callable,
        order: Literal["pre", "post", "sandwich", "swin", "deepnorm"] = "pre",
        residual_scale: float = 1.0,
        skip_scale: float = 1.0,
        mixer_norm: Callable | None = None,
        mixer_dropout: float = 0.0,
        ffn_dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        for name, share in (("mixer_dropout", mixer_dropout), ("ffn_dropout", ffn_dropout)):
            if not 0 <= share < 1:
                raise ValueError(f"Block.{name}={share} is outside [0, 1): it is the share set to zero, 0 for none")
        if order not in ("pre", "post", "sandwich", "swin", "deepnorm"):
            raise ValueError(f"Block.order={order!r} must be 'pre', 'post', 'sandwich', 'swin' or 'deepnorm'")
        if residual_scale <= 0:
            raise ValueError(f"Block.residual_scale={residual_scale} must be positive; 1.0 is the plain residual")
        if skip_scale <= 0 or (skip_scale != 1.0 and order != "deepnorm"):
            raise ValueError(
                f"Block.skip_scale={skip_scale} must be positive, and 1.0 unless Block.order is 'deepnorm'"
            )
        self.order, self.residual_scale, self.skip_scale = order, residual_scale, skip_scale
        self.mixer_dropout, self.ffn_dropout = mixer_dropout, ffn_dropout
        self.mixer = mixer(dim, rngs=rngs)
        self.mixer_norm = (norm if mixer_norm is None else mixer_norm)(dim, rngs=rngs)
        self.mixer_out_norm = norm(dim, rngs=rngs) if order == "sandwich" else None
        self.ffn = None if ffn is None else ffn(dim, rngs=rngs)
        self.ffn_norm = None if ffn is None else norm(dim, rngs=rngs)
        self.ffn_out_norm = norm(dim, rngs=rngs) if order == "sandwich" and ffn is not None else None

    def _branch(self, x_BTD, f: Callable, norm: Callable, out_norm: Callable | None) -> tuple[jax.Array, Any]:
        h_BTD = norm(x_BTD) if self.order in ("pre", "sandwich", "deepnorm") else x_BTD
        y_BTD, rest = f(enter(h_BTD))
        y_BTD = leave(y_BTD)
        if self.order == "sandwich":
            y_BTD = out_norm(y_BTD)
        if self.order == "swin":
            y_BTD = norm(y_BTD)
        if self.order == "deepnorm":
            x_BTD = h_BTD if self.skip_scale == 1.0 else self.skip_scale * h_BTD
        x_BTD = x_BTD + (y_BTD if self.residual_scale == 1.0 else self.residual_scale * y_BTD)
        return norm(x_BTD) if self.order == "post" else x_BTD, rest

    def _feed_forward(self, x_BTD, ctx: Context) -> tuple[jax.Array, Aux]:
        if self.ffn is None:
            return x_BTD, {}
        run = dropped("ffn_dropout", self.ffn_dropout, lambda h: self.ffn(h, ctx), ctx)
        return self._branch(x_BTD, run, self.ffn_norm, self.ffn_out_norm)

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        refuse_lost_prefix(self, ctx)
        refuse_cut_rows(self, ctx)
        mix = dropped("mixer_dropout", self.mixer_dropout, lambda h: self.mixer(h, ctx), ctx)
        x_BTD, mixer_aux = self._branch(x_BTD, mix, self.mixer_norm, self.mixer_out_norm)
        x_BTD, ffn_aux = self._feed_forward(x_BTD, ctx)
        return x_BTD, join({"mixer": mixer_aux, "ffn": ffn_aux})

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> Any:
        if isinstance(self.ffn, ReadsFuture):
            self.ffn.check_decoding()
        return self.mixer.init_cache(batch, length, dtype)

    def extend(self, x_BTD: jax.Array, cache: Any, ctx: Context) -> tuple[jax.Array, Any]:
        """The same branches while decoding; losses and metrics of the feed-forward are for training alone."""
        refuse_lost_prefix(self, ctx)
        x_BTD, cache = self._branch(
            x_BTD, lambda h: self.mixer.extend(h, cache, ctx), self.mixer_norm, self.mixer_out_norm
        )
        return self._feed_forward(x_BTD, ctx)[0], cache

    def flops_per_token(self, length: int) -> float:
        ffn = 0.0 if self.ffn is None else self.ffn.flops_per_token(length)
        return self.mixer.flops_per_token(length) + ffn


def dropped(knob: str, share: float, branch: Callable, ctx: Context) -> Callable:
    """`branch`, with dropout on its output in a training call."""
    if not share or not ctx.train:
        return branch
    if ctx.key is None:
        raise ValueError(f"Block.{knob}={share} needs randomness: Context.key is None in a training call")

    def run(h_BTD: jax.Array) -> tuple[jax.Array, Any]:
        y_BTD, rest = branch(h_BTD)
        key = jax.random.fold_in(ctx.key, zlib.crc32(knob.encode()))  # a key of its own beside the branch's
        keep_BTD = jax.random.bernoulli(key, 1.0 - share, y_BTD.shape)
        return jnp.where(keep_BTD, y_BTD / (1.0 - share), jnp.zeros((), y_BTD.dtype)), rest

    return run


def refuse_lost_prefix(block: nnx.Module, ctx: Context) -> None:
    """Raises ValueError for a prefix that `block.mixer` would ignore."""
    if ctx.prefix_BT is not None and not isinstance(block.mixer, ReadsPrefix):
        raise ValueError(
            f"{type(block).__name__}.mixer={type(block.mixer).__name__} cannot let all tokens see a prefix "
            "(Context.prefix_BT): drop the batch's `prefix` field, or use Attention"
        )


def refuse_cut_rows(block: nnx.Module, ctx: Context) -> None:
    """Raises ValueError for rows in parts, or out of order, that `block.mixer` cannot work on."""
    name, mixer = type(block.mixer).__name__, block.mixer
    over = axes.mesh_axes("length")
    if over and not isinstance(mixer, CutsLength):
        raise ValueError(
            f"{type(block).__name__}.mixer={name} cannot work on rows cut over the mesh axis {', '.join(over)} "
            "(context parallel): use a mesh without it"
        )
    if ctx.order_BT is not None and not isinstance(mixer, AnyOrder):
        raise ValueError(
            f"{type(block).__name__}.mixer={name} needs the tokens of a row in order (Context.order_BT): set "
            "Mesh.balance = False"
        )


def join(children: dict[str, Aux]) -> Aux:
    """One flat dict: losses summed, metrics under their child's name."""
    losses = [aux["loss"] for aux in children.values() if "loss" in aux]
    metrics = {f"{child}/{name}": x for child, aux in children.items() for name, x in aux.items() if name != "loss"}
    return metrics | ({"loss": sum(losses)} if losses else {})
