"""The whole job on an A/A comparison."""

import json

import pytest

from maxlike import log
from maxlike.compare import runs, written
from maxlike.compare.compare import compare
from maxlike.errors import UserError
from tests import tiny
from tests.compare import toy

RULE = (
    "comparison.Comparison.rule = (@rules.Lower(),)",
    "rules.Lower.metric = 'validation/loss'",
    "rules.Lower.arm = 'b'",
    "rules.Lower.than = 'a'",
)


@pytest.fixture(scope="module")
def name(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("toy")
    arms = toy.arm(folder, "a"), toy.arm(folder, "b")
    return toy.comparison(folder, arms, *RULE)


@pytest.fixture(autouse=True)
def no_pictures_of_runs(monkeypatch):
    monkeypatch.setattr(log, "write_report", lambda *_, **__: None)


@pytest.mark.large
def test_shards_make_it_together_and_the_last_judges(name, tmp_path, capsys, monkeypatch):
    assert compare(toy.load(name), tmp_path, shard="1/2") is None
    assert "verdict comes with the last" in capsys.readouterr().out
    verdict = compare(toy.load(name), tmp_path, shard="2/2")
    shown = capsys.readouterr().out
    assert verdict.outcome != "holds"  # the same arm twice does not win
    assert verdict.sentence in " ".join(shown.split())
    assert "training FLOPs a token" in shown
    a, b = (tmp_path / "arms" / arm for arm in "ab")
    for seed in ("seed_0", "seed_1"):
        assert tiny.losses(a / seed) == tiny.losses(b / seed)
    record = json.loads((tmp_path / "verdict.json").read_text())
    assert record["matched"]["relative"] == {"a": 0.0, "b": 0.0}
    assert (tmp_path / "report.html").is_file()
    monkeypatch.setattr(runs, "fit", lambda *_: pytest.fail("it was trained again"))
    assert compare(toy.load(name), tmp_path, seeds=1, arms=("b",)) is None
    easier = toy.load(name, "rules.Lower.by = -1.0")
    with pytest.raises(
        UserError, match=r"rule\.json holds from before the runs \(it was .* is lower than that of a', now"
    ):
        compare(easier, tmp_path)


def test_a_rule_may_change_until_a_run_has_ended_and_its_metrics_are_looked_for_in_the_first(
    name, tmp_path, monkeypatch
):
    def fit(experiment, directory, *_):
        (directory / "metrics.jsonl").write_text('{"step": 4, "split": "validation", "loss": 1.0}\n')
        trained.append(directory)
        return {"loss": 1.0}

    trained = []
    monkeypatch.setattr(runs, "fit", fit)
    written.keep(toy.load(name), tmp_path, tmp_path / "arms")
    with pytest.raises(UserError, match=r"the rule .* names 'validation/los', which no arm writes: did you mean"):
        compare(toy.load(name, "rules.Lower.metric = 'validation/los'"), tmp_path)
    assert len(trained) == 1
    with pytest.raises(UserError, match="from before the runs"):
        compare(toy.load(name), tmp_path)
    (tmp_path / "rule.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        compare(toy.load(name), tmp_path)


def test_what_does_not_match_or_pair_is_refused_before_anything_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "execute", lambda *_, **__: pytest.fail("something ran"))
    folder = tmp_path / "wider"
    folder.mkdir()
    arms = toy.arm(folder, "a"), toy.arm(folder, "b", "mlp.GatedMLP.width = 64")
    comparison = toy.load(toy.comparison(folder, arms))
    with pytest.raises(UserError, match="the arms b and a do not match: training FLOPs a token"):
        compare(comparison, tmp_path)
    assert "to the baseline" in capsys.readouterr().out
    for flags, sentence in (
        ({"seeds": 0}, "--seeds 0"),
        ({"shard": "2"}, "--shard"),
        ({"arms": ("bb",)}, "--arms bb: no such arm"),
    ):
        with pytest.raises(UserError, match=sentence):
            compare(toy.load(name), tmp_path, **flags)
