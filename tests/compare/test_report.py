import io

import pytest
from PIL import Image
from rich.console import Console

from maxlike.compare import plots, tables, verdict
from maxlike.compare.metrics import Metrics
from tests.compare import synthetic
from tests.report.test_report import Page


@pytest.fixture(scope="module")
def run():
    return synthetic.concluded()


def test_the_page_holds_everything_and_needs_nothing_else(run):
    root, comparison, _, found = run
    page = Page()
    page.feed((root / "report.html").read_text())
    text = " ".join(page.text.split())
    for words in (
        comparison.title, comparison.claim, comparison.falsified_by, comparison.source, "holds", "all 3 criteria",
        "train/loss of sparse is lower than that of dense", "written before the runs", "from the baseline", "+0.40 %",
        "diverged in 1 of 3", "twin, seed 1", "10 bad steps in a row", found.content["revision"],
    ):  # fmt: skip
        assert words in text, words
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not {"script", "link", "models"} & set(page.tags)
    assert page.tags.count("img") == 1 + 2 + 6  # the rule, two curves, a metric each


def test_every_picture_is_there_and_shows_something(run):
    root = run[0]
    names = {path.stem for path in root.glob("*.png")}
    assert names == {
        "verdict", "rule", "curve-loss", "curve-loss-image", "train-loss", "measured-kurtosis", "eta-loss",
        "validation-loss", "train-loss-image", "spikes-loss",
    }  # fmt: skip
    for name in names:
        image = Image.open(root / f"{name}.png").convert("RGB").reduce(2)
        assert image.width > 400 and len(image.getcolors(1 << 22)) > 10


def test_arms_keep_their_colours_and_none_looks_like_another():
    arms = [f"arm_{i}" for i in range(20)]
    looks = plots.styles(arms, "arm_3")
    assert len({(str(look["color"]), str(look["linestyle"])) for look in looks.values()}) == 20
    assert plots.styles(arms[:9], "arm_3")["arm_8"] == looks["arm_8"]


def test_pictures_of_runs_that_all_diverged(tmp_path):
    comparison = synthetic.comparison()
    everything = {(arm, seed) for arm in comparison.experiments for seed in range(3)}
    runs = synthetic.finished(comparison, tmp_path, synthetic.BETTER, diverged=everything)
    measured = Metrics(verdict.runs_of(comparison, runs), baseline="dense")
    for png in (plots.curves(measured, "loss"), plots.points(measured, "eta/loss")):
        assert Image.open(io.BytesIO(png)).width > 800
    assert plots.curves(measured, "nothing") is None


def test_a_criterion_without_an_interval_is_drawn():
    one = {
        "outcome": "cannot tell", "side": "above", "boundary": 1.0, "interval": [None, None], "mean": None,
        "log": False, "values": {"0": [0.0, 0.9], "1": None}, "sentence": "eta/loss of a is above 1",
    }  # fmt: skip
    assert Image.open(io.BytesIO(plots.rule([one, one | {"log": True, "values": {}}]))).width > 800


def test_the_table_on_the_terminal(run):
    console = Console(width=160, record=True, file=io.StringIO())
    tables.show(run[3].content, console)
    text = console.export_text()
    for words in ("holds: all 3 criteria at 3 seeds", "sparse", "below 0.2000", "diverged in 1 of 3"):
        assert words in text, words


@pytest.mark.parametrize(
    ("x", "words"),
    [(0.0, "0"), (-0.0, "0"), (3.10468, "3.105"), (0.99999, "1.000"), (0.0123456, "0.01235"), (12345.6, "12,350"),
     (1.2e-5, "1.200e-05"), (3e7, "3.000e+07")],
)  # fmt: skip
def test_numbers(x, words):
    assert tables.number(x) == words
