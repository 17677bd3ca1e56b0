"""Statistics of activations against their definitions, closed cases, and themselves on several devices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import taps
from layers.context import Context
from layers.stack import lay_bare
from maxlike import config
from maxlike.activations.gates import Gates
from maxlike.activations.kurtosis import Kurtosis, centered_excess, excess, gaussian_level
from maxlike.activations.norms import Norms
from maxlike.activations.sink import AttentionSink
from maxlike.activations.statistic import Passes
from maxlike.errors import UserError
from maxlike.program import Program

MESH = ("mesh/fsdp_context",)
ROWS = 12  # of batches of 8: the last one counts half
ARM = "papers/gated_attention/g1_elementwise"
SMALL = (
    "dim = 16",
    "heads = 4",
    "kv_heads = 2",
    "depth = 2",
    "gated_width = 16",
    "attention.Attention.window = 9",
    "attention.Attention.soft_cap = 5.0",
    "attention.Attention.sinks = True",
    "experiment.Experiment.batch_size = 8",
    "experiment.Experiment.sequence_length = 16",
)
ALL = (Kurtosis(rows=ROWS), Norms(rows=ROWS), AttentionSink(rows=ROWS), Gates(rows=ROWS))


def load(*bindings, overlays=()):
    return config.load(ARM, overlays=overlays, bindings=[*SMALL, *bindings])


def opened(experiment):
    """(program, a state whose parameters are so large that nothing is near zero or even)."""
    program = Program.of(experiment, experiment.mesh.open())
    state = program.init()
    return program, state | {"params": jax.tree.map(lambda p: 3 * p, state["params"])}


@pytest.fixture(scope="module")
def measured():
    experiment = load()
    program, state = opened(experiment)
    return experiment, program, state, Passes(ALL)(experiment, program, state)


def test_gaussian_vectors_have_the_published_level():
    rng = np.random.default_rng(0)
    for width, level in {256: 0.107, 512: 0.080, 1024: 0.057, 2048: 0.040}.items():
        x = rng.standard_normal((4000, 1, width)).astype(np.float32)
        found = float(np.mean(np.maximum(excess(x), 0)))
        assert found == pytest.approx(level, abs=0.05 * level + 0.0005)  # published to three digits
        assert gaussian_level(width) == pytest.approx(level, rel=0.2)


def test_one_outlier_channel_and_heavy_tails():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((300, 1, 2048)).astype(np.float32)
    x[..., 7] *= 300
    assert float(np.mean(np.maximum(excess(x), 0))) == pytest.approx(1558, rel=0.02)
    laplace = rng.laplace(size=(400, 1, 4096)).astype(np.float32)
    assert float(np.mean(centered_excess(laplace))) == pytest.approx(3, abs=0.1)
    shifted = laplace + 5  # only the fourth moment that is not centred sees an offset
    assert float(np.mean(centered_excess(shifted))) == pytest.approx(3, abs=0.1)
    assert float(np.mean(excess(shifted))) > 100
    assert float(excess(np.ones((1, 1, 8)))[0, 0]) == 0.0


def rows_of(experiment):
    batches = list(experiment.open_validation().iterate())[: -(-ROWS // 8)]
    return {name: np.concatenate([batch[name] for batch in batches])[:ROWS] for name in batches[0]}


def by_hand(experiment, program, state):
    """Everything from what taps show of each row, in numpy, a row at a time."""
    network = lay_bare(program.model.merge(state["params"], state["buffers"]))
    batch, seen = rows_of(experiment), {name: [] for name in taps.NAMES}
    functions = {name: lambda x, owner, name=name: seen[name].append(np.asarray(x, np.float64)) or x for name in seen}
    with taps.opened(functions):
        tokens_BT = jnp.asarray(batch["inputs"])
        output = network(tokens_BT, Context(jnp.asarray(batch["positions"]), jnp.asarray(batch["segment_ids"])))
    sinks = [block.mixer.sinks[...] for block in network.stack.prefix]
    return batch, seen, np.asarray(output.hidden_BTD, np.float64), [np.asarray(s, np.float64) for s in sinks]


def first_key_by_hand(batch, q_BTHK, k_BTGK, sinks_H, *, window, cap):
    """(mean probability of key 0, mean of one over the number of visible keys), query by query."""
    shares, levels = [], []
    for row, segments in enumerate(batch["segment_ids"]):
        for t in range(1, min(window, len(segments))):
            if segments[t] == 0 or segments[t] != segments[0]:
                continue
            levels.append(1 / (t + 1))
            heads = []
            for h in range(q_BTHK.shape[2]):
                g = h * k_BTGK.shape[2] // q_BTHK.shape[2]
                s = k_BTGK[row, : t + 1, g] @ q_BTHK[row, t, h] / math.sqrt(q_BTHK.shape[3])
                e = np.exp(cap * np.tanh(s / cap))
                heads.append(e[0] / (e.sum() + np.exp(sinks_H[h])))
            shares.append(np.mean(heads))
    return np.mean(shares), np.mean(levels)


def test_equal_their_definitions(measured):
    experiment, program, state, values = measured
    batch, seen, hidden_BTD, sinks = by_hand(experiment, program, state)
    real = batch["segment_ids"] != 0
    states = [*seen["residual"][:-1], hidden_BTD]
    kurtosis = [np.maximum((x**4).mean(-1) / x.var(-1, ddof=1) ** 2 - 3, 0)[real].mean() for x in states]
    np.testing.assert_allclose(values["kurtosis/each"], kurtosis, rtol=1e-3)
    assert values["kurtosis"] == pytest.approx(np.mean(kurtosis), rel=1e-3)
    tops = [np.abs(x[real]).max() for x in seen["residual"]]
    np.testing.assert_allclose(values["max_activation/each"], tops, rtol=1e-4)
    assert values["max_activation"] == pytest.approx(np.mean(tops[1:]), rel=1e-4)
    rms = [np.sqrt((x[real] ** 2).mean()) for x in seen["residual"]]
    np.testing.assert_allclose(values["residual_rms/each"], rms, rtol=1e-4)
    knobs = {"window": 9, "cap": 5.0}
    found = [first_key_by_hand(batch, *of, **knobs) for of in zip(seen["queries"], seen["keys"], sinks)]
    np.testing.assert_allclose(values["attention_sink/each"], [share for share, _ in found], rtol=1e-3)
    assert values["attention_sink_uniform"] == pytest.approx(found[0][1], rel=1e-4)
    assert values["attention_sink_length"] == 16
    np.testing.assert_allclose(values["gate_mean/each"], [x[real].mean() for x in seen["gate"]], rtol=1e-4)
    np.testing.assert_allclose(values["gate_below_0.1/each"], [(x[real] < 0.1).mean() for x in seen["gate"]], rtol=1e-3)
    for name in ("attention_output", "gated_output"):
        wide = [x.reshape(*x.shape[:2], -1)[real] for x in seen[name]]
        np.testing.assert_allclose(values[f"{name}/each"], [np.abs(x).mean() for x in wide], rtol=1e-4)
        small = [(np.abs(x) < 0.1 * np.sqrt((x**2).mean(-1, keepdims=True))).mean() for x in wide]
        np.testing.assert_allclose(values[f"{name}_sparsity/each"], small, rtol=2e-2)


def test_without_preference_the_sink_is_the_uniform_level_and_gates_are_what_their_logits_say(measured):
    experiment, program, state, _ = measured
    attention = state["params"]["stack"]["periods"][0]["mixer"]
    level = np.mean([1 / (t + 1) for t in range(1, 9)])

    def with_(query, gate, logits):
        mixer = attention | {
            "query": jax.tree.map(lambda x: query * x, attention["query"]),
            "gate": jax.tree.map(lambda x: gate * x, attention["gate"]),
            "sinks": jnp.full_like(attention["sinks"], logits),
        }
        params = state["params"] | {"stack": state["params"]["stack"] | {"periods": {0: state_of(mixer)}}}
        return Passes((AttentionSink(rows=ROWS), Gates(rows=ROWS)))(experiment, program, state | {"params": params})

    def state_of(mixer):
        return state["params"]["stack"]["periods"][0] | {"mixer": mixer}

    even = with_(0.0, 0.0, -1e9)
    assert even["attention_sink"] == pytest.approx(level, rel=1e-5)
    assert even["attention_sink_uniform"] == pytest.approx(level, rel=1e-5)
    assert even["gate_mean"] == 0.5 and even["gate_below_0.5"] == 0.0
    assert even["gated_output"] == pytest.approx(even["attention_output"] / 2, rel=1e-5)
    assert with_(0.0, 0.0, 1e9)["attention_sink"] == 0.0  # all of it goes to the learned sink


def test_another_seed_compiles_nothing_anew(measured):
    class Counted(Norms):
        def sums(self, seen):
            traced.append(seen.real_BT.shape)
            return super().sums(seen)

    traced, (experiment, program, state, values) = [], measured
    passes = Passes((Counted(rows=ROWS),))
    again = experiment.rerun(seed=7, warm_start=None)
    other = state | {"params": jax.tree.map(lambda p: 2 * p, state["params"])}
    assert passes(experiment, program, state)["max_activation"] == pytest.approx(values["max_activation"], rel=1e-5)
    assert passes(again, program.rerun(again), other)["max_activation"] != values["max_activation"]
    assert len(traced) == 1


def test_tokens_alone_have_no_context(measured):
    experiment, program, state, values = measured
    alone = Kurtosis(rows=ROWS, context="single_token")(experiment, program, state)
    assert set(alone) == {f"single_token_{name}" for name in values if name.startswith("kurtosis")}
    # The embedding knows no context; a layer's output without one is another.
    assert alone["single_token_kurtosis/each"][0] == pytest.approx(values["kurtosis/each"][0], rel=1e-4)
    assert alone["single_token_kurtosis/each"][2] != pytest.approx(values["kurtosis/each"][2], rel=1e-2)


@pytest.mark.large
def test_are_the_same_on_a_mesh():
    whole_rows = "attention.Attention.window = None"  # so that devices hold the tokens of a row out of order
    one, many = load(whole_rows), load(whole_rows, "sharding.Mesh.shape = {'fsdp': 2, 'context': 4}", overlays=MESH)
    (program, state), (parallel, placed) = opened(one), opened(many)
    placed = placed | {"params": jax.device_put(jax.device_get(state["params"]), parallel.shardings["params"])}
    assert "order" in parallel.row_order.of_batch(rows_of(many))
    alone, spread = Passes(ALL)(one, program, state), Passes(ALL)(many, parallel, placed)
    assert alone.keys() == spread.keys()
    for name in alone:
        np.testing.assert_allclose(spread[name], alone[name], rtol=2e-3, err_msg=name)


def test_refusals(measured):
    with pytest.raises(UserError, match=r"Kurtosis.rows=0"):
        Kurtosis(rows=0)
    with pytest.raises(UserError, match=r"Kurtosis.context='alone' must be"):
        Kurtosis(context="alone")
    experiment, program, state, _ = measured
    with pytest.raises(UserError, match="two statistics give 'max_activation'"):
        Passes((Norms(rows=1), Norms(rows=1)))(experiment, program, state)
    mamba = config.load("families/linear_attention", bindings=["dim = 16", "depth = 2", "layers = 1", "heads = 2"])
    with pytest.raises(UserError, match="AttentionSink finds no softmax attention"):
        AttentionSink().check(mamba)
    tokenizer = config.load("image_tokenizer", bindings=["width = 16"])
    with pytest.raises(UserError, match="Norms reads the layers of a LanguageModel, not of a ImageTokenizer"):
        Norms().check(tokenizer)
