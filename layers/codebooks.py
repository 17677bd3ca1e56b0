"""Quantizers with a codebook: VQ by gradient, VQ by running means, IBQ, and residual quantization in several books.

Interface: see `quantizers.py`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from layers import axes
from layers.quantizers import Quantized, straight_through, unit

SMOOTHING = 1e-5  # of the counts, so that an unused code has a mean


def nearest(z: jax.Array, codes_KD: jax.Array) -> jax.Array:
    """int32 index of the code with the least squared distance to each vector of z [..., d]."""
    return jnp.argmax(_products(z, codes_KD) - 0.5 * jnp.sum(jnp.square(codes_KD), -1), -1).astype(jnp.int32)


def _products(z: jax.Array, codes_KD: jax.Array) -> jax.Array:
    """z . e for every code, exact in float32 also where matrix products are not by default."""
    return jnp.einsum("...d,kd->...k", z, codes_KD, precision=jax.lax.Precision.HIGHEST)


def look_up(codes_KD: jax.Array, ids: jax.Array) -> jax.Array:
    """The codes of ids; NaN for an id outside the codebook."""
    return jnp.take(codes_KD, jnp.where(ids < 0, codes_KD.shape[0], ids), axis=0, mode="fill", fill_value=jnp.nan)


def _square(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(a - b))


def _check(owner: str, size: int, dim: int, beta: float) -> None:
    if size < 2:
        raise ValueError(f"{owner}.size={size} must be at least 2 codes")
    if dim < 1:
        raise ValueError(f"{owner}.dim={dim} must be at least 1")
    if beta < 0:
        raise ValueError(f"{owner}.beta={beta} must not be negative; 0.25 is usual")


class VQ(nnx.Module):
    """Vector quantization with a learned codebook (VQ-VAE, arXiv 1711.00937): the baseline, which collapses easily.

    z: [..., d]; zq = the nearest code. loss = mean (sg(z) - e)^2 + beta mean (z - sg(e))^2 (beta on the encoder's
    term).

    Knobs: size K >= 2 codes; dim d >= 1; beta >= 0; l2_norm: compare z and codes on the unit sphere (then dim 8 is
    usual); std > 0 of the initial codes.
    """

    books = 1

    def __init__(
        self,
        *,
        size: int,
        dim: int,
        beta: float = 0.25,
        l2_norm: bool = False,
        std: float = 1.0,
        rngs: nnx.Rngs,
    ):
        _check("VQ", size, dim, beta)
        if std <= 0:
            raise ValueError(f"VQ.std={std} must be positive: about the spread of the vectors")
        self.vocab_size, self.dim, self.beta, self.l2_norm = size, dim, beta, l2_norm
        self.codebook = axes.param(rngs, (size, dim), ("vocab", "code"), axes.normal(std))

    def _codes(self) -> jax.Array:
        codes_KD = self.codebook[...].astype(jnp.float32)
        return unit(codes_KD) if self.l2_norm else codes_KD

    def __call__(self, z: jax.Array, key: jax.Array | None = None) -> Quantized:
        codes_KD, z32 = self._codes(), z.astype(jnp.float32)
        z32 = unit(z32) if self.l2_norm else z32
        ids = jax.lax.stop_gradient(nearest(z32, codes_KD))
        e = jnp.take(codes_KD, ids, axis=0)
        fixed = jax.lax.stop_gradient
        loss = _square(fixed(z32), e) + self.beta * _square(z32, fixed(e))
        return straight_through(z32, e).astype(z.dtype), ids, {"loss": loss}

    def ids_to_codes(self, ids: jax.Array) -> jax.Array:
        return look_up(self._codes(), ids)


@dataclasses.dataclass(frozen=True)
class RunningMeans:
    """The rule of an EMA codebook. Value and statistic: [K, 2d + 2], in columns

        value      sums w (d) | count n | unused (d)                      | updates so far
        statistic  sums (d)   | count   | a vector of the batch, or junk  | 1 where it is a vector

    n and w decay towards the batch's counts and sums. The first update, and each `restart_every`-th one up to
    `restart_until`, gives codes with n < threshold (mean count) distinct vectors of the batch: n = 1, w = vector.
    """

    dim: int
    decay: float
    restart_every: int
    restart_until: int | None
    threshold: float

    def __call__(self, value: jax.Array, statistic: jax.Array) -> jax.Array:
        d, keep = self.dim, self.decay
        updates, count = value[..., -1], statistic[..., d]
        running = keep * value[..., : d + 1] + (1 - keep) * statistic[..., : d + 1]
        dead = updates == 0
        if self.restart_every:
            due = (updates > 0) & (updates % self.restart_every == 0)
            if self.restart_until is not None:
                due = due & (updates <= self.restart_until)
            dead = dead | due & (running[..., d] < self.threshold * jnp.mean(count, -1, keepdims=True))
        # The i-th dead code takes the i-th vector of the batch, so no two take the same one.
        rank = jnp.maximum(jnp.cumsum(dead, -1) - 1, 0)[..., None]
        candidates = jnp.take_along_axis(statistic[..., d + 1 :], rank, axis=-2)
        fresh = jnp.concatenate([candidates[..., :d], jnp.ones_like(running[..., :1])], -1)
        running = jnp.where((dead & (candidates[..., d] > 0.5))[..., None], fresh, running)
        return jnp.concatenate([running, value[..., d + 1 : -1], updates[..., None] + 1], -1)


class VQEMA(nnx.Module):
    """Vector quantization whose codes are running means of the vectors they stand for (arXiv 1711.00937, appendix A.1),
    with restarts of codes that nobody uses (arXiv 2005.00341, 2210.13438).

    z: [..., d]; zq = the nearest code e = w / n. n <- decay n + (1 - decay) count, w likewise with the sum of vectors;
    the counts are smoothed by 1e-5. loss = beta mean (z - sg(e))^2: no gradient reaches the codebook. The codes of a
    step are those before its update; the first batch initialises them, and evaluation changes nothing.

    Knobs: size K >= 2; dim d >= 1; beta >= 0; decay in (0, 1); restart_every >= 0 updates, 0 for never; threshold in
    [0, 1): a code used less than this share of the mean restarts; restart_until: the last update that may restart (80 %
    of the run: later ones leave codes that have not converged), None for no end.
    Counts are of a micro-batch; with several micro-batches restarted codes are means of vectors, so use one.
    """

    books = 1

    def __init__(
        self,
        *,
        size: int,
        dim: int,
        beta: float = 0.25,
        decay: float = 0.99,
        restart_every: int = 100,
        restart_until: int | None = None,
        threshold: float = 0.2,
        rngs: nnx.Rngs,
    ):
        _check("VQEMA", size, dim, beta)
        if not 0 < decay < 1:
            raise ValueError(f"VQEMA.decay={decay} must lie between 0 and 1, such as 0.99")
        if restart_every < 0 or not 0 <= threshold < 1:
            raise ValueError(
                f"VQEMA.restart_every={restart_every} must not be negative and threshold={threshold} lie in [0, 1)"
            )
        self.vocab_size, self.dim, self.beta = size, dim, beta
        rule = RunningMeans(dim, decay, restart_every, restart_until, threshold)
        sums = jax.random.normal(rngs.params(), (size, dim))
        start = jnp.concatenate([sums, jnp.ones((size, 1)), jnp.zeros((size, dim + 1))], -1)
        self.state = axes.buffer(start, ("vocab", "code"), rule)

    def codes(self) -> jax.Array:
        """The codebook [K, d]."""
        state = jax.lax.stop_gradient(self.state[...].astype(jnp.float32))
        n = state[:, self.dim]
        smoothed = (n + SMOOTHING) / (jnp.sum(n) + self.vocab_size * SMOOTHING) * jnp.sum(n)
        return state[:, : self.dim] / smoothed[:, None]

    def observe(self, y: jax.Array, z_ND: jax.Array, ids_N: jax.Array, key: jax.Array) -> jax.Array:
        """y itself; on the way the vectors and their codes go to the running means."""
        z_ND = jax.lax.stop_gradient(z_ND)
        N, K = z_ND.shape[0], self.vocab_size
        ones = jnp.ones((N, 1))
        sums = jax.ops.segment_sum(jnp.concatenate([z_ND, ones], 1), ids_N, num_segments=K)
        chosen = jnp.concatenate([z_ND, ones], 1)[jax.random.permutation(key, N)[:K]]
        chosen = jnp.pad(chosen, ((0, K - chosen.shape[0]), (0, 0)))
        return axes.measure(y, self.state[...], jnp.concatenate([sums, chosen], 1))

    def __call__(self, z: jax.Array, key: jax.Array | None = None) -> Quantized:
        codes_KD, z32 = self.codes(), z.astype(jnp.float32)
        ids = nearest(z32, codes_KD)
        e = jnp.take(codes_KD, ids, axis=0)
        zq = straight_through(z32, e)
        if key is not None:
            zq = self.observe(zq, z32.reshape(-1, self.dim), ids.reshape(-1), key)
        return zq.astype(z.dtype), ids, {"loss": self.beta * _square(z32, e)}

    def ids_to_codes(self, ids: jax.Array) -> jax.Array:
        return look_up(self.codes(), ids)


class IBQ(nnx.Module):
    """Index backpropagation quantization (arXiv 2412.02692): the soft assignment carries gradient to every code.

    z: [..., d]; s = softmax(z E^T), h = one-hot of its largest; zq = (h + s - sg(s)) E. loss = mean (zq - z)^2 + mean
    (sg(hE) - z)^2 + beta mean (hE - sg(z))^2 + entropy_weight (E[H(p)] - H(E[p])), p at `temperature`. Costs
    [vectors, K] of memory.

    Knobs: size K >= 2; dim d >= 1; beta >= 0; entropy_weight >= 0; temperature > 0 of the entropies; std > 0 of the
    initial codes, None for 1 / sqrt(d).
    """

    books = 1

    def __init__(
        self,
        *,
        size: int,
        dim: int = 256,
        beta: float = 0.25,
        entropy_weight: float = 0.05,
        temperature: float = 0.01,
        std: float | None = None,
        rngs: nnx.Rngs,
    ):
        _check("IBQ", size, dim, beta)
        if entropy_weight < 0 or temperature <= 0:
            raise ValueError(
                f"IBQ.entropy_weight={entropy_weight} must not be negative and temperature={temperature} be positive"
            )
        if std is not None and std <= 0:
            raise ValueError(f"IBQ.std={std} must be positive, or None for 1 / sqrt(dim)")
        self.vocab_size, self.dim, self.beta = size, dim, beta
        self.entropy_weight, self.temperature = entropy_weight, temperature
        init = axes.normal(dim**-0.5 if std is None else std)
        self.codebook = axes.param(rngs, (size, dim), ("vocab", "code"), init)

    def __call__(self, z: jax.Array, key: jax.Array | None = None) -> Quantized:
        codes_KD, z32 = self.codebook[...].astype(jnp.float32), z.astype(jnp.float32)
        fixed = jax.lax.stop_gradient
        logits = _products(z32, codes_KD)
        ids = jnp.argmax(logits, -1).astype(jnp.int32)
        e, soft = jnp.take(codes_KD, ids, axis=0), jax.nn.softmax(logits)
        # s - sg(s) is exactly 0: the forward pass is the code itself, the backward pass the soft assignment's.
        zq = e + (soft - fixed(soft)) @ fixed(codes_KD)
        log_p = jax.nn.log_softmax(logits / self.temperature)
        p = jnp.exp(log_p)
        mean = jnp.mean(p.reshape(-1, self.vocab_size), 0)
        sample = -jnp.mean(jnp.sum(p * log_p, -1))
        spread = -jnp.sum(mean * jnp.log(jnp.maximum(mean, 1e-9)))
        loss = _square(zq, z32) + _square(fixed(e), z32) + self.beta * _square(e, fixed(z32))
        return zq.astype(z.dtype), ids, {"loss": loss + self.entropy_weight * (sample - spread)}

    def ids_to_codes(self, ids: jax.Array) -> jax.Array:
        return look_up(self.codebook[...].astype(jnp.float32), ids)


class RVQ(nnx.Module):
    """Residual vector quantization (SoundStream, arXiv 2107.03312; EnCodec, 2210.13438): each book codes what the books
    before it left over.

    z: [..., d] -> ids [..., M]; zq = the sum of the books' codes. Each book is a VQEMA on its own residual; the loss is
    the sum of their commitments.

    Knobs: books M >= 1; book: factory of VQEMA, which sets size, dim, decay and restarts; dropout in [0, 1]: the
    probability that a training sample (first axis) uses only its first m books, m uniform in [min_books, M].
    """

    def __init__(self, *, books: int, book: Callable = VQEMA, dropout: float = 0.0, min_books: int = 1, rngs: nnx.Rngs):
        if books < 1 or not 1 <= min_books <= books:
            raise ValueError(f"RVQ.books={books} must be at least 1 and min_books={min_books} between 1 and it")
        if not 0 <= dropout <= 1:
            raise ValueError(f"RVQ.dropout={dropout} must lie between 0 and 1")
        self.books, self.dropout, self.min_books = books, dropout, min_books
        self.book = nnx.List([book(rngs=rngs) for _ in range(books)])
        self.dim, self.vocab_size = self.book[0].dim, self.book[0].vocab_size

    def __call__(self, z: jax.Array, key: jax.Array | None = None) -> Quantized:
        z32 = z.astype(jnp.float32)
        used = self._used(z32, key)
        residual, total, loss, ids = jax.lax.stop_gradient(z32), jnp.zeros_like(z32), 0.0, []
        y = z32
        for number, book in enumerate(self.book):
            codes_KD = book.codes()
            ids.append(nearest(residual, codes_KD))
            e = jnp.take(codes_KD, ids[-1], axis=0)
            # z minus the codes so far is the residual, with z's gradient.
            loss = loss + book.beta * jnp.mean(jnp.square(z32 - total - e) * (number < used))
            if key is not None:
                flat = residual.reshape(-1, self.dim)
                y = book.observe(y, flat, ids[-1].reshape(-1), jax.random.fold_in(key, number))
            # A book learns what the books before it leave over, whichever of them the sample's output uses.
            total, residual = total + e * (number < used), residual - e
        return straight_through(y, total).astype(z.dtype), jnp.stack(ids, -1), {"loss": loss}

    def _used(self, z: jax.Array, key: jax.Array | None) -> jax.Array:
        """How many books each sample uses, [B, 1, ...]."""
        shape = (z.shape[0], *[1] * (z.ndim - 1))
        if key is None or self.dropout == 0:
            return jnp.full(shape, self.books)
        drop_key, count_key = jax.random.split(jax.random.fold_in(key, self.books))
        count = jax.random.randint(count_key, shape, self.min_books, self.books + 1)
        return jnp.where(jax.random.uniform(drop_key, shape) < self.dropout, count, self.books)

    def ids_to_codes(self, ids: jax.Array) -> jax.Array:
        return sum(book.ids_to_codes(ids[..., number]) for number, book in enumerate(self.book))
