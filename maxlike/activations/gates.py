"""Gates of attention, and how large and how sparse what it writes is."""

import jax
import jax.numpy as jnp
import numpy as np

from layers.attention import Attention
from layers.mla import MLA
from maxlike.activations.statistic import Seen, Statistic, Sums, Values, by_layer, layered

LIMITS = (0.1, 0.5)
SMALL = 0.1  # of a token's root mean square; 8 % of the numbers of a Gaussian vector are smaller


class Gates(Statistic):
    """Gates of attention and what they do to its output (gated attention, arXiv 2505.06708, section 4).

    rows: of the validation split. Values, each with /each, layer by layer:
        gate_mean, gate_below_0.1, gate_below_0.5: mean gate score and the shares below the limits, of layers that have
            an AttentionGate; absent from a network without.
        attention_output, gated_output: mean |Y| of what the softmax gives and of what the output projection takes: the
            same numbers where no gate (position g1) lies between.
        attention_output_sparsity, gated_output_sparsity: share of the numbers of a token's Y that are smaller than a
            tenth of its root mean square; 0.08 for a Gaussian.
    Refuses mixture of depths.
    """

    taps = ("gate", "attention_output", "gated_output")
    inside_blocks = True

    def sums(self, seen: Seen) -> Sums:
        sums: Sums = {}
        for name in ("attention_output", "gated_output"):
            found = [x for x, owner in seen.tapped[name] if isinstance(owner, Attention | MLA)]
            if found:
                sums[name] = by_layer([seen.mean(_mean(jnp.abs(_wide(x)))) for x in found])
                sums[f"{name}_sparsity"] = by_layer([seen.mean(_small(_wide(x))) for x in found])
        scores = [_wide(x) for x, _ in seen.tapped["gate"]]
        if scores:
            sums["gate_mean"] = by_layer([_everywhere(seen, x) for x in scores])
            for limit in LIMITS:
                sums[f"gate_below_{limit}"] = by_layer([_everywhere(seen, x < limit) for x in scores])
        return sums

    def values(self, totals: dict[str, np.ndarray]) -> Values:
        return {key: x for name, each in totals.items() for key, x in layered(name, each).items()}


def _wide(x: jax.Array) -> jax.Array:
    """float32, with all that belongs to a token on one axis."""
    return jnp.reshape(x.astype(jnp.float32), (*x.shape[:2], -1))


def _mean(x: jax.Array) -> jax.Array:
    return jnp.mean(x.astype(jnp.float32), -1)


def _everywhere(seen: Seen, x: jax.Array):
    """Mean over the tokens that count, of a score that may be one for all rows and tokens."""
    return seen.mean(jnp.broadcast_to(_mean(x), seen.real_BT.shape))


def _small(y_BTN: jax.Array) -> jax.Array:
    limit = SMALL * jnp.sqrt(jnp.mean(y_BTN**2, -1, keepdims=True))
    return _mean(jnp.abs(y_BTN) < limit)
