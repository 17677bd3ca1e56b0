"""The balance loss over the tokens of all layers together, as Qwen2-MoE's code in transformers has it."""

import dataclasses

import jax
import jax.numpy as jnp

from layers.balance import row_sums
from layers.routers import Routing

MARK = "pooled"  # in the names of what a layer reports until `pool` has put the layers together


@dataclasses.dataclass(frozen=True)
class PooledBalance:
    """E * sum_e f_e P_e with f_e the share of all layers' choices that went to expert e (no gradient), P_e its mean
    probability over the tokens of all layers (transformers' `load_balancing_loss_func`): layers of opposite imbalance
    cancel, where `LoadBalance` asks each for balance. 1 when balanced.

    A loss whose minimum is top_k (transformers) has its coefficient multiplied by top_k here; it is one loss, whatever
    the number of layers. coefficient > 0: 1e-3 in Qwen2-MoE.
    A Stack puts its layers together, over all micro-batches of a pipeline.Circular. Where the layers that report are
    not one Stack's (MultiToken) or not in one place (OneFOneB), the objective refuses.
    """

    experts: int
    zero_experts: int
    top_k: int
    _: dataclasses.KW_ONLY
    coefficient: float = 1e-3

    def __post_init__(self):
        if self.coefficient <= 0:
            raise ValueError(
                f"PooledBalance.coefficient={self.coefficient} must be positive; leave the loss out of MoE.losses for "
                "none"
            )

    def report(self, routing: Routing, real_BT: jax.Array) -> dict[str, jax.Array]:
        """The sums of one layer: float32 choices [E], probability [E], and choices of the tokens that there are."""
        choices_BE, probability_BE, tokens_B1 = row_sums(routing, real_BT)
        return {
            f"{MARK}/choices": jnp.sum(choices_BE, 0),
            f"{MARK}/probability": jnp.sum(probability_BE, 0),
            f"{MARK}/tokens": jnp.sum(tokens_B1),
            f"{MARK}/coefficient": jnp.float32(self.coefficient),
        }


def pool(aux: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What the layers of a stack report, their values on a leading axis, with the sums that they report for a
    PooledBalance made into its loss: one more value of "loss", and without its coefficient "pooled_balance"."""
    ending = f"{MARK}/choices"
    for name in [name for name in aux if name.endswith(ending)]:
        owner = name.removesuffix(ending)
        choices_LE, probability_LE, tokens_L, coefficient_L = (
            aux[f"{owner}{MARK}/{part}"] for part in ("choices", "probability", "tokens", "coefficient")
        )
        choices_E = jnp.sum(choices_LE, 0)
        share_E = choices_E / jnp.maximum(jnp.sum(choices_E), 1.0)
        probability_E = jnp.sum(probability_LE, 0) / jnp.maximum(jnp.sum(tokens_L), 1.0)
        value = choices_E.shape[0] * jnp.sum(share_E * probability_E)
        loss = [aux["loss"]] if "loss" in aux else []
        aux = {key: x for key, x in aux.items() if not key.startswith(f"{owner}{MARK}/")}
        aux |= {
            "loss": jnp.concatenate([*loss, jnp.mean(coefficient_L)[None] * value]),
            f"{owner}pooled_balance": value[None],
        }
    return aux
