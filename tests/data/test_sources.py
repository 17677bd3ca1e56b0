"""Every source yields its documents, and says by file and place what is wrong with them."""

import collections
import gzip
import json
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from array_record.python import array_record_module
from hypothesis import given
from hypothesis import strategies as st

from maxlike.data import files, record_sources, sources
from maxlike.errors import UserError

AUSTEN = "package:experiments/data/austen/pride_and_prejudice.txt"


def read(source, skipped=None):
    skipped = collections.Counter() if skipped is None else skipped
    return [text for part in range(len(source.parts())) for _, text in source.read(part, skipped)]


def test_text_files_are_documents_and_separators_cut_them(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n \nthree")
    (tmp_path / "b.txt").write_text("four")
    assert read(sources.Text(paths=str(tmp_path / "*.txt"))) == ["one\n\ntwo\n \nthree", "four"]
    assert read(sources.Text(paths=str(tmp_path / "*.txt"), separator=r"\n\s*\n")) == ["one", "two", "three", "four"]
    assert read(sources.Text(paths=str(tmp_path / "a.txt"), separator=r"\n(?=t)")) == ["one\n", "two\n ", "three"]


@given(st.lists(st.text(alphabet="aé日🦊\n", min_size=1, max_size=20), min_size=1, max_size=3), st.data())
def test_byte_ranges_split_a_corpus_without_loss_or_overlap(tmp_path_factory, contents, data):
    folder = tmp_path_factory.mktemp("range")
    for number, content in enumerate(contents):
        (folder / f"{number}.txt").write_bytes(content.encode())
    total = sum(len(content.encode()) for content in contents)
    if total < 2:
        return
    held = data.draw(st.integers(1, total - 1))
    paths = str(folder / "*.txt")
    head = read(sources.Text(paths=paths, end_byte=-held))
    tail = read(sources.Text(paths=paths, start_byte=-held))
    assert "".join(head + tail) == "".join(contents)


def test_the_shipped_corpus_is_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (document,) = read(sources.Text(paths=AUSTEN, start_byte=-140_000))
    assert len(document.encode()) == 140_000


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "array_record", "array_record json"])
def test_formats_hold_the_same_documents(tmp_path, texts, form):
    lines = "".join(json.dumps({"meta": {"text": text}}) + "\n" for text in texts).encode()
    path = tmp_path / f"a.{form.split()[0]}"
    if form.startswith("jsonl"):
        write = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}[form]
        path.write_bytes(write(lines[:100]) + write(lines[100:]))  # two frames: what appending to a file makes
        source = sources.Jsonl(paths=str(path), field="meta.text")
    elif form == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), "body": texts}), path)
        source = sources.Parquet(paths=str(path), field="body")
    else:
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for text, line in zip(texts, lines.splitlines()):
            writer.write(text.encode() if form == "array_record" else line)
        writer.close()
        source = record_sources.ArrayRecord(paths=str(path), field="meta.text" if "json" in form else None)
    assert read(source) == texts


def test_fingerprint_follows_content_and_knobs_and_not_the_folder(tmp_path, cache):
    def fingerprint(folder, content, **knobs):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "a.txt").write_text(content)
        return sources.Text(paths=str(tmp_path / folder / "a.txt"), **knobs).fingerprint(cache)

    one = fingerprint("x", "hello")
    assert one == fingerprint("y", "hello")
    assert len({one, fingerprint("x", "hullo"), fingerprint("x", "hello", end_byte=-1)}) == 3


