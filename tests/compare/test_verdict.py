import json

import pytest

from maxlike.compare import report, scale, verdict
from maxlike.compare.rules import Lower
from maxlike.errors import UserError
from tests.compare import synthetic


@pytest.fixture(scope="module")
def concluded():
    return synthetic.concluded()


def test_the_claim_holds(concluded):
    _, _, _, found = concluded
    assert found.outcome == "holds" and found.sentence == "holds: all 3 criteria at 3 seeds"
    assert [one.outcome for one in found.judged] == ["holds"] * 3


def test_verdict_json_says_what_was_run(concluded):
    root, comparison, _, found = concluded
    content = json.loads((root / "verdict.json").read_text())
    assert content == found.content
    assert content["schema"] == 1 and content["verdict"] == "holds" and content["seeds"] == [0, 1, 2]
    for field in ("title", "source", "claim", "falsified_by", "baseline"):
        assert content[field] == getattr(comparison, field)
    assert content["versions"]["jax"] and content["revision"] and content["device"] and content["command"]
    assert content["time"]["training_seconds"] > 0
    arm = content["arms"]["sparse"]
    assert arm["tokens"] == 200 * 8 * 32 and arm["steps"] == 200
    assert arm["fingerprint"] and arm["fingerprint"] != content["arms"]["dense"]["fingerprint"]
    assert content["arms"]["twin"]["diverged"] == {"1": "10 bad steps in a row"}
    assert content["matched"]["relative"]["twin"] == pytest.approx(0.008)


def test_a_ratio_is_given_as_one(concluded):
    ratio = concluded[3].content["rule"][1]
    assert ratio["boundary"] == pytest.approx(0.2)
    assert 0 < ratio["interval"][0] < ratio["mean"] < ratio["interval"][1] < 0.2


def test_metrics_by_arm_and_seed(concluded):
    shown = concluded[3].content["metrics"]
    assert list(shown) == [
        "train/loss", "measured/kurtosis", "eta/loss", "validation/loss", "train/loss/image", "spikes/loss",
    ]  # fmt: skip
    loss = shown["train/loss"]["arms"]
    assert loss["twin"]["values"]["1"] is None and loss["twin"]["mean"] is None and "difference" not in loss["twin"]
    sparse, dense = loss["sparse"], loss["dense"]
    assert sparse["difference"]["mean"] == pytest.approx(sparse["mean"] - dense["mean"])
    assert sparse["difference"]["interval"][1] < 0
    assert shown["eta/loss"]["arms"]["twin"]["values"]["1"][0] == 0  # not reached: between bounds


def test_the_same_runs_give_the_same_verdict(concluded):
    _, comparison, runs, found = concluded
    again = verdict.judge(comparison, list(reversed(runs)), synthetic.matched(comparison)).content
    assert {k: v for k, v in again.items() if k != "time"} == {k: v for k, v in found.content.items() if k != "time"}


def test_the_same_arm_twice_does_not_win(tmp_path):
    comparison = synthetic.comparison(rule=(Lower(metric="train/loss", arm="twin", than="dense"),), metrics=())
    runs = synthetic.finished(comparison, tmp_path, synthetic.BETTER)
    found = verdict.judge(comparison, runs)
    assert found.outcome == "cannot tell"
    assert "seeds would" in found.sentence and "train/loss of twin is lower" in found.sentence


def test_the_opposite_claim_does_not_hold(concluded):
    _, _, runs, _ = concluded
    comparison = synthetic.comparison(
        rule=(
            Lower(metric="train/loss", arm="sparse", than="dense"),
            Lower(metric="train/loss", arm="dense", than="sparse"),
        ),
        metrics=(),
    )
    found = verdict.judge(comparison, runs)
    assert found.sentence == "does not hold, by 1 of 2 criteria: train/loss of dense is lower than that of sparse"


def test_ancestors_flops_are_counted(concluded):
    _, _, runs, _ = concluded
    after = synthetic.comparison(after={"twin": "sparse"}, unmatched=("twin",))
    shift = {run.arm: run.shift / run.flops_per_step for run in verdict.runs_of(after, runs)}
    assert shift == {"dense": 0, "sparse": 0, "twin": 200}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"rule": (Lower(metric="train/los", arm="sparse", than="dense"),)},
            "the rule .* which no arm writes: did you",
        ),
        ({"metrics": ("measured/kurtosi",)}, "Comparison.metrics names .* did you mean 'measured/kurtosis'"),
        ({"rule": (Lower(metric="train/loss", arm="sparce", than="dense"),)}, "did you mean 'sparse'"),
    ],
)
def test_what_no_arm_writes_is_refused(concluded, tmp_path, changes, words):
    _, _, runs, _ = concluded
    with pytest.raises(UserError, match=words):
        verdict.conclude(synthetic.comparison(**changes), runs, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_papers_scale_by_the_plan(concluded):
    comparison = synthetic.comparison(
        arms=("quickstart", "families/transformer"),
        baseline="quickstart",
        rule=(),
        scales={"v5p": "v5p", "abacus": "v5p"},
    )
    found = scale.at_scales(comparison)
    assert found["v5p"]["command"].endswith("--overlay v5p --run_dir runs/NAME-v5p")
    assert found["v5p"]["devices"] == 1 and found["v5p"]["arms"]["transformer"]["tokens"] == 240 * 4096
    runs = found["v5p"]["arms"].values()
    assert found["v5p"]["seconds"] == pytest.approx(3 * sum(run["seconds"] for run in runs)) and all(runs)
    assert found["v5p"]["dollars"] == pytest.approx(found["v5p"]["seconds"] / 3600 * 4.2)
    assert scale.words(found["v5p"]).startswith("All arms, 3 seeds each")
    assert scale.words(found["abacus"]) == "No estimate: the plan knows no device 'abacus'."
    text = report.text(concluded[3].content | {"scales": found}, {"rule": b""})
    assert found["v5p"]["command"] in text and "3 seeds each" in text and "no device &#x27;abacus&#x27;" in text
