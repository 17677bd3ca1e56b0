import json
import types

import pytest

from maxlike.compare import matching
from maxlike.compare.comparison import Comparison
from maxlike.compare.library import Loaded
from maxlike.compare.runs import Finished, Planned
from maxlike.errors import UserError
from tests import tiny


def comparison(**knobs) -> Comparison:
    words = dict.fromkeys(("title", "source", "claim", "falsified_by"), "words")
    return Comparison(**words | {"arms": ("x/a", "x/b"), "baseline": "a"} | knobs)


@pytest.fixture(scope="module")
def loaded() -> dict[str, Loaded]:
    wider = tiny.load("mlp.GatedMLP.width = 33", "attention.Attention.kv_heads = 1", "steps = 6")
    return {"a": Loaded(tiny.load()), "b": Loaded(wider)}


def test_flops_of_a_token_have_the_attention_of_the_whole_row_in_them(loaded):
    matched = matching.ActiveFlops().before(comparison(), loaded)
    for arm, one in loaded.items():
        assert (
            matched.values[arm] == one.experiment.bare().flops_per_token(32) > one.experiment.bare().flops_per_token(16)
        )
    assert matched.total_flops["a"] == 12 * 8 * 32 * matched.values["a"] == loaded["a"].flops


def test_flops_of_a_run_count_those_it_begins_from(loaded):
    matched = matching.ActiveFlops().before(comparison(after={"b": "a"}, unmatched=("b",)), loaded)
    assert matched.total_flops == {"a": loaded["a"].flops, "b": loaded["a"].flops + loaded["b"].flops}
    assert matched.left_out == ("b",)


def test_parameters_and_cache_are_those_of_the_network(loaded):
    heads, width, blocks = 2, 16, 2
    parameters = matching.Parameters().before(comparison(), loaded).values
    # One more row of each of the three matrices of the feed-forward, and half of the keys and values.
    assert parameters["b"] - parameters["a"] == blocks * (3 * width - 2 * width * width // heads)
    cache = matching.CacheBytes().before(comparison(), loaded)
    assert cache.values["a"] >= 32 * 2 * blocks * width * 4
    assert cache.relative("b") == pytest.approx(-0.5, abs=0.01)
    with pytest.raises(UserError, match="the arms b and a do not match: decoding cache of a row"):
        cache.refuse()


@pytest.mark.parametrize(("share", "refused"), [(0.0199, False), (0.0201, True), (-0.0199, False), (-0.0201, True)])
def test_the_tolerance_is_to_both_sides(share, refused):
    def table(left_out=()):
        values = {"a": 100.0, "b": 100.0 * (1 + share)}
        return matching.Matched("parameters", "", 0.02, values, left_out, "a", values)

    table(("b",)).refuse()
    if refused:
        with pytest.raises(UserError, match=r"do not match: parameters 10\d|do not match: parameters 98"):
            table().refuse()
    else:
        table().refuse()
    assert table().table().row_count == 2


def test_step_time_is_the_median_of_what_the_runs_measured(loaded, tmp_path):
    finished = []
    for arm, rates in {"a": (1.0, 256.0, 256.0), "b": (128.0, 512.0, 128.0)}.items():
        lines = [{"step": k, "split": "train", "tokens_per_second": rate} for k, rate in enumerate(rates)]
        (tmp_path / arm).mkdir()
        (tmp_path / arm / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        finished.append(Finished(Planned(arm, f"x/{arm}"), tmp_path / arm, loaded[arm].experiment))
    match = matching.StepTime(tolerance=1.0)
    assert match.before(comparison(), loaded) is None
    assert match.after(comparison(), loaded, finished).values == {"a": 1.0, "b": 2.0}


def test_what_has_no_cache_and_a_negative_tolerance_are_refused(monkeypatch):
    monkeypatch.setattr(matching, "cache_size", lambda experiment: types.SimpleNamespace(refusal="it looks ahead"))
    with pytest.raises(UserError, match="CacheBytes: it looks ahead"):
        matching.CacheBytes().of(None)
    with pytest.raises(UserError, match=r"Parameters\.tolerance=-1"):
        matching.Parameters(tolerance=-1)
