"""Dual chunk attention from its definition: one query, one key, one distance at a time."""

import numpy as np


def distance(i: int, j: int, chunk: int, local: int) -> int:
    """The rotary distance at which the query at i meets the key at j <= i."""
    apart = i // chunk - j // chunk
    if apart == 0:
        place = i % chunk
    elif apart == 1:
        place = min(i % chunk + chunk, chunk + local - 1)
    else:
        place = chunk + local - 1
    return place - j % chunk


def attention(q_THK, k_TGK, v_TGK, *, chunk, local, scale, rotate, temperature):
    """rotate(x_K, n) turns one head by n positions; temperature(i) multiplies the scores of the query at i."""
    T, H, _ = q_THK.shape
    G = k_TGK.shape[1]
    y_THK = np.zeros((T, H, v_TGK.shape[2]))
    for h in range(H):
        g = h // (H // G)
        for i in range(T):
            # Only relative position matters: turn the query by the distance and leave the key where it is.
            turned = [rotate(q_THK[i, h], distance(i, j, chunk, local)) for j in range(i + 1)]
            scores = np.array([scale * temperature(i) * (q @ k_TGK[j, g]) for j, q in enumerate(turned)])
            weights = np.exp(scores - scores.max())
            y_THK[i, h] = weights / weights.sum() @ v_TGK[: i + 1, g]
    return y_THK
