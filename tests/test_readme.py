"""What the README shows is what works."""

import pathlib
import re
import sys

from maxlike import catalog, config
from maxlike.bench.timed import random_batch
from maxlike.noun import Noun
from maxlike.program import Program
from tests import tiny

README = pathlib.Path(__file__).parents[1] / "README.md"


def blocks() -> list[str]:
    return re.findall(r"```\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_the_mixer_of_ones_own(tmp_path, monkeypatch):
    (code,) = [block for block in blocks() if "class MyMixer" in block]
    (gin,) = [block for block in blocks() if "import my_mixer" in block]
    (tmp_path / "my_mixer.py").write_text(code)
    (tmp_path / "my_experiment.gin").write_text(gin)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    small = [b for b in tiny.BINDINGS if "depth" not in b and "hooks" not in b and "adamw" not in b]
    experiment = config.load("my_experiment.gin", bindings=[*small, "stack.Stack.depth = 3"])
    assert "out" in experiment.abstract_model().params["stack"]["periods"][0]["mixer"]
    assert experiment.bare().flops_per_token(32) > 0
    Program.of(experiment, experiment.mesh.open()).lower_step(random_batch(experiment, 2048))


def test_the_commands_name_what_exists():
    text = README.read_text()
    for line in re.findall(r"python -m launch --experiment .*", text):
        name = re.search(r"--experiment (\S+)", line)[1]
        if name in catalog.names("experiment"):  # not one of the reader's own
            overlays = [overlay.rstrip(".") for overlay in re.findall(r"--overlay (\S+)", line)]
            job = re.search(r"--job (\w+)", line)
            config.load(name, overlays=overlays, job=job and job[1], kind=Noun)
    for job in set(re.findall(r"--job (\w+)", text)):
        catalog.find("job", job)
    for path in re.findall(r"\]\(([^)]+)\)", text):
        assert (README.parent / path).exists(), path
