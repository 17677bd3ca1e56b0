"""What docs/compare.md shows is what works."""

import inspect
import pathlib
import re

from maxlike import config
from maxlike.compare import metrics, rules
from maxlike.compare.comparison import Comparison

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "compare.md").read_text()


def test_the_comparison_on_the_page_loads(tmp_path):
    (block,) = [block for block in re.findall(r"```\n(.*?)```", PAGE, flags=re.DOTALL) if "Comparison.rule" in block]
    (tmp_path / "mine.gin").write_text(block)
    comparison = config.load(str(tmp_path / "mine.gin"), kind=Comparison)
    assert [criterion.sentence() for criterion in comparison.rule] == [
        "train/loss of moe is lower than that of transformer",
        "eta/loss of moe is above 1",
    ]


def test_the_tables_name_everything():
    for kind in metrics.KINDS:
        assert f"| `{kind}/KEY` |" in PAGE
    kinds = [kind for _, kind in inspect.getmembers(rules, inspect.isclass) if issubclass(kind, rules.Criterion)]
    for kind in set(kinds) - {rules.Criterion}:
        (knobs,) = re.findall(rf"`rules\.{kind.__name__}\(([^)]*)\)`", PAGE)
        assert [knob.partition("=")[0] for knob in knobs.split(", ")] == list(inspect.signature(kind).parameters)
