"""Weight quantizers against closed cases and naive twins."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from maxlike.errors import UserError
from maxlike.quantize.gptq import GPTQ
from maxlike.quantize.grid import Grid
from maxlike.quantize.nf4 import BOOKS, NF4
from maxlike.quantize.rtn import RTN
from tests.reference import quantize as naive

I, O = 48, 12
GRIDS = {bits: Grid(bits=bits, search=False) for bits in (2, 3, 4)}  # the same object compiles once


@pytest.fixture(scope="module")
def matrices():
    """(weight [I, O], a correlated Hessian)."""
    random = np.random.default_rng(3)
    x = random.normal(size=(300, I)) @ random.normal(size=(I, I))
    return random.normal(size=(I, O)).astype(np.float32), (2 / len(x) * x.T @ x).astype(np.float32)


def output_error(w, q, h):
    """tr((W - Q)^T H (W - Q))."""
    d = np.asarray(w, np.float64) - np.asarray(q.weight_IO, np.float64)
    return float(np.sum(d * (h.astype(np.float64) @ d)))


def test_closed_cases():
    w = jnp.array([[0.8], [0.1], [0.35], [-0.7]])
    plain = RTN(Grid(bits=4, search=False))(w)  # scale 0.8 / 7
    assert plain.codes_IO.ravel().tolist() == [7, 1, 3, -6]
    np.testing.assert_allclose(plain.weight_IO, plain.codes_IO * (0.8 / 7), rtol=1e-6)
    half = RTN(Grid(bits=2, levels="half_step", search=False))(w)  # steps of 1.6 / 3, zero at 2
    assert half.codes_IO.ravel().tolist() == [3, 2, 3, 1] and half.zeros_GO.tolist() == [[2]]
    shifted = RTN(Grid(bits=2, levels="asymmetric", search=False))(w)  # steps of 0.5 over [-0.7, 0.8], zero at 1
    assert shifted.codes_IO.ravel().tolist() == [3, 1, 2, 0] and shifted.zeros_GO.tolist() == [[1]]


def test_ties_go_to_the_even_code():
    w = jnp.array([[0.5], [1.5], [2.5], [7.0]])  # scale 1
    assert RTN(Grid(bits=4, search=False))(w).codes_IO.ravel().tolist() == [0, 2, 2, 7]


@pytest.mark.parametrize("levels", ["symmetric", "asymmetric", "half_step"])
def test_zeros_stay_zero(levels):
    w = jnp.zeros((8, 2)).at[4:, 0].set(jnp.array([1.0, 0.0, -0.3, 0.2]))
    q = RTN(Grid(bits=3, levels=levels, group=4, search=False))(w).weight_IO
    assert not np.any(q[:4]) and not np.any(q[:, 1]) and q[5, 0] == 0 and q[4, 0] != 0


def test_rounding_to_nearest_is_the_naive_twin_with_and_without_its_search(matrices):
    w, _ = matrices
    for group, search in ((None, True), (16, False)):
        made = RTN(Grid(bits=3, group=group, search=search))(w)
        shares = [1 - i / 100 for i in range(80)] if search else [1.0]
        for o in range(4):
            columns = np.split(w[:, o].astype(np.float64), 1 if group is None else I // group)
            twin = np.concatenate([naive.symmetric(column, 3, shares)[0] for column in columns])
            np.testing.assert_allclose(made.weight_IO[:, o], twin, atol=1e-6)


def test_bits_a_weight_count_the_scales(matrices):
    assert RTN(Grid(bits=4, group=16, search=False))(matrices[0]).bits == 5
    assert RTN(Grid(bits=4, levels="asymmetric", group=16)).cost(I, O) == 6
    assert NF4().cost(I, O) == 4.5 and NF4(double=True).cost(I, O) == 4 + 8 / 64 + 32 / (64 * 256)


def test_gptq_is_obq_in_the_order_of_the_inputs(matrices):
    w, h = matrices
    grid = GRIDS[3]
    made = GPTQ(grid, block=16)(w, h)
    scales = np.asarray(RTN(grid)(w).scales_GO[0], np.float64)
    np.testing.assert_allclose(made.weight_IO.T, naive.obq(w.T, h, scales, 3), atol=1e-5)
    np.testing.assert_allclose(made.weight_IO, made.codes_IO * made.scales_GO, rtol=1e-6)
    whole = GPTQ(grid, block=48)(w, h)
    assert np.array_equal(whole.codes_IO, made.codes_IO)
    assert np.array_equal(GPTQ(grid, block=7)(w, h).codes_IO, made.codes_IO)  # 48 = 6 * 7 + 6


def test_scales_of_a_group_are_those_of_the_weight_as_it_stands_there(matrices):
    w, h = matrices
    made = GPTQ(Grid(bits=4, group=12, search=False))(w, h)
    np.testing.assert_allclose(made.weight_IO.T, naive.gptq_in_groups(w.T, h, 4, 12), atol=1e-5)
    across = GPTQ(Grid(bits=4, group=12, search=False), block=6)(w, h)
    assert np.array_equal(across.codes_IO, made.codes_IO)
    assert GPTQ(Grid(bits=4, group=192)).block == 96  # the largest part of a group that is no longer than 128


def test_without_correlation_gptq_rounds_to_nearest(matrices):
    w, _ = matrices
    grid = Grid(bits=3, group=16, search=False)
    diagonal = np.diag(np.linspace(1, 5, I)).astype(np.float32)
    for knobs in ({}, {"act_order": True, "static_groups": True}):
        made = GPTQ(grid, **knobs)(w, diagonal)
        assert np.array_equal(made.codes_IO, RTN(grid)(w).codes_IO), knobs


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_serves_the_outputs_better_than_rounding_to_nearest(matrices, bits):
    w, h = matrices
    grid = GRIDS[bits]
    plain = output_error(w, RTN(grid)(w), h)
    assert output_error(w, GPTQ(grid)(w, h), h) < 0.8 * plain


def test_inputs_that_never_occur_and_a_singular_hessian(matrices):
    w, h = matrices
    h = h.copy()
    h[5] = h[:, 5] = 0
    made = GPTQ(GRIDS[4])(w, h)
    assert not np.any(made.weight_IO[5]) and made.damp == 0.01 and np.all(np.isfinite(made.weight_IO))
    # Not positive definite by more than the first damping: it is raised, and said.
    bent = np.eye(I, dtype=np.float32)
    bent[0, 1] = bent[1, 0] = 1.05
    assert GPTQ(GRIDS[4])(w, bent).damp == pytest.approx(0.1)
    with pytest.raises(UserError, match="not positive definite"):
        GPTQ(GRIDS[4])(w, np.full((I, I), np.nan, np.float32))


def test_the_code_book_of_nf4_is_made_of_normal_quantiles():
    end = 0.9677083
    book = np.array([*norm.ppf(np.linspace(1 - end, 0.5, 8)[:-1]), 0, *norm.ppf(np.linspace(0.5, end, 9)[1:])])
    np.testing.assert_allclose(BOOKS["nf4"], book / book.max(), atol=2e-7)
    assert BOOKS["fp4"][:3] == (-1, -8 / 12, -0.5) and len(BOOKS["fp4"]) == 15


@pytest.mark.parametrize("book", ["nf4", "fp4"])
def test_nf4_is_nearest_idempotent_and_exact_at_zero(matrices, book):
    w = matrices[0].copy()
    w[7, 3] = 0
    quantizer = NF4(block=16, book=book)
    made = quantizer(w)
    assert np.array_equal(quantizer(made.weight_IO).weight_IO, made.weight_IO) and made.weight_IO[7, 3] == 0
    block = w[16:32, 5]  # blocks run along the inputs of an output
    top = np.max(np.abs(block))
    nearest = [min(BOOKS[book], key=lambda level: abs(level - x / top)) for x in block]
    np.testing.assert_allclose(made.weight_IO[16:32, 5], np.array(nearest) * top, atol=1e-6)
    assert not np.any(quantizer(np.zeros((16, 2), np.float32)).weight_IO)


def test_double_quantization_moves_scales_by_less_than_half_a_step(matrices):
    w, _ = matrices
    exact, held = NF4(block=16)(w), NF4(block=16, double=True)(w)
    spread = np.max(np.abs(exact.scales_GO - np.mean(exact.scales_GO)))
    assert 0 < np.max(np.abs(exact.scales_GO - held.scales_GO)) <= spread / 127 / 2 + 1e-6


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Grid(bits=5), "Grid.bits=5 must be one of"),
        (lambda: Grid(bits=4, levels="odd"), "Grid.levels='odd'"),
        (lambda: Grid(bits=4, group=0), "Grid.group=0"),
        (lambda: GPTQ(Grid(bits=4), damp=0), "GPTQ.damp=0"),
        (lambda: GPTQ(Grid(bits=4, group=8), act_order=True), "static_groups"),
        (lambda: GPTQ(Grid(bits=4), block=0), "GPTQ.block=0"),
        (lambda: RTN(Grid(bits=4, group=7))(np.ones((48, 2), np.float32)), "a group of 7 inputs does not divide"),
        (lambda: GPTQ(Grid(bits=4))(np.ones((4, 2), np.float32), np.eye(3, dtype=np.float32)), "a Hessian of shape"),
        (lambda: NF4(block=0), "NF4.block=0"),
        (lambda: NF4(block=64)(np.ones((5, 3), np.float32)), "a block of 64 weights does not divide"),
    ],
)
def test_refusals(make, sentence):
    with pytest.raises(UserError, match=sentence):
        make()
