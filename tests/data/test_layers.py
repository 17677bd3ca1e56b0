"""Token and row layers: complete, shuffled, the same after a kill or with more workers, refused when damaged."""

import hashlib
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlike.data import files, reader, rows, sources, store, token_store, tokenizers
from maxlike.data.rows import PADDING
from maxlike.errors import UserError

BYTES = tokenizers.Bytes()
ENVIRONMENT = os.environ | {"PYTHONPATH": str(pathlib.Path(store.__file__).parents[2])}


def build_tokens(source, cache, workers=0, tokenizer=BYTES):
    return token_store.build("corpus", source, tokenizer, cache=cache, workers=workers)


def build_rows(tokens, cache, length, packing, workers=0):
    return rows.build("corpus", tokens, length=length, packing=packing, cache=cache, workers=workers)


def digest(directory):
    """Of every file of a finished store."""
    content = {file.name: file.read_bytes() for file in sorted(directory.iterdir()) if file.is_file()}
    assert not list(directory.glob("*.tmp"))
    return hashlib.sha256(repr(sorted(content.items())).encode()).hexdigest()


@pytest.fixture
def small_shards(monkeypatch):
    """Several shards of a few kilobytes."""
    monkeypatch.setattr(token_store, "SHARD_BYTES", 1500)
    monkeypatch.setattr(rows, "SHARD_TOKENS", 1000)


def test_each_document_is_a_record_under_its_own_name(corpus, texts, cache, small_shards):
    tokens = build_tokens(corpus, cache)
    assert len(tokens.manifest["shards"]) > 2
    assert tokens.documents == len(texts) == len(tokens.lengths())
    found = {tokens.name(number): record for number, record in enumerate(tokens.read(np.arange(tokens.documents)))}
    named = {f"{number % 3}.jsonl:{number // 3 + 1}": text for number, text in enumerate(texts)}
    assert {name: BYTES.decode(record[1:-1]) for name, record in found.items()} == named
    assert all(record[0] == BYTES.bos_id and record[-1] == BYTES.eos_id for record in found.values())
    assert tokens.bytes == sum(len(text.encode()) for text in texts)
    assert tokens.tokens == tokens.bytes + 2 * len(texts) == tokens.lengths().sum()
    assert tokens.dtype == np.uint16 and tokens.manifest["inexact"] == 0
    for shard in range(len(tokens.manifest["shards"])):
        entries = tokens.entries(shard)
        keys = list(zip(entries["high"].tolist(), entries["low"].tolist()))
        assert keys == sorted(keys)


def test_hash_order_is_uniform_and_uncorrelated_with_the_source():
    """Chi-square of documents a shard, and of the order's lag-one steps being up or down."""
    hashes = [token_store.document_hash(part, index) for part in range(20) for index in range(500)]
    shards = np.array([int.from_bytes(value[:4], "big") % 40 for value in hashes])
    assert scipy.stats.chisquare(np.bincount(shards, minlength=40)).pvalue > 1e-3
    parts = np.argsort([value.hex() for value in hashes]) // 500
    same = int((parts[1:] == parts[:-1]).sum())
    assert scipy.stats.binomtest(same, len(parts) - 1, 499 / 9999).pvalue > 1e-3


@pytest.mark.parametrize("count", [97, reader._SMALL + 7])
def test_epoch_orders_are_permutations_uniform_and_different(count):
    epochs = [[reader.row_of(epoch * count + i, count, 3, "s") for i in range(min(count, 4000))] for epoch in (0, 1)]
    assert epochs[0] != epochs[1]
    for order in epochs:
        assert len(set(order)) == len(order) and 0 <= min(order) <= max(order) < count
        ups = sum(a < b for a, b in itertools.pairwise(order))
        assert abs(ups - len(order) / 2) < 4 * np.sqrt(len(order) / 12) + 1
    places = np.array([reader.small_order(16, seed)[0] for seed in range(3200)])
    assert scipy.stats.chisquare(np.bincount(places, minlength=16)).pvalue > 1e-3


def test_processes_build_the_same_bytes(corpus, cache, tmp_path, small_shards):
    here, there = build_tokens(corpus, cache), build_tokens(corpus, tmp_path / "other", workers=2)
    assert digest(here.directory) == digest(there.directory)
    one, two = (build_rows(here, place, 32, "concat", n) for place, n in ((cache, 0), (tmp_path / "other", 2)))
    assert len(one.manifest["shards"]) > 2
    assert digest(one.directory) == digest(two.directory)


