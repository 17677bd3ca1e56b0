"""The linear recurrences, token by token, as the papers write them."""

import jax
import jax.numpy as jnp
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


def differentiable(q, k, v, *, log_decay=None, beta=None, initial=None):
    """The same by jax, token by token in the dtype of its inputs, for gradients; (y, last state)."""
    B, T, H = v.shape[:3]
    N = k.shape[-1]
    q, k = (jnp.repeat(z, H // z.shape[2], 2) for z in (q, k))
    decay = jnp.zeros(H) if log_decay is None else log_decay
    decay = jnp.exp(jnp.broadcast_to(decay if decay.ndim == 4 else decay[..., None], (B, T, H, N)))
    beta = None if beta is None else jnp.moveaxis(beta, 1, 0)

    def token(S, x):
        q, k, v, decay, beta = x
        S = decay[..., None] * S
        if beta is not None:
            v = beta[..., None] * (v - jnp.einsum("bhn,bhnk->bhk", k, S))
        S = S + k[..., None] * v[..., None, :]
        return S, jnp.einsum("bhn,bhnk->bhk", q, S)

    xs = (*(jnp.moveaxis(z, 1, 0) for z in (q, k, v, decay)), beta)
    S, y = jax.lax.scan(token, initial, xs)
    return jnp.moveaxis(y, 0, 1), S
