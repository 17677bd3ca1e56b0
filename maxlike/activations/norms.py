"""Size of the residual stream, layer by layer."""

import jax.numpy as jnp
import numpy as np

from maxlike.activations.statistic import Peak, Seen, Statistic, Sums, Values, by_layer, layered


class Norms(Statistic):
    """Largest and usual size of the residual stream: massive activations (gated attention, arXiv 2505.06708, M-Act).

    rows: of the validation split. Values, of the output of the embedding and of every block:
    max_activation/each, max |x| over tokens and channels, and residual_rms/each, root of the mean square over both;
    max_activation, the paper's M-Act, and residual_rms are their means over the blocks.
    """

    taps = ("residual",)

    def sums(self, seen: Seen) -> Sums:
        states = [x_BTD.astype(jnp.float32) for x_BTD, _ in seen.tapped["residual"]]
        tops = [jnp.max(jnp.where(seen.real_BT[..., None], jnp.abs(x_BTD), 0.0)) for x_BTD in states]
        return {
            "top": Peak(jnp.stack(tops)),
            "square": by_layer([seen.mean(jnp.mean(x_BTD**2, -1)) for x_BTD in states]),
        }

    def values(self, totals: dict[str, np.ndarray]) -> Values:
        values: Values = {}
        for name, each in (("max_activation", totals["top"]), ("residual_rms", np.sqrt(totals["square"]))):
            values |= layered(name, each) | {name: float(np.mean(each[1:]))}
        return values
