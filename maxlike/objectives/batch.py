"""What objectives share: the fields of a batch that a model reads, and what its layers report."""

from typing import Any

import jax
import jax.numpy as jnp

from layers.context import Context, Source
from layers.pooled_balance import MARK
from maxlike.errors import UserError
from maxlike.metrics import Mean

SOURCE_FIELDS = ("sources", "source_positions", "source_segment_ids")


def context_of(batch: dict[str, jax.Array], key: jax.Array | None) -> Context:
    """The context of a batch [B, T]. key: randomness of a training call; None: evaluation.

    Reads positions and segment_ids (int32), and where the batch has them: prefix (bool, tokens that their whole segment
    sees), blocks (int32, second channel of two-dimensional positions), order (int32, place of each token in its row,
    where a mesh holds rows out of order), and for an encoder-decoder sources, source_positions, source_segment_ids
    (int32 [B, S]).
    Raises UserError for a batch that has some of the fields of a source and not all.
    """
    here = [name for name in SOURCE_FIELDS if name in batch]
    if here and len(here) < len(SOURCE_FIELDS):
        missing = next(name for name in SOURCE_FIELDS if name not in batch)
        raise UserError(f"The batch has `{here[0]}` and no `{missing}`: a source needs {', '.join(SOURCE_FIELDS)}.")
    return Context(
        positions_BT=batch["positions"],
        segments_BT=batch["segment_ids"],
        key=key,
        train=key is not None,
        prefix_BT=batch["prefix"].astype(bool) if "prefix" in batch else None,
        blocks_BT=batch.get("blocks"),
        order_BT=batch.get("order"),
        source=Source(*(batch[name] for name in SOURCE_FIELDS)) if here else None,
    )


def read_aux(aux: Any, tokens: jax.Array, owner: str = "layers") -> tuple[jax.Array, dict[str, Mean]]:
    """(losses, metrics) of what layers report: their losses summed, over `tokens` weighted tokens, for the objective;
    everything by name under `owner`, losses summed over layers and the rest averaged; the
    rest also for each layer, shallow first, as a vector under NAME/each where several layers report it.

    Raises UserError for the parts of a balance loss over all layers that nobody has put together."""
    losses, metrics = jnp.zeros((), jnp.float32), {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(aux)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if f"{MARK}/" in name:
            raise UserError(
                "PooledBalance needs all layers in one place, and MultiToken and OneFOneB have them in several: bind "
                "balance.LoadBalance in MoE.losses instead"
            )
        value = leaf.astype(jnp.float32)
        if name.split("/")[-1] == "loss":
            value = jnp.sum(value)
            losses = losses + value * tokens
        else:
            if value.ndim and value.shape[0] > 1:
                metrics[f"{owner}/{name}/each"] = Mean(jax.lax.stop_gradient(_by_layer(value)) * tokens, tokens)
            value = jnp.mean(value)
        metrics[f"{owner}/{name}"] = Mean(jax.lax.stop_gradient(value) * tokens, tokens)
    return losses, metrics


def _by_layer(value: jax.Array) -> jax.Array:
    """Means over all but the leading axis."""
    return jnp.mean(jnp.reshape(value, (value.shape[0], -1)), 1)
