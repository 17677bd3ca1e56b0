"""MoMa's layers as loops over experts and sorted lists of tokens, in numpy: no static buffers, no gathers by index
arrays."""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def swiglu(x_D, gate_DF, up_DF, down_FD):
    g = x_D @ gate_DF
    return (g * sigmoid(g) * (x_D @ up_DF)) @ down_FD


def expert_choice(x_ND, groups, modality_N, real_N, capacity_factor=1.0):
    """(y_ND, {(group, expert): chosen tokens}) of one routing scope.

    groups: dicts of numpy arrays router [D, E] (absent for a group of one), gate, up [E, D, F], down [E, F, D]."""
    y_ND, chosen = np.zeros_like(x_ND), {}
    for m, group in enumerate(groups):
        tokens = [n for n in range(len(x_ND)) if real_N[n] and (len(groups) == 1 or modality_N[n] == m)]
        E = len(group["gate"])
        k = len(tokens) if E == 1 else int(np.floor(len(tokens) * capacity_factor / E + 1e-9))
        for e in range(E):
            score = {n: 0.0 if E == 1 else float(x_ND[n] @ group["router"][:, e]) for n in tokens}
            chosen[m, e] = sorted(tokens, key=lambda n: (-score[n], n))[:k]
            for n in chosen[m, e]:
                weight = 1.0 if E == 1 else sigmoid(score[n])
                y_ND[n] += weight * swiglu(x_ND[n], group["gate"][e], group["up"][e], group["down"][e])
    return y_ND, chosen


def mixture_of_depths(x_ND, router_D, capacity, block):
    """out_ND of one row; `block(x_KD, positions_K)` is the block on the kept tokens."""
    score = x_ND @ router_D
    kept = sorted(sorted(range(len(x_ND)), key=lambda n: (-score[n], n))[: int(len(x_ND) * capacity + 1e-9)])
    y_KD = block(x_ND[kept], np.asarray(kept))
    out_ND = x_ND.copy()
    for y_D, n in zip(y_KD, kept):
        out_ND[n] += sigmoid(score[n]) * (y_D - x_ND[n])
    return out_ND, kept
