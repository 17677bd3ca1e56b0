"""Runs on tiny experiments. The programs compile once in the session: arms differ in what is no part of a program."""

import io
import json
import os
import signal

import jax.monitoring
import pytest

from maxlike import config, log
from maxlike.compare import library, runs
from maxlike.compare.progress import Progress
from maxlike.compare.runs import Planned, execute
from maxlike.errors import Diverged, UserError
from maxlike.hooks import Validate
from maxlike.run_dir import RunDirectory
from maxlike.train import train
from tests import tiny
from tests.compare import toy

pytestmark = pytest.mark.usefixtures("no_pictures")
COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="module")
def no_pictures():
    """Reports of single runs have tests of their own, and take longer than the runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "write_report", lambda *_, **__: None)
        yield


@pytest.fixture(scope="module")
def arms(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("arms")
    return {
        "a": toy.arm(folder, "a"),
        "b": toy.arm(folder, "b", *toy.AFTER_A, "experiment.Experiment.seed = 10"),
        "bad": toy.arm(folder, "bad"),
        "late": toy.arm(folder, "late", *toy.AFTER_A),
    }


def plan(arms, *names: str, seeds: int = 1, after=None) -> list[Planned]:
    after = {"b": "a", "late": "bad"} if after is None else after
    return [Planned(name, arms[name], seed=seed, after=after.get(name)) for name in names for seed in range(seeds)]


@pytest.fixture(scope="module")
def made(arms, no_pictures, tmp_path_factory):
    """(directory, what was finished, how often something was compiled by how many runs were finished by then)."""
    directory = tmp_path_factory.mktemp("made")
    compiled: dict[int, int] = {}

    def listen(event: str, seconds: float, **_: str) -> None:
        if event == COMPILED:
            done = len(list(directory.glob("*/*/finished.json")))
            compiled[done] = compiled.get(done, 0) + 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    planned = plan(arms, "b", "a", seeds=2)
    finished = execute(planned, directory)
    jax.monitoring.clear_event_listeners()
    return directory, finished, compiled


def test_runs_are_ordinary_run_directories_of_their_seed(made):
    directory, finished, _ = made
    where = [one.directory.relative_to(directory).as_posix() for one in finished]
    assert where == ["a/seed_0", "a/seed_1", "b/seed_0", "b/seed_1"]
    assert [one.experiment.seed for one in finished] == [0, 1, 10, 11]
    for one in finished:
        assert list(tiny.losses(one.directory)) == [1, 2, 3, 4]
        assert f"experiment.Experiment.seed = {one.experiment.seed}\n" in (one.directory / "config.gin").read_text()
        assert "report:" in (one.directory / "log.txt").read_text()
    assert tiny.losses(finished[0].directory) != tiny.losses(finished[1].directory)


def test_a_run_begins_with_the_parameters_of_the_run_of_the_same_number(made):
    _, finished, _ = made
    for a, b in zip(finished[:2], finished[2:]):
        assert f"source = '{a.directory}'" in (b.directory / "config.gin").read_text().replace("\\\n    ", "")
        assert tiny.losses(b.directory)[1] < tiny.losses(a.directory)[1] - 0.05


def test_a_run_alone_by_its_config_is_the_same_run(made, tmp_path):
    _, finished, _ = made
    alone = config.load(str(finished[-1].directory / "config.gin"))
    train(alone, tmp_path)
    assert tiny.losses(tmp_path) == tiny.losses(finished[-1].directory)


def test_a_second_seed_compiles_nothing(made):
    _, _, compiled = made
    assert compiled[0] > 0  # the listener hears: the first seed of a compiles
    assert compiled.get(1, 0) == 0
    assert compiled.get(3, 0) == 0


def test_what_is_there_is_not_run_again(made, arms, monkeypatch):
    directory, finished, _ = made
    monkeypatch.setattr(runs, "fit", lambda *_: pytest.fail("it was trained again"))
    again = execute(plan(arms, "b", "a", seeds=2), directory)
    assert [(one.planned, one.directory) for one in again] == [(one.planned, one.directory) for one in finished]


def test_another_configuration_is_refused_rather_than_mixed(made, arms):
    directory, _, _ = made
    changed = [Planned("a", arms["a"], bindings=("steps = 6",))]
    with pytest.raises(UserError, match=r"a/seed_0 holds a run of another configuration \(steps = 4, now 6\)"):
        execute(changed, directory)
    with pytest.raises(UserError, match=r"b/seed_0 holds a run of another configuration"):
        execute(plan(arms, "b", after={}), directory)  # it would begin from elsewhere
    execute([Planned("a", arms["a"], bindings=("data.Data.workers = 0",))], directory)  # changes nothing


def test_a_request_to_stop_saves_and_the_same_call_goes_on(made, arms, tmp_path, monkeypatch):
    _, finished, _ = made
    validate = Validate.__call__

    def stop(self, step, state, metrics):
        if step == 3 and self.training.experiment.seed == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        validate(self, step, state, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(Validate, "__call__", stop)
        early = execute(plan(arms, "a", seeds=2), tmp_path)
    assert [one.planned.seed for one in early] == [0]
    assert max(tiny.losses(tmp_path / "a" / "seed_1")) == 3
    late = execute(plan(arms, "a", seeds=2), tmp_path)
    assert [tiny.losses(one.directory) for one in late] == [tiny.losses(one.directory) for one in finished[:2]]


def test_shares_are_whole_chains_and_together_everything(made, arms, tmp_path, monkeypatch):
    planned = plan(arms, "a", "b", seeds=3)
    prepared = runs._prepare(planned, tmp_path, library.Library())
    shares = [runs._share(prepared, (k, 2)) for k in (1, 2)]
    assert sorted(len(share) for share in shares) == [2, 4]
    keys = [{(run.planned.name, run.planned.seed) for run in share} for share in shares]
    assert not keys[0] & keys[1] and len(keys[0] | keys[1]) == 6
    for share in keys:
        assert all((name, seed) in share for seed in {seed for _, seed in share} for name in "ab")
    trained = []
    monkeypatch.setattr(runs, "fit", lambda experiment, directory, *_: trained.append(directory) or {"loss": 1.0})
    assert len(execute(planned, tmp_path, shard=(1, 2))) == len(shares[0]) == len(trained)
    assert len(execute(planned, tmp_path, shard=(2, 2))) == 6 == len(set(trained))


def test_a_run_that_diverges_is_a_result_and_so_is_one_that_begins_from_it(arms, tmp_path, monkeypatch):
    def diverge(experiment, directory, *_):
        raise Diverged("step 5 is bad")

    monkeypatch.setattr(runs, "fit", diverge)  # which bad steps end a training, tests/test_train.py knows
    bad, late = execute(plan(arms, "bad", "late"), tmp_path)
    assert bad.diverged == "step 5 is bad"
    assert late.diverged == "it begins from bad seed 0, which diverged"
    again = execute(plan(arms, "bad", "late"), tmp_path)
    assert [one.diverged for one in again] == [bad.diverged, late.diverged]


def test_two_processes_on_one_directory_are_refused(arms, tmp_path):
    with RunDirectory(tmp_path):
        for shard in ((1, 1), (1, 2)):
            with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
                execute(plan(arms, "a"), tmp_path, shard=shard)
    with RunDirectory(tmp_path / "shards" / "1_of_2"), pytest.raises(UserError, match="in use by process"):
        execute(plan(arms, "a"), tmp_path, shard=(1, 2))
    with runs._claim(tmp_path, (1, 2)):
        with runs._claim(tmp_path, (2, 2)):  # beside each other
            pass
        with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):  # not beside whoever wants all
            execute(plan(arms, "a"), tmp_path)


def test_what_cannot_be_planned_is_refused(arms, tmp_path):
    for planned, sentence in (
        (plan(arms, "a", "a"), "two planned runs have the same name"),
        (plan(arms, "b"), "begins from a seed 0, which is not planned"),
        (plan(arms, "a", "b", after={"a": "b"}), "has no warm start"),
        (plan(arms, "a", "b", after={"a": "b", "b": "a"}), "begins from itself"),
    ):
        with pytest.raises(UserError, match=sentence):
            execute(planned, tmp_path)
    (tmp_path / "a" / "seed_0").mkdir(parents=True)
    (tmp_path / "a" / "seed_0" / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="a run that no comparison made"):
        execute(plan(arms, "a"), tmp_path)
    (tmp_path / "a" / "seed_0" / "planned.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        execute(plan(arms, "a"), tmp_path)


def test_the_eta_is_of_the_flops_that_are_left_by_those_that_were_measured(tmp_path):
    now, out = 0.0, io.StringIO()
    with Progress(flops=100.0, runs=3, done=1, file=out, plain=0.0, clock=lambda: now) as shown:
        screen = shown.begin("a seed 0", 40.0, 4, tmp_path / "log.txt")
        now = 50.0  # it compiles, which says nothing of its steps
        screen.update(2, {"loss": 3.0})  # resumed after one step of ten FLOPs
        assert shown.eta is None
        now = 60.0
        screen.update(3, {"loss": 2.0})
        assert shown.eta == pytest.approx(10.0 * (100 - 30) / 10)
        assert "1/3 runs done  a seed 0  step 3/4  loss 2.0000  ETA 1 min 10 s" in out.getvalue()
        screen.update(4, {"loss": 2.0})
        screen.close()
        shown.end("a seed 0: over")
        assert "2/3  a seed 0: over" in out.getvalue()
        assert shown.eta == pytest.approx(60.0 * (100 - 40) / 30)  # compiling is a part of what a run takes
    assert "loss 2.0000" in (tmp_path / "log.txt").read_text()


def test_records_are_plain_json(made):
    directory, _, _ = made
    record = json.loads((directory / "a" / "seed_0" / "finished.json").read_text())
    assert record["diverged"] is None and record["device_kind"] == "cpu" and record["seconds"] > 0
