"""Mamba-2 written from its recurrence in numpy float64: one token after the other, no chunks, no shared shifts."""

import numpy as np


def silu(x):
    return x / (1 + np.exp(-x))


def convolution(x_TC, kernel_WC, bias_C=None, segments_T=None):
    """y_t = sum_j kernel[W - 1 - j] x_{t-j} + bias over the tokens of t's own run of equal segment ids."""
    T, W = len(x_TC), len(kernel_WC)
    segments_T = np.ones(T, int) if segments_T is None else segments_T
    y_TC = np.zeros_like(x_TC, dtype=np.float64)
    for t in range(T):
        for j in range(W):
            if t - j < 0 or segments_T[t - j] != segments_T[t]:
                break
            y_TC[t] += kernel_WC[W - 1 - j] * x_TC[t - j]
    return y_TC if bias_C is None else y_TC + bias_C


def state_space(x_THP, dt_TH, a_H, b_TGN, c_TGN, d_H, segments_T=None):
    """h_t = exp(dt A) h_{t-1} + dt B x^T; y_t = h_t^T C + D x. Returns y [T, H, P] and the last h [H, N, P]."""
    T, H, P = x_THP.shape
    G, N = b_TGN.shape[1:]
    h_HNP, y_THP = np.zeros((H, N, P)), np.zeros((T, H, P))
    for t in range(T):
        if segments_T is not None and t and segments_T[t] != segments_T[t - 1]:
            h_HNP[:] = 0
        for i in range(H):
            g = i // (H // G)
            h_HNP[i] = np.exp(dt_TH[t, i] * a_H[i]) * h_HNP[i] + dt_TH[t, i] * np.outer(b_TGN[t, g], x_THP[t, i])
            y_THP[t, i] = c_TGN[t, g] @ h_HNP[i] + d_H[i] * x_THP[t, i]
    return y_THP, h_HNP


def gated_norm(y, z, gain, groups, eps):
    """Gate, then RMSNorm over each of `groups` equal parts, then gain."""
    a = y * silu(z)
    parts = [part / np.sqrt(np.mean(part**2, -1, keepdims=True) + eps) for part in np.split(a, groups, axis=-1)]
    return np.concatenate(parts, -1) * gain


def mamba2(params, u_TD, *, groups, segments_T=None, dt_limits=None, eps=1e-5):
    """A whole row through the layer's own parameters (a pure dict); x and B may have fewer heads than C."""
    p = {name: np.asarray(value, np.float64) for name, value in _flat(params).items()}
    T = len(u_TD)
    parts = {}
    for name in ("x", "B", "C"):
        kernel = p[f"{name}/kernel"]
        pre = np.einsum("td,dhn->thn", u_TD, kernel).reshape(T, -1)
        taps = p[f"{name}_conv/kernel"].reshape(len(p[f"{name}_conv/kernel"]), -1)
        post = silu(convolution(pre, taps, p[f"{name}_conv/bias"].reshape(-1), segments_T))
        parts[name] = post.reshape(T, *kernel.shape[1:])
    H = len(p["D"])
    x_THP = np.repeat(parts["x"], H // parts["x"].shape[1], 1)
    b_THN = np.repeat(parts["B"], H // parts["B"].shape[1], 1)
    c_THN = np.repeat(parts["C"], H // parts["C"].shape[1], 1)
    dt_TH = np.log1p(np.exp(u_TD @ p["dt/kernel"] + p["dt_bias"]))
    if dt_limits is not None:
        dt_TH = np.clip(dt_TH, *dt_limits)
    y_THP, _ = state_space(x_THP, dt_TH, -np.exp(p["A_log"]), b_THN, c_THN, p["D"], segments_T)
    z_TF = np.einsum("td,dhp->thp", u_TD, p["z/kernel"]).reshape(T, -1)
    y_TF = gated_norm(y_THP.reshape(T, -1), z_TF, p["norm/gain"], groups, eps)
    return y_TF @ p["out/kernel"].reshape(-1, u_TD.shape[1])


def _flat(tree, prefix=""):
    if not isinstance(tree, dict):
        return {prefix: tree}
    out = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}/{key}" if prefix else key)
    return out
