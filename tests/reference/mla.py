"""Latent attention from its definition: one head, one query at a time, every key and value written out."""

import numpy as np


def attention(x_TD, weights, *, heads, kv_heads, nope, rope, scale, rotate, query_factor=1.0, latent_factor=1.0):
    """weights: nested dict of numpy arrays as in MLA; rotate(x_K, n) turns the rotary part of a head by n positions."""

    def norm(x_TR, name):
        if name not in weights:
            return x_TR
        return x_TR / np.sqrt(np.mean(x_TR**2, -1, keepdims=True) + 1e-6) * weights[name]["gain"]

    w = {name: part["kernel"] for name, part in weights.items() if "kernel" in part}
    z_TR = norm(x_TD @ w["query_down"], "query_norm") if "query_down" in w else x_TD
    c_TR = norm(x_TD @ w["latent"], "latent_norm") * latent_factor
    out_TD = np.zeros((len(x_TD), w["out"].shape[-1]))
    for h in range(heads):
        g = h // (heads // kv_heads)
        q_TK = query_factor * z_TR @ w["query"][:, h]
        k_TN, v_TV = c_TR @ w["key"][:, g], c_TR @ w["value"][:, g]
        for i in range(len(x_TD)):
            q_nope, q_rope = q_TK[i, :nope], rotate(q_TK[i, nope:], i)
            scores = [q_nope @ k_TN[j] + q_rope @ rotate(x_TD[j] @ w["shared_key"], j) for j in range(i + 1)]
            p = np.exp(scale * np.array(scores))
            out_TD[i] += (p / p.sum() @ v_TV[: i + 1]) @ w["out"][h]
    assert q_rope.shape == (rope,)
    return out_TD
