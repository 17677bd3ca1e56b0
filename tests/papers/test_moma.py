"""The arms of papers/moma: equal FLOPs at every size, the paper's parameters, one difference each, and a run of two."""

import functools

import jax
import numpy as np
import pytest

from maxlike import config, train
from maxlike.checkpoint_tree import flatten
from maxlike.compare.comparison import Comparison
from maxlike.restore import restore
from tests import tiny

PAPER = "papers/moma"
SIZES = {"cpu": (), "h200": (f"{PAPER}/h200",), "v5p": (f"{PAPER}/v5p",)}
MATCHED = ("dense", "moe_8x", "moma_1t1i", "moma_4t4i", "mod_moma_4t4i")
TINY = (
    "dim = 16",
    "heads = 2",
    "depth = 1",
    "width = 24",
    "steps = 2",
    "router_steps = 2",
    "experiment.Experiment.batch_size = 8",
    "experiment.Experiment.sequence_length = 96",
    "held_out/sources.Text.start_byte = -1000",
)


@functools.cache
def load(arm: str, size: str = "cpu"):
    return config.load(f"{PAPER}/{arm}", overlays=SIZES[size])  # refuses a number that the arm has no use for


@functools.cache
def comparison() -> Comparison:
    return config.load(PAPER, kind=Comparison)


def parameters(arm: str, size: str = "cpu") -> dict[str, int]:
    return {path: leaf.size for path, leaf in flatten(load(arm, size).abstract_model().params).items()}


def flops(arm: str, size: str) -> float:
    """Of a whole run."""
    experiment = load(arm, size)
    tokens = experiment.clock.tokens_per_step * experiment.steps
    return experiment.bare().flops_per_token(experiment.sequence_length) * tokens


@pytest.mark.parametrize("size", SIZES)
def test_arms_spend_the_same_flops(size):
    """The head included; the seed and what grows from it together."""
    assert comparison().matched == MATCHED and set(comparison().experiments) >= set(MATCHED)
    base = flops("dense", size)
    for arm in MATCHED:
        assert abs(flops(arm, size) / base - 1) < 0.01, arm
    assert abs((flops("seed_1t1i", size) + flops("upcycled_4t4i", size)) / base - 1) < 0.01


def test_the_sizes_are_the_papers():
    """Table 1 (arXiv 2407.21770): 90 M dense and 210 M with 8 experts; 7.1 B, as in published/moma_1_4b."""
    count = {(arm, size): sum(parameters(arm, size).values()) for arm in MATCHED for size in ("h200", "v5p")}
    assert round(count["dense", "h200"] / 1e6) == 92 and round(count["moma_4t4i", "h200"] / 1e6) == 210
    published = config.load("published/moma_1_4b").abstract_model().params
    assert count["moma_4t4i", "v5p"] == sum(leaf.size for leaf in jax.tree.leaves(published))
    assert all(count["moe_8x", size] == count["moma_4t4i", size] for size in ("h200", "v5p"))
    blocks = {size: load("mod_moma_4t4i", size).bare().stack for size in ("h200", "v5p")}
    assert [len(stack.periods) * stack.repeats for stack in blocks.values()] == [14, 32]


def test_arms_differ_in_what_they_say():
    dense, one, four, eight = (parameters(arm) for arm in ("dense", "moma_1t1i", "moma_4t4i", "moe_8x"))
    experts = {name: sum(n for path, n in arm.items() if "experts" in path) for name, arm in (("1", one), ("4", four))}
    assert experts["4"] == 4 * experts["1"] and sum(one.values()) == sum(dense.values()) + experts["1"] // 2
    assert not any("router" in path for path in one) and sum(eight.values()) == sum(four.values())
    routers = sum(n for path, n in four.items() if path.endswith("router"))
    assert sum(four.values()) == sum(one.values()) + 3 * experts["1"] + routers
    assert parameters("seed_1t1i") == one and parameters("upcycled_4t4i") == four
    auxiliary = {path for path in parameters("routers_4t4i") if "auxiliary" in path}
    assert set(parameters("routers_4t4i")) - auxiliary == set(four) and auxiliary
    for arm in comparison().experiments:
        noisy = "router_noise = 'gumbel_sigmoid'" in load(arm).config.operative
        assert noisy == (arm == "upcycled_4t4i")


@pytest.mark.parametrize(("arm", "after"), [("upcycled_4t4i", "seed_steps"), ("routers_4t4i", "steps")])
def test_a_second_stage_reads_what_the_first_would_have_read_next(arm, after):
    skipped = {"steps": load("dense").steps, "seed_steps": load("seed_1t1i").steps}[after]

    def batches(name):
        e = load(name)
        return e.data.train(sequence_length=e.sequence_length, batch_size=e.batch_size, seed=e.seed, steps=e.steps)

    late = batches(arm)
    np.testing.assert_array_equal(late.batch(1)["inputs"], batches("dense").batch(skipped + 1)["inputs"])
    assert all(epochs < 1 for epochs in batches("dense").epochs(skipped + load(arm).steps).values())
    assert late.identity() != batches("dense").identity()


def test_half_of_the_tokens_are_pictures_and_both_modalities_find_room():
    experiment = load("moma_4t4i")
    batches = experiment.data.train(sequence_length=192, batch_size=16, seed=0)
    first = experiment.bare().modality_starts[0]
    shares = [float((batches.batch(step)["inputs"] >= first).mean()) for step in range(0, 160, 8)]
    assert abs(np.mean(shares) - 0.5) < 0.02 and max(shares) < 0.6 and min(shares) > 0.4


@pytest.mark.large
def test_experts_then_their_auxiliary_routers(tmp_path):
    """The second leaves the network of the first as it is; together they write what the rule and the table name."""
    arms = {}
    for arm in ("moma_4t4i", "routers_4t4i"):
        source = (f"upcycle.Upcycle.source = {str(tmp_path / 'moma_4t4i')!r}",) if arm == "routers_4t4i" else ()
        arms[arm] = config.load(f"{PAPER}/{arm}", bindings=[*TINY, *source])
        train.train(arms[arm], tmp_path / arm)
    params = {arm: flatten(restore(arms[arm], tmp_path / arm, None)[1]["params"]) for arm in arms}
    for path, leaf in params["moma_4t4i"].items():
        np.testing.assert_array_equal(leaf, params["routers_4t4i"][path])
    rows = {arm: {split: tiny.rows(tmp_path / arm, split) for split in ("train", "measured")} for arm in arms}
    written = {
        arm: {f"{split}/{key}" for split, lines in of.items() for line in lines for key in line}
        for arm, of in rows.items()
    }
    asked = {metric.replace("eta/", "train/") for metric in comparison().metrics}
    assert asked <= written["moma_4t4i"] | written["routers_4t4i"]
    assert {criterion.metric.replace("eta/", "train/") for criterion in comparison().rule if "routers_4t4i" not in
            criterion.arms} <= written["moma_4t4i"]  # fmt: skip
    assert {"measured/causal_excess", "measured/random_excess"} <= written["routers_4t4i"]
    found = rows["routers_4t4i"]["measured"][0]
    assert found["causal_excess"] == pytest.approx(found["causal_loss"] / found["top_k_loss"] - 1)
    line = rows["moma_4t4i"]["train"][-1]
    assert min(line["loss/text"], line["loss/image"]) <= line["loss"] <= max(line["loss/text"], line["loss/image"])