def test_digest_of_a_large_file_is_remembered_until_the_file_changes(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(files, "_HASH_EVERY_TIME", 0)
    monkeypatch.setattr(files, "_RACY_SECONDS", -1)
    file = tmp_path / "large.txt"
    file.write_text("one")
    first = files.content_digest(file, cache)
    monkeypatch.setattr(files, "sha256", lambda path: pytest.fail("hashed again"))
    assert files.content_digest(file, cache) == first
    monkeypatch.undo()
    monkeypatch.setattr(files, "_HASH_EVERY_TIME", 0)
    file.write_text("three")
    assert files.content_digest(file, cache) == files.sha256(file) != first


MALFORMED = {
    b'{"text": "cut': "is not one JSON object",
    b"[1]": "has no text under 'text'",
    b'{"text": 5}': "has no text under 'text'",
    b'{"text": "\xff"}': "byte 10 of the line is not valid UTF-8",
    b'{"text": "\\ud800"}': "lone surrogate",
}


@pytest.mark.parametrize("line", MALFORMED)
def test_malformed_json_lines_stop_by_place_or_are_counted(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "last"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:3") as caught:
        read(sources.Jsonl(paths=str(path)))
    assert MALFORMED[line] in str(caught.value)
    skipped = collections.Counter()
    assert read(sources.Jsonl(paths=str(path), on_malformed="skip"), skipped) == ["good", "last"]
    assert skipped.total() == 1


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_truncated_compressed_file_is_refused_by_name(tmp_path, compress):
    suffix = ".gz" if compress is gzip.compress else ".zst"
    path = tmp_path / f"a.jsonl{suffix}"
    lines = b"".join(b'{"text": "%d"}\n' % (i * 7919) for i in range(5000))
    path.write_bytes(compress(lines)[:-200])
    with pytest.raises(UserError, match=r"a\.jsonl.* is damaged after line|a\.jsonl.*:\d+ is not"):
        read(sources.Jsonl(paths=str(path)))


def test_invalid_utf8_in_text_is_refused_by_byte_or_skipped(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("é one\n\ntwo".encode() + b"\xff\n\nthree")
    with pytest.raises(UserError, match=r"a\.txt: byte 11 is not valid UTF-8.*on_malformed='skip'"):
        read(sources.Text(paths=str(path)))
    skipped = collections.Counter()
    source = sources.Text(paths=str(path), separator="\n\n", on_malformed="skip")
    assert read(source, skipped) == ["é one", "three"]
    assert skipped == {"invalid UTF-8": 1}


def test_parquet_refusals(tmp_path):
    good, bad = tmp_path / "good.parquet", tmp_path / "bad.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), good)
    bad.write_bytes(b"PAR1 this is not a table")
    with pytest.raises(UserError, match=r"good\.parquet: row 1 has no text"):
        read(sources.Parquet(paths=str(good)))
    assert read(sources.Parquet(paths=str(good), on_malformed="skip")) == ["a", "b"]
    with pytest.raises(UserError, match=r"no column Parquet\.field='body'; it has text"):
        read(sources.Parquet(paths=str(good), field="body"))
    with pytest.raises(UserError, match=r"bad\.parquet cannot be read as Parquet"):
        read(sources.Parquet(paths=str(bad)))


def test_damaged_array_record_is_refused(tmp_path):
    path = tmp_path / "a.array_record"
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for _ in range(500):
        writer.write(b"x" * 500)
    writer.close()
    whole = bytearray(path.read_bytes())
    whole[100_000] ^= 1
    path.write_bytes(whole)
    with pytest.raises(UserError, match="are damaged"):
        read(record_sources.ArrayRecord(paths=str(path)))
    path.write_bytes(whole[:-1000])
    with pytest.raises(UserError, match="is not a whole ArrayRecord file"):
        read(record_sources.ArrayRecord(paths=str(path)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda at: sources.Text(paths=f"{at}/no.txt"), "there is no file"),
        (lambda at: sources.Text(paths=f"{at}/empty.txt"), "empty.txt is empty"),
        (lambda at: sources.Text(paths=(f"{at}/a.txt", f"{at}/*a.txt")), "twice"),
        (lambda at: sources.Text(paths=()), "give one"),
        (lambda at: sources.Text(paths="package:nowhere/a.txt"), "no installed package 'nowhere'"),
        (lambda at: sources.Text(paths="package:experiments/../a.txt"), "leaves the package"),
        (lambda at: sources.Text(paths=f"{at}/a.txt", separator="("), "not a regular expression"),
        (lambda at: sources.Text(paths=f"{at}/a.txt", start_byte=9), "select no range of the 5 bytes"),
        (lambda at: sources.Text(paths=f"{at}/a.txt", start_byte=-9), "select no range of the 5 bytes"),
        (lambda at: sources.Jsonl(paths=f"{at}/a.txt", on_malformed="ignore"), "must be 'stop' or 'skip'"),
    ],
)
def test_refusals(tmp_path, make, message):
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match=message):
        read(make(tmp_path))


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("hello")
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"a\.txt cannot be read; change its permissions"):
        read(sources.Text(paths=str(tmp_path / "a.txt")))


@pytest.mark.parametrize("module", ["zstandard", "pyarrow.parquet"])
def test_a_missing_extra_is_named_with_its_install_line(tmp_path, monkeypatch, module):
    (tmp_path / "a.zst").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, module, None)
    kind = sources.Parquet if module == "pyarrow.parquet" else sources.Jsonl
    with pytest.raises(UserError, match=r"pip install 'maxlike\[data\]'"):
        read(kind(paths=str(tmp_path / "a.zst")))
