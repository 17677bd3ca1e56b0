"""Eight-bit products by numpy and ml_dtypes, in the order of the formulas."""

import ml_dtypes
import numpy as np

E4M3, E5M2, INT8 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.int8
LARGEST = {E4M3: 448.0, E5M2: 57344.0, INT8: 127.0}


def quantize(x, dtype, axis=None):
    """(q, s): s = amax / largest and q = cast(clip(x / s)), as float32; over `axis`, None for one scale."""
    limit = np.float32(LARGEST[dtype])
    s = np.abs(x).max(axis, keepdims=axis is not None).astype(np.float32) * np.float32(1 / limit)
    scaled = np.clip(x.astype(np.float32) / np.where(s > 0, s, 1), -limit, limit)
    rounded = np.rint(scaled) if dtype is INT8 else scaled
    return rounded.astype(dtype).astype(np.float32), s


def product(x, w, dtype, *, rows):
    """x w with both quantized: along what is summed over where `rows`."""
    (qx, sx), (qw, sw) = quantize(x, dtype, 1 if rows else None), quantize(w, dtype, 0 if rows else None)
    return (qx.astype(np.float64) @ qw.astype(np.float64)) * sx * sw


def gradients(x, w, g, forward, backward, *, rows):
    """(dx, dw) of `product` for the gradient g of the result; backward None leaves g alone."""
    if backward is None:
        (qx, sx), (qw, sw) = quantize(x, forward, 1 if rows else None), quantize(w, forward, 0 if rows else None)
        return g @ (qw * sw).T, (qx * sx).T @ g
    (qg, sg), (qw, sw) = quantize(g, backward, 1 if rows else None), quantize(w, forward, 1 if rows else None)
    dx = (qg.astype(np.float64) @ qw.T.astype(np.float64)) * sg * sw.T
    (qx, sx), (qg, sg) = quantize(x, forward, 0 if rows else None), quantize(g, backward, 0 if rows else None)
    return dx, (qx.T.astype(np.float64) @ qg.astype(np.float64)) * sx.T * sg
