"""Filters against `transformers`' own, draws against their distribution, and independence of the batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from maxlike.decode.sampling import Sampling, SamplingRows, draw, penalise, rank
from maxlike.errors import UserError

VOCAB = 40
RANK, DRAW, PENALISE = jax.jit(rank), jax.jit(draw), jax.jit(penalise)


def probabilities(logits_BV, requests) -> np.ndarray:
    """The sampling distribution [B, V] in the order of token ids."""
    ranked_BV, order_BV = (np.asarray(x) for x in RANK(logits_BV, SamplingRows.of(requests)))
    out = np.zeros_like(ranked_BV)
    np.put_along_axis(out, order_BV, np.exp(ranked_BV), 1)
    return out


def random_logits(rows: int, ties: bool, seed: int = 0) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(0, 2, (rows, VOCAB)).astype(np.float32)
    return np.round(logits) if ties else logits  # rounded: about ten distinct values in a row


FILTERS = {
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 5},
    "top_k_more_than_all": {"top_k": 1000},
    "top_p": {"top_p": 0.8},
    "top_p_tiny": {"top_p": 1e-6},
    "min_p": {"min_p": 0.1},
    "all": {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    "none": {},
}


@pytest.mark.parametrize("ties", [False, True])
def test_filters_are_those_of_transformers(ties):
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = np.repeat(random_logits(3, ties), len(FILTERS), 0)
    requests = [Sampling(**knobs) for knobs in FILTERS.values()] * 3
    ours = probabilities(logits, requests)
    for row, request in enumerate(requests):
        warpers = [process.TemperatureLogitsWarper(request.temperature)]
        if request.top_k:
            warpers.append(process.TopKLogitsWarper(request.top_k))
        if request.top_p < 1:
            warpers.append(process.TopPLogitsWarper(request.top_p))
        if request.min_p:
            warpers.append(process.MinPLogitsWarper(request.min_p))
        scores = torch.from_numpy(logits[row : row + 1])
        for warper in warpers:
            scores = warper(None, scores)
        theirs = torch.softmax(scores, -1).numpy()[0]
        # Of equal logits at the edge of top-p only some stay, and which ones is a matter of the sort.
        if ties:
            np.testing.assert_allclose(np.sort(ours[row]), np.sort(theirs), atol=1e-6)
        else:
            np.testing.assert_array_equal(ours[row] > 0, theirs > 0)
            np.testing.assert_allclose(ours[row], theirs, atol=1e-6)


def test_ties_stay_in_top_k_and_the_lower_id_goes_first_in_top_p():
    logits = np.zeros((2, VOCAB), np.float32)
    ours = probabilities(logits, [Sampling(top_k=3), Sampling(top_p=0.5)])
    assert (ours[0] > 0).all()
    assert list(np.flatnonzero(ours[1])) == list(range(VOCAB // 2))


def test_repetition_penalty_is_that_of_transformers():
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = random_logits(4, ties=False)
    ids = np.random.default_rng(1).integers(0, VOCAB, (4, 12))
    prompt_BV, counts_BV = np.zeros((4, VOCAB), bool), np.zeros((4, VOCAB), np.int32)
    np.put_along_axis(prompt_BV, ids[:, :6], True, 1)
    for row in range(4):
        np.add.at(counts_BV[row], ids[row, 6:], 1)
    ours = PENALISE(logits, prompt_BV, counts_BV, SamplingRows.of([Sampling(repetition_penalty=1.3)] * 4))
    theirs = process.RepetitionPenaltyLogitsProcessor(1.3)(torch.from_numpy(ids), torch.from_numpy(logits))
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)


def test_presence_and_frequency_penalties_count_only_what_was_generated():
    counts_BV = np.array([[0, 1, 3]], np.int32)
    rows = SamplingRows.of([Sampling(presence_penalty=0.5, frequency_penalty=0.25)])
    got = PENALISE(np.ones((1, 3), np.float32), np.array([[True, False, False]]), counts_BV, rows)
    np.testing.assert_allclose(got, [[1.0, 1 - 0.5 - 0.25, 1 - 0.5 - 0.75]])


def test_padding_of_the_vocabulary_is_never_drawn():
    logits = np.full((64, VOCAB), -np.inf, np.float32)
    logits[:, :3] = 0.0
    rows = SamplingRows.of([Sampling(seed=i, temperature=5.0) for i in range(64)])
    token_B, logprob_B = DRAW(logits, rows, np.zeros(64, np.int32), jax.random.key(0))
    assert set(np.asarray(token_B)) == {0, 1, 2}
    np.testing.assert_allclose(logprob_B, np.log(1 / 3), atol=1e-6)


def test_draws_follow_the_distribution():
    V, rows, positions = 20, 1000, 100
    logits = np.random.default_rng(2).normal(0, 1.5, V).astype(np.float32)
    request = Sampling(temperature=0.9, top_k=15, top_p=0.97)
    params = SamplingRows.of([dataclasses.replace(request, seed=i) for i in range(rows)])

    @jax.jit
    def many(key):
        logits_BV = jnp.broadcast_to(logits, (rows, V))
        return jax.lax.map(lambda position: draw(logits_BV, params, jnp.full(rows, position), key)[0], jnp.arange(100))

    drawn = np.bincount(np.asarray(many(jax.random.key(3))).ravel(), minlength=V)
    expected = probabilities(logits[None], [request])[0] * rows * positions
    assert (drawn[expected == 0] == 0).all() and (expected == 0).sum() >= 5
    drawn, expected = drawn[expected > 0], expected[expected > 0]
    chi_square = np.sum((drawn - expected) ** 2 / expected)
    assert scipy.special.gammaincc((len(drawn) - 1) / 2, chi_square / 2) > 0.001


def test_a_row_does_not_depend_on_its_batch():
    logits = random_logits(8, ties=False)
    requests = [Sampling(temperature=0.5 + i / 4, top_k=3 * i, top_p=1 - i / 20, seed=100 + i) for i in range(8)]
    positions = np.arange(8, dtype=np.int32) * 5
    key = jax.random.key(7)
    token_B, logprob_B = DRAW(logits, SamplingRows.of(requests), positions, key)
    back_B, _ = DRAW(logits[::-1], SamplingRows.of(requests[::-1]), positions[::-1], key)
    np.testing.assert_array_equal(token_B, back_B[::-1])
    for row in (0, 5):
        alone = DRAW(logits[row : row + 1], SamplingRows.of([requests[row]]), positions[row : row + 1], key)
        assert alone[0][0] == token_B[row]
        np.testing.assert_allclose(alone[1][0], logprob_B[row], rtol=1e-5)
    again_B, _ = DRAW(logits, SamplingRows.of(requests), positions, jax.random.key(8))
    assert (np.asarray(token_B) != np.asarray(again_B)).any()


def test_temperature_zero_is_greedy_beside_rows_that_sample():
    logits = random_logits(4, ties=True)
    mixed = [Sampling(temperature=0.0), Sampling(temperature=2.0), Sampling(temperature=0.0, top_k=2), Sampling()]
    token_B, logprob_B = DRAW(logits, SamplingRows.of(mixed), np.zeros(4, np.int32), jax.random.key(0))
    cold_B, _ = DRAW(logits, SamplingRows.of([mixed[0]] * 4), np.zeros(4, np.int32), jax.random.key(0))
    np.testing.assert_array_equal(cold_B, logits.argmax(-1))
    assert token_B[0] == cold_B[0] and token_B[2] == cold_B[2]
    assert logprob_B[0] == logprob_B[2] == 0.0 and logprob_B[1] < 0 and logprob_B[3] < 0


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5),
        ("min_p", 1.0), ("min_p", -0.1), ("repetition_penalty", 0.0), ("presence_penalty", float("inf")),
        ("frequency_penalty", float("nan")), ("seed", -1),
    ],
)  # fmt: skip
def test_refusals(knob, value):
    with pytest.raises(UserError, match=rf"Sampling\.{knob}="):
        Sampling(**{knob: value})
