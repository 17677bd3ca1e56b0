"""Codebooks: brute force, what gradients and statistics reach, running means, restarts, residuals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.axes import Buffer
from layers.codebooks import IBQ, RVQ, VQ, VQEMA, RunningMeans

KEY = jax.random.key(7)
F = functools.partial


def rngs():
    return nnx.Rngs(params=0)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def run(quantizer, z, key=None):
    """(zq, ids, aux, the codes of ids) as numpy arrays, in one program."""

    def both(z):
        zq, ids, aux = quantizer(z, key)
        return zq, ids, aux, quantizer.ids_to_codes(ids)

    return jax.tree.map(np.asarray, jax.jit(both)(z))


def gradients(quantizer, z, key=KEY, weight=1.0):
    """(d/dz, d/dparams, what is reported to buffers) of sum(zq w) + loss."""
    graph, params, buffers = nnx.split(quantizer, nnx.Param, Buffer)

    def loss(z, params, buffers):
        zq, _, aux = nnx.merge(graph, params, buffers)(z, key)
        return jnp.sum(weight * zq) + aux["loss"]

    dz, dparams, statistics = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(z, params, buffers)
    return dz, nnx.to_pure_dict(dparams), nnx.to_pure_dict(statistics)


def test_vq_takes_the_nearest_code():
    vq = VQ(size=9, dim=4, rngs=rngs())
    z = normal(7, 2, 5, 4)
    zq, ids, aux, chosen = run(vq, z)
    codes = np.asarray(vq.codebook[...])
    distances = np.sum((z[..., None, :] - codes) ** 2, -1)
    np.testing.assert_array_equal(ids, distances.argmin(-1))
    np.testing.assert_allclose(zq, chosen, atol=1e-6)
    np.testing.assert_allclose(aux["loss"], 1.25 * distances.min(-1).mean() / 4, rtol=1e-5)
    assert run(vq, codes)[2]["loss"] == 0
    normed = jax.jit(VQ(size=9, dim=4, l2_norm=True, rngs=rngs()).__call__)
    np.testing.assert_array_equal(normed(z)[1], normed(3 * z)[1])


def test_the_gradient_goes_straight_through():
    weight, z = normal(1, 6, 4), normal(7, 6, 4)
    plain = VQ(size=9, dim=4, beta=0.0, rngs=rngs())
    dz, dparams, _ = gradients(plain, z, weight=weight)
    np.testing.assert_allclose(dz, weight, rtol=1e-6)
    _, ids, _, e = run(plain, z)
    by_hand = np.zeros((9, 4), np.float32)
    np.add.at(by_hand, ids, 2 * (e - z) / z.size)
    np.testing.assert_allclose(dparams["codebook"], by_hand, rtol=1e-4, atol=1e-7)


def test_ema_reports_counts_sums_and_vectors_of_the_batch():
    ema = VQEMA(size=5, dim=3, rngs=rngs())
    z = normal(7, 2, 4, 3)
    _, ids, _, codes = run(ema, z, KEY)
    dz, dparams, statistics = gradients(ema, z)
    assert dparams == {}
    np.testing.assert_allclose(dz, 1 + 0.25 * 2 * (z - codes) / z.size, rtol=1e-5)
    seen, flat = np.asarray(statistics["state"]), z.reshape(-1, 3)
    one_hot = np.eye(5)[ids.ravel()]
    np.testing.assert_allclose(seen[:, :3], one_hot.T @ flat, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(seen[:, 3], one_hot.sum(0))
    candidates = seen[:, 4:7]
    assert (seen[:, 7] == 1).all() and len(np.unique(candidates, axis=0)) == 5
    assert all(any(np.array_equal(c, row) for row in flat) for c in candidates)
    few = gradients(ema, z[:1, :2])[2]["state"]  # fewer vectors than codes: the rest is marked as no vector
    np.testing.assert_array_equal(few[:, 7], [1, 1, 0, 0, 0])
    np.testing.assert_array_equal(run(ema, z)[1], ids)  # without a key: the same codes, nothing reported
    assert not np.any(gradients(ema, z, key=None)[2]["state"])


def _updated(rule, value, z, ids, candidates=None):
    K, d = value.shape[0], rule.dim
    one_hot = np.eye(K)[ids]
    vectors = np.zeros((K, d + 1)) if candidates is None else np.concatenate([candidates, np.ones((K, 1))], 1)
    statistic = np.concatenate([one_hot.T @ z, one_hot.sum(0)[:, None], vectors], 1)
    return np.asarray(jax.jit(rule)(np.asarray(value, np.float32), statistic.astype(np.float32)))


def test_running_means_converge():
    rule = RunningMeans(dim=2, decay=0.9, restart_every=0, restart_until=None, threshold=0.0)
    z, ids = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 5.0]]), np.array([0, 0, 1])
    value = np.tile(np.float32([0, 0, 1, 0, 0, 1]), (3, 1))
    for _ in range(20):
        value = _updated(rule, value, z, ids)
    left = 0.9**20
    np.testing.assert_allclose(value[:, 2], left + (1 - left) * np.array([2, 1, 0]), rtol=1e-5)
    np.testing.assert_allclose(value[0, :2] / (value[0, 2] - left), [2.0, 3.0], rtol=1e-4)
    assert (value[:, -1] == 21).all()
    stacked = jax.jit(rule)(np.stack([value, 2 * value]), np.zeros((2, 3, 6), np.float32))  # a stack's layers first
    np.testing.assert_allclose(stacked[0], jax.jit(rule)(value, np.zeros((3, 6), np.float32)))


def test_the_first_batch_and_restarts_take_distinct_vectors():
    rule = RunningMeans(dim=1, decay=0.9, restart_every=10, restart_until=25, threshold=0.5)
    candidates, z, ids = np.array([[7.0], [8.0], [9.0]]), np.ones((6, 1)), np.zeros(6, int)
    first = _updated(rule, np.tile([1.0, 1.0, 0.0, 0.0], (3, 1)), z, ids, candidates)
    np.testing.assert_array_equal(first[:, :2], [[7, 1], [8, 1], [9, 1]])

    def before(step):
        return np.array([[5.0, 5, 0, step], [1.0, 0.1, 0, step], [2.0, 0.1, 0, step]])

    np.testing.assert_allclose(_updated(rule, before(9), z, ids, candidates)[1:, 1], 0.09)  # not yet due
    due = _updated(rule, before(10), z, ids, candidates)
    np.testing.assert_allclose(due[0, :2], [5.1, 5.1], rtol=1e-6)  # in use: kept
    np.testing.assert_array_equal(due[1:, :2], [[7, 1], [8, 1]])
    np.testing.assert_allclose(_updated(rule, before(30), z, ids, candidates)[1:, 1], 0.09)  # too late
    none = _updated(rule, before(10), z, ids)  # the batch had no vector to give
    np.testing.assert_allclose(none[1:, 1], 0.09)


def test_ema_finds_the_means_of_three_clusters():
    centres = np.array([[4.0, 0.0], [-4.0, 1.0], [0.0, 5.0]])
    ema = VQEMA(size=3, dim=2, decay=0.8, restart_every=5, threshold=0.5, rngs=rngs())
    graph, buffers = nnx.split(ema, Buffer)
    state, rule = nnx.to_pure_dict(buffers), ema.state.get_metadata("rule")
    noise = np.random.default_rng(0)

    @jax.jit
    def step(state, z, key):
        def loss(state):
            return jnp.sum(nnx.merge(graph, state)(z, key)[0])

        return {"state": rule(state["state"], jax.grad(loss)(state)["state"])}

    for count in range(40):
        z = centres[noise.integers(0, 3, 300)] + 0.05 * noise.normal(size=(300, 2))
        state = step(state, jnp.asarray(z, jnp.float32), jax.random.key(count))
    codes = np.asarray(nnx.merge(graph, state).codes())
    np.testing.assert_allclose(codes[np.argsort(codes[:, 0])], centres[np.argsort(centres[:, 0])], atol=2e-2)


def test_ibq_gives_gradient_to_every_code():
    ibq = IBQ(size=6, dim=4, entropy_weight=0.0, beta=0.0, rngs=rngs())
    z, weight, E = normal(7, 3, 4), normal(3, 3, 4), np.asarray(ibq.codebook[...])
    zq, ids, _, codes = run(ibq, z)
    np.testing.assert_array_equal(zq, codes)
    np.testing.assert_array_equal(ids, np.argmax(z @ E.T, -1))

    def definition(z, E, fixed):  # (h + s - sg(s)) E
        s = jax.nn.softmax(z @ E.T)
        return jnp.sum(weight * ((jax.nn.one_hot(ids, 6) + s - fixed) @ E))

    graph, params = nnx.split(ibq, nnx.Param)
    ours = jax.jit(jax.grad(lambda z, p: jnp.sum(weight * nnx.merge(graph, p)(z)[0]), (0, 1)))(z, params)
    theirs = jax.jit(lambda z, E: jax.grad(definition, (0, 1))(z, E, jax.nn.softmax(z @ E.T)))(z, E)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(nnx.to_pure_dict(ours[1])["codebook"], theirs[1], rtol=1e-4, atol=1e-6)
    assert (np.abs(theirs[1]).sum(-1) > 0).all()


def test_one_residual_book_is_a_codebook():
    book = F(VQEMA, size=5, dim=3)
    one, alone = RVQ(books=1, book=book, rngs=rngs()), book(rngs=rngs())
    z = normal(7, 2, 4, 3)
    zq, ids, aux, _ = run(alone, z)
    for ours, theirs in zip(jax.tree.leaves(run(one, z)[:3]), jax.tree.leaves((zq, ids[..., None], aux))):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    for ours, theirs in zip(gradients(one, z)[0], gradients(alone, z)[0]):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_residual_books_code_what_is_left():
    rvq = RVQ(books=3, book=F(VQEMA, size=16, dim=2), rngs=rngs())
    z = normal(7, 4, 6, 2)
    zq, ids, aux, summed = run(rvq, z)
    residual, loss = z, 0.0
    for number, book in enumerate(rvq.book):
        codes = np.asarray(book.codes())
        chosen = np.argmin(np.sum((residual[..., None, :] - codes) ** 2, -1), -1)
        np.testing.assert_array_equal(ids[..., number], chosen)
        residual = residual - codes[chosen]
        loss += 0.25 * np.mean(residual**2)
    np.testing.assert_allclose(zq, z - residual, atol=1e-5)
    np.testing.assert_allclose(summed, zq, atol=1e-5)
    np.testing.assert_allclose(aux["loss"], loss, rtol=1e-5)
    statistics = gradients(rvq, z)[2]
    counts = [np.asarray(leaf)[:, 2].sum() for leaf in jax.tree.leaves(statistics)]
    assert counts == [24, 24, 24]


def test_dropped_books_are_left_out_by_sample():
    rvq = RVQ(books=3, book=F(VQEMA, size=8, dim=2), dropout=1.0, min_books=2, rngs=rngs())
    zq, ids, _, _ = run(rvq, normal(7, 32, 3, 2), KEY)
    parts = np.stack([np.asarray(book.codes())[ids[..., m]] for m, book in enumerate(rvq.book)])
    two, three = parts[:2].sum(0), parts.sum(0)
    is_two = np.isclose(zq, two, atol=1e-5).all((1, 2))
    is_three = np.isclose(zq, three, atol=1e-5).all((1, 2))
    assert (is_two | is_three).all() and is_two.any() and is_three.any()


def test_dropout_changes_no_codebook():
    """What a book stands for is what the books before it leave over, also for samples that go without it."""
    z = normal(7, 16, 3, 2)
    make = F(RVQ, books=3, book=F(VQEMA, size=8, dim=2))
    whole, dropped = make(rngs=rngs()), make(dropout=1.0, min_books=1, rngs=rngs())
    np.testing.assert_array_equal(run(dropped, z, KEY)[1], run(whole, z, KEY)[1])
    for ours, theirs in zip(*(jax.tree.leaves(gradients(rvq, z)[2]) for rvq in (dropped, whole)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (F(VQ, size=1, dim=2), "size"),
        (F(VQ, size=4, dim=2, beta=-0.1), "beta"),
        (F(VQ, size=4, dim=2, std=0.0), "std"),
        (F(VQEMA, size=4, dim=0), "dim"),
        (F(VQEMA, size=4, dim=2, decay=1.0), "decay"),
        (F(VQEMA, size=4, dim=2, threshold=1.0), "threshold"),
        (F(IBQ, size=4, dim=2, temperature=0.0), "temperature"),
        (F(RVQ, books=2, min_books=3, book=F(VQEMA, size=4, dim=2)), "min_books"),
        (F(RVQ, books=2, dropout=1.5, book=F(VQEMA, size=4, dim=2)), "dropout"),
    ],
)
def test_refuses(make, word):
    with pytest.raises(ValueError, match=word):
        make(rngs=rngs())


def test_the_published_library_chooses_the_same_residual_codes():
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("vector_quantize_pytorch")
    theirs = library.ResidualVQ(dim=4, num_quantizers=3, codebook_size=16)
    theirs.eval()
    rvq = RVQ(books=3, book=F(VQEMA, size=16, dim=4), rngs=rngs())
    for book, layer in zip(rvq.book, theirs.layers):
        layer._codebook.embed.data.copy_(torch.tensor(np.asarray(book.codes()))[None])
        layer._codebook.initted.fill_(True)
    z = np.random.default_rng(0).normal(size=(2, 50, 4)).astype(np.float32)
    out, ids, _ = theirs(torch.tensor(z))
    zq, codes, _, _ = run(rvq, z)
    np.testing.assert_array_equal(codes, ids.numpy())
    np.testing.assert_allclose(zq, out.detach().numpy(), atol=1e-5)