KILLED = """
import os, signal, sys, json
from maxlike.data import sources, store, token_store, tokenizers, rows
import pathlib
paths, cache, fatal = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3])
token_store.SHARD_BYTES, rows.SHARD_TOKENS = 1500, 1000
written = 0
write = store.files.replace
def replace(path, content):
    global written
    written += 1
    if written == fatal:
        path.with_suffix(".half.tmp").write_bytes(content[:3])
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, content)
store.files.replace = replace
tokens = token_store.build("c", sources.Jsonl(paths=paths), tokenizers.Bytes(), cache=cache, workers=0)
rows.build("c", tokens, length=32, packing="best_fit", cache=cache, workers=0)
"""


def test_a_killed_build_goes_on_to_the_same_bytes(corpus, cache, tmp_path, small_shards):
    """Killed while it encodes, while it gathers, before its manifest and while it packs; then run through."""
    tokens = build_tokens(corpus, cache)
    packed = build_rows(tokens, cache, 32, "best_fit")
    other = tmp_path / "other"
    shards = len(tokens.manifest["shards"])
    for fatal in (2, shards, 2, 4):
        command = [sys.executable, "-c", KILLED, corpus.paths, str(other), str(fatal)]
        assert subprocess.run(command, env=ENVIRONMENT).returncode == -signal.SIGKILL
    again = build_tokens(corpus, other)
    assert digest(again.directory) == digest(tokens.directory)
    assert digest(build_rows(again, other, 32, "best_fit").directory) == digest(packed.directory)


