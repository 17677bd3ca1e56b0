"""The gin-facing class and the job that shows it."""

import types

import pytest

from maxlike.data import inspect, sources, train_tokenizer
from maxlike.data.data import Data
from maxlike.data.mixture import Mixture
from maxlike.data.tokenizers import Bytes, HuggingFace
from maxlike.errors import UserError

TEXT = sources.Text(paths="never/opened.txt")


def test_a_data_object_needs_no_files_until_batches_are_asked_for():
    data = Data(sources=TEXT, tokenizer=HuggingFace(path="never/opened.json"))
    assert list(data.sources) == ["train"] and data.validation is None
    with pytest.raises(UserError, match=r"Text\.paths: there is no file 'never/opened.txt'"):
        Data(sources=TEXT, tokenizer=Bytes()).train(sequence_length=8, batch_size=1, seed=0)
    with pytest.raises(UserError, match=r"Data\.validation is not set"):
        data.open_validation(sequence_length=8, batch_size=1)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"sources": {}}, r"Data\.sources is empty"),
        ({"sources": {"a": "a.txt"}}, "'a' is bound to 'a.txt'"),
        ({"validation": {}}, r"Data\.validation is empty"),
        ({"sources": {"a": TEXT, "b": TEXT}}, r"Data\.mixture is missing: .*\{'a': 1, 'b': 1\}"),
        ({"sources": {"a": TEXT}, "mixture": {"b": 1}}, "names 'b', but the sources are a"),
        ({"mixture": Mixture(phases=((0, {"x": 1}),))}, "names 'x', but the sources are train"),
        ({"packing": "first_fit"}, "must be 'concat' or 'best_fit'"),
        ({"workers": -1}, "must not be negative"),
    ],
)
def test_refusals(knobs, message):
    with pytest.raises(UserError, match=message):
        Data(**({"sources": TEXT, "tokenizer": Bytes()} | knobs))


def test_the_cache_knob_goes_before_the_environment(corpus, cache, tmp_path):
    Data(sources=corpus, tokenizer=Bytes(), cache=str(tmp_path / "mine")).train(sequence_length=8, batch_size=1, seed=0)
    assert (tmp_path / "mine" / "rows").is_dir() and not cache.exists()


def test_skipped_and_inexact_documents_are_shown(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a good long document"}\nnot json\n{"text": ""}\n')
    source = sources.Jsonl(paths=str(tmp_path / "a.jsonl"), on_malformed="skip")
    (row,) = Data(sources=source, tokenizer=Bytes()).train(sequence_length=8, batch_size=1, seed=0).describe()
    assert (row["documents"], row["skipped"], row["inexact"]) == (1, 2, 0)


@pytest.fixture
def experiment(corpus):
    data = Data(sources={"tales": corpus}, tokenizer=Bytes(), validation=corpus)
    return types.SimpleNamespace(data=data, sequence_length=24, batch_size=4, seed=0, steps=10)


def test_the_job_shows_documents_epochs_and_shares(experiment, capsys):
    inspect.data(experiment, None, step=3, rows=2, verify=True)
    shown = capsys.readouterr().out
    for piece, text in zip(*(call(3) for call in (batches_of(experiment).documents, batches_of(experiment).text))):
        assert (f"row {piece.row}: tales {piece.document}" in shown) == (piece.row < 2)
        assert piece.row >= 2 or text.split("\n")[0] in shown
    assert "Given before step 3" in shown and "realised" in shown
    assert "4 shards match their checksums" in shown


def batches_of(experiment):
    return experiment.data.train(sequence_length=24, batch_size=4, seed=0)


def test_the_job_trains_a_tokenizer_on_the_training_sources(experiment, tmp_path, capsys):
    train_tokenizer.train_tokenizer(experiment, None, vocab=270, output=str(tmp_path / "out" / "t.json"))
    tokenizer = HuggingFace(path=str(tmp_path / "out" / "t.json"))
    assert tokenizer.vocab_size == 270 and tokenizer.decode(tokenizer.encode("abc 日本")) == "abc 日本"
    assert "270 ids" in capsys.readouterr().out
    with pytest.raises(UserError, match="lower vocab=100000"):
        train_tokenizer.train_tokenizer(experiment, None, vocab=100_000, output=str(tmp_path / "no.json"))
