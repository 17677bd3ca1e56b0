"""Small corpora and a cache of the test's own."""

import json
import random

import hypothesis
import pytest

from maxlike.data import sources

# A busy machine is slow, not wrong.
hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("MAXLIKE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def texts():
    """Forty documents of 1 to 200 characters, some of them not ASCII."""
    draw = random.Random(0)
    return ["".join(draw.choice("abcdefg \né日🦊") for _ in range(draw.randint(1, 200))) for _ in range(40)]


@pytest.fixture
def corpus(tmp_path, texts):
    """The same documents in three JSON lines files."""
    for number in range(3):
        lines = [json.dumps({"text": text}) for text in texts[number::3]]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    return sources.Jsonl(paths=str(tmp_path / "*.jsonl"))
