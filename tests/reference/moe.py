"""A mixture of experts from its definition: every expert computes every token, and weights of zero do the rest."""

import jax
import jax.numpy as jnp


def chosen(selection_TE, top_k):
    """bool [T, E]: experts that fewer than top_k others beat; of equal ones the lower index wins."""
    E = selection_TE.shape[1]
    ours, theirs = selection_TE[:, :, None], selection_TE[:, None, :]
    lower = jnp.arange(E)[None, :] < jnp.arange(E)[:, None]
    return jnp.sum((theirs > ours) | ((theirs == ours) & lower), -1) < top_k


def open_groups(selection_TE, groups, top_groups, best):
    """bool [T, E]: experts of the groups whose `best` highest scores add up to the most."""
    grouped = selection_TE.reshape(len(selection_TE), groups, -1)
    total = jnp.sort(grouped, -1)[:, :, -best:].sum(-1)
    return jnp.repeat(chosen(total, top_groups), grouped.shape[2], axis=1)


def weights(x_TD, kernel_DE, *, top_k, score="softmax", norm_topk=False, scale=1.0, bias_E=0.0, limit=None):
    """float32 [T, E]: the weight of each expert for each token, zero where it was not chosen."""
    logits_TE = x_TD @ kernel_DE
    score_TE = jax.nn.softmax(logits_TE) if score == "softmax" else jax.nn.sigmoid(logits_TE)
    selection_TE = score_TE + bias_E
    if limit is not None:
        selection_TE = jnp.where(open_groups(selection_TE, *limit), selection_TE, -jnp.inf)
    weight_TE = jnp.where(chosen(selection_TE, top_k), score_TE, 0.0)
    return scale * (weight_TE / weight_TE.sum(-1, keepdims=True) if norm_topk else weight_TE)


def experts(x_TD, gate_EDF, up_EDF, down_EFD):
    """[T, E, D]: every expert's output for every token."""
    h_ETF = jax.nn.silu(jnp.einsum("td,edf->etf", x_TD, gate_EDF)) * jnp.einsum("td,edf->etf", x_TD, up_EDF)
    return jnp.einsum("etf,efd->ted", h_ETF, down_EFD)


def served(index_TJ, experts, capacity, order):
    """Python's own bookkeeping: which (token, choice) get a place, first choices of all tokens first."""
    free, kept = dict.fromkeys(range(experts), capacity), set()
    for j in range(index_TJ.shape[1]):
        for t in order:
            e = int(index_TJ[t, j])
            if free.get(e, 0) > 0:
                free[e] -= 1
                kept.add((t, j))
    return kept
