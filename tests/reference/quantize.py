"""Quantizers written down naively, in numpy: float64, one number after another."""

import numpy as np


def symmetric(w, bits, shares=(1.0,)):
    """A vector on the symmetric grid whose range, shrunk by one of `shares`, has the least sum |error|^2.4."""
    highest = 2 ** (bits - 1) - 1
    best = None
    for share in shares:
        scale = share * np.max(np.abs(w)) / highest or 1.0
        q = np.array([scale * min(max(np.round(x / scale), -highest - 1), highest) for x in w])
        error = sum(abs(a - b) ** 2.4 for a, b in zip(q, w))
        if best is None or error < best[0]:
            best = error, q, scale
    return best[1], best[2]


def asymmetric(x, bits, with_zero=True):
    """A vector on the asymmetric grid over its own range."""
    low, high = float(np.min(x)), float(np.max(x))
    if with_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        return np.array(x)
    scale = (high - low) / (2**bits - 1)
    zero = np.round(-low / scale)
    return np.array([scale * (min(max(np.round(v / scale) + zero, 0), 2**bits - 1) - zero) for v in x])


def obq(w_OI, h_II, scales_O, bits, damp=0.01):
    """GPTQ as optimal brain quantization in a fixed order: round the first input that is left, move the rest by the
    inverse Hessian, then take that input out of the inverse by a rank-one update (arXiv 2210.17323, section 3)."""
    highest = 2 ** (bits - 1) - 1
    w_OI = np.array(w_OI, np.float64)
    q_OI = np.zeros_like(w_OI)
    inverse = np.linalg.inv(h_II + damp * np.mean(np.diag(h_II)) * np.eye(len(h_II)))
    for i in range(w_OI.shape[1]):
        q_OI[:, i] = scales_O * np.clip(np.round(w_OI[:, i] / scales_O), -highest - 1, highest)
        error_O = (w_OI[:, i] - q_OI[:, i]) / inverse[i, i]
        w_OI -= np.outer(error_O, inverse[i])
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return q_OI


def gptq_in_groups(w_OI, h_II, bits, group, damp=0.01):
    """The same whose scales are fitted, without a search, to each group as it stands when its first input comes."""
    highest = 2 ** (bits - 1) - 1
    w_OI = np.array(w_OI, np.float64)
    q_OI = np.zeros_like(w_OI)
    inverse = np.linalg.inv(h_II + damp * np.mean(np.diag(h_II)) * np.eye(len(h_II)))
    for i in range(w_OI.shape[1]):
        if i % group == 0:
            scales_O = np.max(np.abs(w_OI[:, i : i + group]), 1) / highest
        q_OI[:, i] = scales_O * np.clip(np.round(w_OI[:, i] / scales_O), -highest - 1, highest)
        error_O = (w_OI[:, i] - q_OI[:, i]) / inverse[i, i]
        w_OI -= np.outer(error_O, inverse[i])
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return q_OI
