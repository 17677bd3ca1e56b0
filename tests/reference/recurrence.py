"""The linear recurrences, token by token, as the papers write them."""

import numpy as np


def recurrence(q, k, v, *, log_decay=None, beta=None, initial=None, segments=None, real=None):
    """float64 twin of layers.recurrence.recurrence: S = decay (I - beta k k^T) S + beta k v^T, or decay S + k v^T."""
    B, T, H, K = v.shape
    N = k.shape[-1]
    q, k = (np.repeat(np.asarray(z, np.float64), H // z.shape[2], 2) for z in (q, k))
    decay = np.zeros(H) if log_decay is None else np.asarray(log_decay, np.float64)
    decay = np.exp(np.broadcast_to(decay if decay.ndim == 4 else decay[..., None], (B, T, H, N)))
    y = np.zeros((B, T, H, K))
    S = np.zeros((B, H, N, K)) if initial is None else np.array(initial, np.float64)
    for b in range(B):
        document = 0
        for t in range(T):
            if segments is not None and segments[b, t] != 0:
                if document not in (0, segments[b, t]):
                    S[b] = 0
                document = segments[b, t]
            skip = (segments is not None and segments[b, t] == 0) or (real is not None and not real[b, t])
            for h in range(H):
                if not skip:
                    old = decay[b, t, h][:, None] * S[b, h]
                    if beta is None:
                        S[b, h] = old + np.outer(k[b, t, h], v[b, t, h])
                    else:
                        S[b, h] = old + beta[b, t, h] * np.outer(k[b, t, h], v[b, t, h] - k[b, t, h] @ old)
                y[b, t, h] = q[b, t, h] @ S[b, h]
    return y, S
