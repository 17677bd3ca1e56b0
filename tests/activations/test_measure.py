"""Measure writes one line after the last step, also of a run that is resumed; --job measure shows a trained run."""

import json
import types

import pytest

from maxlike import config, train
from maxlike.activations.gates import Gates
from maxlike.activations.job import measure
from maxlike.activations.layer_cosine import LayerCosine
from maxlike.activations.norms import Norms
from maxlike.activations.sink import AttentionSink
from maxlike.errors import UserError
from maxlike.measure import Measure
from maxlike.program import Program
from tests import tiny


@pytest.mark.large
def test_measured_once_and_shown_again(tmp_path, capsys):
    def counted(experiment, program, state):
        calls.append(int(state["step"]))
        return {"parameters": 7.0}

    calls, norms = [], Norms(rows=8)
    experiment = tiny.load()
    experiment.hooks = (Measure(tools=(counted, norms, AttentionSink(rows=8))),)
    train.train(experiment, tmp_path)
    (line,) = tiny.rows(tmp_path, "measured")
    assert line["step"] == 12 and line["parameters"] == 7.0 and calls == [12]
    assert len(line["max_activation/each"]) == 3 and 0 < line["attention_sink"] < 1
    assert "measured max_activation" in (tmp_path / "report.html").read_text()
    train.train(experiment, tmp_path)  # trained already: nothing is measured anew
    assert calls == [12] and len(tiny.rows(tmp_path, "measured")) == 1

    capsys.readouterr()
    values = measure(experiment, tmp_path, rows=8)
    assert values["max_activation"] == pytest.approx(line["max_activation"], rel=1e-6)
    shown = capsys.readouterr().out
    assert "attention_sink_uniform" in shown and "kurtosis" in shown
    kept = json.loads((tmp_path / "measured.json").read_text())
    assert kept["step"] == 12 and kept["rows"] == 8 and kept["values"] == values and kept["left_out"] == []


def test_refusals(tmp_path):
    with pytest.raises(UserError, match=r"Measure.tools is empty"):
        Measure(tools=())
    experiment = tiny.load()
    program = Program.of(experiment, experiment.mesh.open())

    def found(experiment, program, state):
        return {"max_activation": 1.0}

    with pytest.raises(UserError, match=r"Measure.tools has two tools that give 'max_activation'"):
        Measure(tools=(found, found)).measured(program, {})
    # A statistic that cannot be is refused before the first step.
    experiment.data.validation = None
    with pytest.raises(UserError, match=r"Data.validation is not set"):
        Measure(tools=(Norms(),)).open(types.SimpleNamespace(experiment=experiment))
    with pytest.raises(UserError, match=r"Data.validation is not set"):
        measure(experiment, tmp_path)
    # So is one that would not know which tokens a layer kept; what needs only whole rows is not.
    thin = config.load("papers/moma/mod_moma_4t4i")
    for statistic in (Gates(), AttentionSink()):
        with pytest.raises(UserError, match="which tokens the block of a MixtureOfDepths worked on"):
            statistic.check(thin)
    LayerCosine().check(thin)