def test_finished_shards_are_kept_and_damaged_ones_made_again(corpus, cache, tmp_path, small_shards, monkeypatch):
    whole = build_tokens(corpus, tmp_path / "whole")
    monkeypatch.setattr(store, "write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build_tokens(corpus, cache)
    monkeypatch.undo()
    monkeypatch.setattr(token_store, "SHARD_BYTES", 1500)
    (directory,) = (cache / "tokens").iterdir()
    first, second, *_ = sorted(directory.glob("*.array_record"))
    flip(first, 100)
    made = second.stat().st_mtime_ns, second.stat().st_ino
    monkeypatch.setattr(token_store, "_batches", lambda documents: pytest.fail("encoded again"))
    assert digest(build_tokens(corpus, cache).directory) == digest(whole.directory)
    assert (second.stat().st_mtime_ns, second.stat().st_ino) == made


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_two_processes_may_build_the_same_store(corpus, cache, small_shards, tmp_path):
    script = KILLED.replace("store.files.replace = replace", "")
    command = [sys.executable, "-c", script, corpus.paths, str(cache), "0"]
    both = [subprocess.Popen(command, env=ENVIRONMENT) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    there = build_tokens(corpus, tmp_path / "alone")
    assert digest(build_tokens(corpus, cache).directory) == digest(there.directory)


def stream_of(tokens):
    return np.concatenate(tokens.read(np.arange(tokens.documents)))


@pytest.mark.parametrize("length", [1, 7, 64, 5000])
def test_concat_rows_restore_the_stream(corpus, cache, length, monkeypatch):
    monkeypatch.setattr(rows, "SHARD_TOKENS", 1000)
    tokens = build_tokens(corpus, cache)
    packed = build_rows(tokens, cache, length, "concat")
    stream = stream_of(tokens)
    found, pieces, counts = packed.read(np.arange(packed.count))
    assert packed.count == -(-(len(stream) - 1) // length)
    restored = np.concatenate([found[0, :1], found[:, 1:].reshape(-1)])
    np.testing.assert_array_equal(restored[: len(stream)], stream)
    assert packed.padding == len(restored) - len(stream) < length
    assert (restored[len(stream) :] == BYTES.eos_id).all()
    check_pieces(tokens, found, pieces, counts)
    read = pieces[(pieces[:, 0] != PADDING) & (pieces[:, 2] > 1)]  # a single token is no input and target
    times = np.bincount(read[:, 0], minlength=tokens.documents)
    assert times.min() > 0 and packed.cut == (times > 1).sum()


def check_pieces(tokens, found, pieces, counts):
    """Each piece is what it says of its document, and the pieces fill the rows."""
    documents = tokens.read(np.arange(tokens.documents))
    assert counts.sum() == len(pieces) and pieces[:, 2].sum() == found.size and (pieces[:, 2] > 0).all()
    parts = np.split(found.reshape(-1), np.cumsum(pieces[:, 2])[:-1])
    for part, (document, offset, size) in zip(parts, pieces):
        if document != PADDING:
            np.testing.assert_array_equal(part, documents[document][offset : offset + size])


@pytest.mark.parametrize("length", [5, 40, 400])
def test_best_fit_rows_hold_each_document_once(corpus, cache, length, small_shards):
    tokens = build_tokens(corpus, cache)
    packed = build_rows(tokens, cache, length, "best_fit")
    found, pieces, counts = packed.read(np.arange(packed.count))
    check_pieces(tokens, found, pieces, counts)
    real = pieces[pieces[:, 0] != PADDING]
    for document, size in enumerate(tokens.lengths()):
        own = real[real[:, 0] == document]
        own = own[np.argsort(own[:, 1])]
        targets = [t for _, offset, n in own.tolist() for t in range(offset + 1, offset + n)]
        assert targets == list(range(1, size))  # every token but the first is a target once
        assert len(own) == 1 or size > length + 1
    assert packed.cut == sum(size > length + 1 for size in tokens.lengths())
    assert packed.padding == pieces[pieces[:, 0] == PADDING][:, 2].sum()


@settings(max_examples=60)
@given(st.lists(st.integers(2, 60), min_size=1, max_size=60), st.integers(1, 50))
def test_best_fit_never_overfills_and_wastes_less_than_naive(lengths, length):
    packed = rows.best_fit(lengths, length)
    sizes = [sum(size for _, _, size in row) for row in packed]
    assert all(0 < size <= length + 1 for size in sizes)
    assert sum(1 for size in sizes if 2 * size <= length + 1) <= 1  # two such rows would have been one


def test_an_unchanged_store_is_opened_and_a_changed_one_built_anew(corpus, cache, tmp_path):
    tokens = build_tokens(corpus, cache)
    before = tokens.directory.stat().st_mtime_ns
    assert build_tokens(corpus, cache).fingerprint == tokens.fingerprint
    assert tokens.directory.stat().st_mtime_ns == before
    (tmp_path / "0.jsonl").write_text(json.dumps({"text": "other"}) + "\n")
    assert build_tokens(corpus, cache).fingerprint != tokens.fingerprint
    fingerprints = {
        build_rows(tokens, cache, n, packing).fingerprint for n in (8, 9) for packing in rows.Packing.__args__
    }
    assert len(fingerprints) == 4


def test_damage_is_refused_by_name(corpus, cache):
    tokens = build_tokens(corpus, cache)
    packed = build_rows(tokens, cache, 16, "concat")
    (shard,) = packed.directory.glob("*.array_record")
    assert store.verify(packed.directory) == 1
    flip(shard, shard.stat().st_size // 2)
    with pytest.raises(UserError, match=r"00000-of-00001\.array_record is damaged \(its checksum"):
        store.verify(packed.directory)
    with pytest.raises(UserError, match=r"00000-of-00001\.array_record is damaged"):
        build_rows(tokens, cache, 16, "concat").read(np.arange(packed.count))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"bytes long instead of \d+; remove .* and it is built again"):
        build_rows(tokens, cache, 16, "concat")
    shard.unlink()
    with pytest.raises(UserError, match="is missing; remove"):
        build_rows(tokens, cache, 16, "concat")
    (packed.directory / store.MANIFEST).write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        build_rows(tokens, cache, 16, "concat")


def test_other_refusals(tmp_path, cache):
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match="'corpus' holds no documents"):
        build_tokens(sources.Jsonl(paths=str(tmp_path / "blank.jsonl")), cache)
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(UserError, match=r"cannot be written under .*set Data\.cache"):
        build_tokens(sources.Text(paths=str(tmp_path / "file")), tmp_path / "file")
    with pytest.raises(UserError, match="holds no finished store"):
        store.verify(tmp_path)
    with pytest.raises(UserError, match="sequence_length=0"):
        build_rows(build_tokens(sources.Text(paths=str(tmp_path / "file")), cache), cache, 0, "concat")


def test_no_space_left_is_refused_with_the_knob(corpus, cache, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(files, "replace", full)
    with pytest.raises(UserError, match=r"No space left.*MAXLIKE_CACHE"):
        build_tokens(corpus, cache)


def test_ids_beyond_sixteen_bits_take_uint32():
    assert token_store.token_dtype(1 << 16) == np.uint16
    assert token_store.token_dtype((1 << 16) + 1) == np.uint32
