"""Records and the table made from them."""

import json
import pathlib

import pytest

from maxlike.bench import bench, record
from maxlike.errors import UserError

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
AROUND = {"load_before": 0.1, "load_after": 2.0, "date": "2026-01-02T03:04:05+00:00", "commit": "abc"}


def result(values=(0.9, 1.2, 0.8), goal="<= 1.0"):
    quantities = [record.Quantity("ratio", "", list(values), goal), record.Quantity("rate", "tokens/s", [12345.6])]
    return record.Result("twins", "cpu", quantities, {"threads": 2})


def test_the_table_of_the_readme_is_made_from_the_records():
    block = (BENCHMARKS / "README.md").read_text().split(record.BEGIN)[1].split(record.END)[0]
    assert block.strip() == record.table(BENCHMARKS), "run maxlike.bench.record.update on benchmarks/README.md"


def test_a_record_keeps_everything_and_the_readme_follows(tmp_path):
    (tmp_path / "README.md").write_text(f"before\n{record.BEGIN}\nold\n{record.END}\nafter\n")
    path = record.write(result(), AROUND, tmp_path)
    assert path == tmp_path / "records" / "twins-cpu.json"
    kept = json.loads(path.read_text())
    assert kept["environment"] == AROUND and kept["details"] == {"threads": 2}
    assert kept["quantities"][0]["values"] == [0.9, 1.2, 0.8] and kept["quantities"][0]["median"] == 0.9
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| 0.9 (0.8 to 1.2, n=3) | <= 1.0: met | 0.1 to 2.0 |" in text and "12,346 tokens/s" in text
    record.write(result(values=[1.1]), AROUND, tmp_path)
    assert "<= 1.0: **not met**" in (tmp_path / "README.md").read_text()


def test_half_a_mark_is_refused_and_other_files_are_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("a page of its own\n")
    record.write(result(), AROUND, tmp_path)
    assert (tmp_path / "README.md").read_text() == "a page of its own\n"
    (tmp_path / "README.md").write_text(record.BEGIN)
    with pytest.raises(UserError, match="second mark"):
        record.update(tmp_path / "README.md")


@pytest.mark.parametrize(("goal", "met"), [("<= 1.0", True), ("< 1.0", False), (">= 1.0", True), ("> 1.0", False)])
def test_goals(goal, met):
    assert record.Quantity("x", "", [1.0], goal).met is met
    assert record.Quantity("x", "", [1.0]).met is None


def test_surroundings_name_what_a_number_depends_on():
    with record.surroundings() as around:
        assert set(around) == {"load_before"}
    assert {"load_after", "date", "commit", "command", "versions", "processor", "cores", "xla_flags"} <= set(around)
    assert around["command"].startswith("python -m launch") and around["cores"] >= 1


@pytest.mark.parametrize("flags", [{"repeats": 0}, {"steps": 2}])
def test_refusals(flags):
    with pytest.raises(UserError, match="--repeats"):
        bench.bench(None, name="train", **flags)


def test_records_name_no_place_on_the_machine():
    for path in (BENCHMARKS / "records").glob("*.json"):
        assert json.loads(path.read_text())["environment"]["load_before"] >= 0
        assert "/home/" not in path.read_text() and "/root/" not in path.read_text()
