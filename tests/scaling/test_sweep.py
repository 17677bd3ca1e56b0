"""A sweep from its gin file to its records, and the law fitted to them."""

import dataclasses
import json
import re

import numpy as np
import pytest

from maxlike import config
from maxlike.compare.library import Library
from maxlike.compare.runs import execute
from maxlike.errors import UserError
from maxlike.noun import Noun
from maxlike.scaling import law_job, sweep_job, sweep_plot
from maxlike.scaling.columns import Runs
from maxlike.scaling.points import Product
from maxlike.scaling.sweep import Sweep
from tests import tiny

HEAD = """# Two rates.
from __gin__ import dynamic_registration
from maxlike.scaling import points
from maxlike.scaling import sweep
include 'jobs/sweep.gin'
sweep.Sweep.experiment = '{base}'
sweep.Sweep.points = @points.Product()
points.Product.knobs = {knobs}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "tiny.gin"
    head = "# Tiny.\nfrom __gin__ import dynamic_registration\n"
    modules = "from layers import attention\nfrom layers import mlp\nfrom layers import stack\nfrom maxlike import "
    modules += "checkpoint\nfrom maxlike import experiment\nfrom maxlike.optimizers import adamw\n"
    bindings = [text for text in tiny.BINDINGS if not text.startswith("experiment.Experiment.hooks")]
    more = ["experiment.Experiment.hooks = (@hooks.Validate(),)", "hooks.Validate.every = 2", "steps = 2"]
    text = head + modules + "from maxlike import hooks\ninclude 'quickstart.gin'\n" + "\n".join(bindings + more) + "\n"
    path.write_text(text.replace("checkpoint.Checkpoints.every = 4", "checkpoint.Checkpoints.every = 2"))
    return path


def load(base, tmp_path, knobs, *bindings):
    path = tmp_path / "sweep.gin"
    path.write_text(HEAD.format(base=base, knobs=knobs))
    return config.load(str(path), kind=Noun, bindings=list(bindings))


@pytest.mark.large
def test_a_sweep_runs_every_point_once_and_records_all_metrics(base, tmp_path, capsys, monkeypatch):
    sweep = load(base, tmp_path, "{'others/schedules.WSD.lr': (0.001, 0.01)}", "sweep.Sweep.seeds = 2")
    run = tmp_path / "run"
    sweep.config.job(sweep, run)
    content = json.loads((run / "sweep.json").read_text())
    assert content["short"] == {"others/schedules.WSD.lr": "lr"} and len(content["runs"]) == 4
    for one in content["runs"]:
        lr, seed = one["point"]["others/schedules.WSD.lr"], one["seed"]
        assert one["run"] == f"points/lr={lr}/seed_{seed}" and one["diverged"] is None
        validation = tiny.rows(run / one["run"], "validation")[-1]
        assert one["metrics"]["validation/loss"] == pytest.approx(validation["loss"])
        train = [row["loss"] for row in tiny.rows(run / one["run"])]
        assert one["metrics"]["train/loss/area"] == pytest.approx(np.mean(train))
        assert one["facts"]["tokens"] == 2 * 8 * 32 == one["facts"]["steps"] * one["facts"]["batch_tokens"]
        assert one["facts"]["all_parameters"] - one["facts"]["parameters"] == 2048 * 16
    first = {one["seed"]: one["metrics"]["train/loss/area"] for one in content["runs"][:2]}
    assert first[0] != first[1]
    assert (run / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    rows = re.findall(r"^\s*(0\.\d+)\s+\d+\.\d{4}\s+\d+\.\d{4} to", capsys.readouterr().out, re.M)
    assert sorted(rows) == ["0.001", "0.01"]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("metrics.jsonl")}
    sweep.config.job(sweep, run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("metrics.jsonl")} == before
    assert json.loads((run / "sweep.json").read_text()) == content
    # A run that diverged is recorded without metrics, shown last, and a cross in the picture.
    point, planned = sweep.planned()[0]
    lost = dataclasses.replace(execute([planned], run)[0], diverged="step 2 is bad")
    records = [sweep_job.record(lost, point, run), *content["runs"][2:]]
    assert records[0]["diverged"] == "step 2 is bad" and set(records[0]["metrics"].values()) == {None}
    capsys.readouterr()
    sweep_job.show(records, sweep.short, sweep.metric)
    assert re.search(r"0.01 .*\n0.001\s+diverged\s+-\s+1\s+1", capsys.readouterr().out)
    assert sweep_plot.draw(records, sweep.short, sweep.metric)[:4] == b"\x89PNG"
    # A metric that no run writes is refused when the first one is made.
    first = execute([planned], run)[0]
    monkeypatch.setattr(sweep_job, "execute", lambda planned, directory, *, shard, library, then: then(first))
    with pytest.raises(UserError, match="'validation/other', which no run writes"):
        sweep_job.sweep(dataclasses.replace(sweep, metric="validation/other"), run)


@pytest.mark.parametrize(
    ("knobs", "bindings", "message"),
    [
        ("{'mlp.GatedMLP.widht': (32, 64)}", (), "no knob 'widht': did you mean 'width'"),
        ("{'lerning': (1,)}", (), "lerning"),
        ("{'schedules.Cosine.lr': (1.0,)}", (), "nothing in this experiment uses"),
        ("{'stack.Stack.depth': (2, 0)}", (), r"Stack.depth=0 must be a positive multiple"),
        ("{'dim': (16, 'wide')}", (), "dim"),
        ("{'dim': (16, 32)}", ("dim = 64",), "the sweep has values of dim of its own"),
    ],
)
def test_what_no_point_can_take_is_refused_before_anything_runs(base, tmp_path, knobs, bindings, message):
    def begin():
        sweep_job.check(load(base, tmp_path, knobs, *bindings).planned(), Library())

    with pytest.raises(UserError, match=message):
        begin()


def test_a_point_has_its_directory_whatever_else_is_swept():
    def names(**knobs):
        swept = Sweep(experiment="quickstart", points=Product(knobs=knobs))
        return [swept.directory(point) for point in swept.points.points]

    assert names(steps=(1, 2)) == ["steps=1", "steps=2"] == names(steps=(1, 2, 3))[:2]
    classes = names(**{"a.B.c": ("@x.Y()", "@x.Y.()")})
    assert len(set(classes)) == 2 and all(re.fullmatch(r"[A-Za-z0-9_.=,+-]+", name) for name in classes)
    for knobs, message in (({"seeds": 0}, "Sweep.seeds=0"), ({"metric": "loss"}, "no metric of a comparison")):
        with pytest.raises(UserError, match=message):
            Sweep(experiment="quickstart", points=Product(knobs={"steps": (1,)}), **knobs)


@pytest.fixture
def swept(tmp_path):
    """A sweep.json of a known law: loss 30 tokens^-0.1 at the best rate, 2e4 tokens^-0.5; one run diverged."""
    runs = []
    for steps in (100, 200, 400, 800):
        for rate in (0.25, 0.5, 1.0, 2.0, 4.0):
            tokens = 1000 * steps
            best = 0.2 * (tokens / 1e5) ** -0.5
            loss = 30 * tokens**-0.1 * (1 + 0.005 * np.log(rate * 0.1 / best) ** 2)
            point, facts = {"steps": steps, "adamw.AdamW.lr": rate * 0.1}, {"tokens": tokens}
            metrics = {"validation/loss": loss}
            runs.append({"point": point, "seed": 0, "run": "", "diverged": None, "facts": facts, "metrics": metrics})
    runs.append(runs[0] | {"diverged": "step 3 is bad", "metrics": {"validation/loss": None}})
    short = {"steps": "steps", "adamw.AdamW.lr": "lr"}
    content = {"experiment": "quickstart", "metric": "validation/loss", "short": short, "planned": 23, "runs": runs}
    (tmp_path / "sweep.json").write_text(json.dumps(content))
    return Sweep(experiment="quickstart", points=Product(knobs={"steps": (1,)}))


def test_the_job_fits_what_the_sweep_found(swept, tmp_path, capsys):
    law_job.law(swept, tmp_path, x=("tokens",), at=("tokens=8e6",), others="lowest")
    out = capsys.readouterr().out
    assert (
        "1 of 21 runs diverged" in out
        and "2 of 23 runs are not done yet" in out
        and "validation/loss = a tokens^b" in out
    )
    assert "EXTRAPOLATED: tokens is 10 times outside the fitted range" in out
    content = json.loads((tmp_path / "law.json").read_text())
    assert content["law"]["parameters"]["b"]["value"] == pytest.approx(-0.1, abs=0.005)
    assert content["predictions"][0]["extrapolated_by"] == pytest.approx(10)
    assert (tmp_path / "law.png").read_bytes()[:4] == b"\x89PNG"
    law_job.law(swept, tmp_path, x=("tokens",), optimum=("lr",), within=0.05, at=("tokens=4e5",))
    content = json.loads((tmp_path / "law.json").read_text())
    assert content["y"] == "best lr"
    assert content["law"]["parameters"]["b"]["value"] == pytest.approx(-0.5, abs=1e-6)
    assert content["predictions"][0]["value"] == pytest.approx(0.1)
    law_job.law(swept, tmp_path, x=("tokens",), where=("adamw.AdamW.lr=0.1",))
    fitted = json.loads((tmp_path / "law.json").read_text())["fitted"]
    assert fitted["tokens"] == [1e5, 2e5, 4e5, 8e5]
    best = 0.2 * 4**-0.5  # at 4e5 tokens: 0.1 itself
    assert best == 0.1 and fitted["y"][2] == pytest.approx(30 * 4e5**-0.1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "which variable"),
        ({"x": ("token",)}, "no such column: did you mean 'tokens'"),
        ({"x": ("tokens",), "y": "validation/los"}, "did you mean 'validation/loss'"),
        ({"x": ("tokens",), "others": "lowest", "form": "exp"}, "no law of the form 'exp'"),
        ({"x": ("tokens",), "others": "lowest", "at": ("1e9",)}, "write tokens=NUMBER"),
        ({"x": ("tokens",)}, "runs at tokens = 100000 differ in lr: add --x lr"),
        ({"x": ("lr",)}, "runs at lr = 0.025 differ in steps"),
        ({"x": ("tokens",), "where": ("lr=7",)}, "no run has it; the values of lr are 0.025, 0.05"),
        ({"x": ("tokens",), "where": ("lr",)}, "write NAME=VALUE"),
        ({"x": ("tokens",), "optimum": ("lr",), "within": 1e-9}, "at tokens = 100000: 1 runs are within"),
    ],
)
def test_a_law_that_cannot_be_fitted_is_a_sentence(swept, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        law_job.law(swept, tmp_path, **flags)


def test_no_sweep_no_law(tmp_path):
    sweep = Sweep(experiment="quickstart", points=Product(knobs={"steps": (1,)}))
    with pytest.raises(UserError, match="run the sweep first"):
        law_job.law(sweep, tmp_path, x=("tokens",))
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        law_job.law(sweep, tmp_path, x=("tokens",))


def test_a_knob_with_the_name_of_a_fact_is_not_taken_for_it():
    """The iterations of an optimizer are no steps of training: runs that differ in them are not seeds of one point."""
    facts = {"steps": 100, "tokens": 1000}
    runs = [{"point": {"muon.Muon.steps": n}, "facts": facts, "metrics": {"train/loss": 3.0 - n}} for n in (1, 2)]
    found = Runs(runs, {"muon.Muon.steps": "steps"})
    assert [(row["steps"], row["muon.Muon.steps"]) for row in found.rows] == [(100, 1), (100, 2)]
    with pytest.raises(UserError, match=r"runs at tokens = 1000 differ in muon\.Muon\.steps"):
        found.settle(("tokens",), "train/loss", "refuse")
    assert Runs([runs[0] | {"point": {"steps": 100}}], {"steps": "steps"}).knobs == ["steps"]
