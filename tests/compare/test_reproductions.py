import json
import pathlib
import shutil

import pytest

from maxlike.compare import reproductions, verdict
from maxlike.errors import UserError
from tests.compare import synthetic

ROOT = pathlib.Path(__file__).parents[2]


def test_the_page_is_what_the_verdicts_say():
    """Stale? `python -m maxlike.compare.reproductions` writes it anew."""
    page = (ROOT / reproductions.PAGE).read_text()
    assert page == reproductions.text(reproductions.read(ROOT / reproductions.VERDICTS))


def test_every_kept_verdict_has_its_picture_and_its_experiment():
    for slug, content in reproductions.read(ROOT / reproductions.VERDICTS).items():
        assert (ROOT / reproductions.VERDICTS / slug / "verdict.png").is_file()
        assert (ROOT / "experiments" / f"{content['experiment']}.gin").is_file()


@pytest.fixture
def repository(tmp_path):
    """A repository with the run of a comparison in it."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    root, _, _, found = synthetic.concluded()
    changed = found.content | {
        "experiment": "papers/sparse_models",
        "overlays": ["papers/sparse_models/h200"],
        "title": "Sparse | dense",
    }
    (run_dir / "verdict.json").write_text(verdict.dumps(changed))
    shutil.copyfile(root / "verdict.png", run_dir / "verdict.png")
    (tmp_path / "docs").mkdir()
    return tmp_path


def test_a_verdict_is_kept_and_shown(repository, capsys):
    assert reproductions.main(["--root", str(repository)]) == 0
    page = repository / "docs" / "reproductions.md"
    assert "No comparison has been run" in page.read_text()
    assert reproductions.main(["--root", str(repository), "--add", str(repository / "run")]) == 0
    text = page.read_text()
    for words in (
        "| **holds** |", "Sparse \\| dense", "3 arms x 3 seeds",
        "(../benchmarks/verdicts/sparse_models-h200/verdict.png)",
        "train/loss: sparse - dense = -0.3", "(#sparse-models-h200)", "## sparse-models-h200",
    ):  # fmt: skip
        assert words in text, words
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") in (6, 7) for line in table)


def test_what_is_no_verdict_is_refused(repository, tmp_path, capsys):
    assert reproductions.main(["--root", str(repository), "--add", str(repository / "docs")]) == 2
    assert "has no verdict.json" in capsys.readouterr().err
    other = repository / "benchmarks" / "verdicts" / "x" / "verdict.json"
    other.parent.mkdir(parents=True)
    for content, words in (("{", "is no verdict"), (json.dumps({"schema": 99}), "has the schema 99")):
        other.write_text(content)
        with pytest.raises(UserError, match=words):
            reproductions.read(repository / "benchmarks" / "verdicts")
