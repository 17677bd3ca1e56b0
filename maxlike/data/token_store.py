"""The token layer: one record a document, its ids in the smallest unsigned type that holds the vocabulary.

A document is bos + tokens + eos. Documents lie in the order of a hash of (part, index), so that a sequential read is
already in random order, whatever the order of the files. Built in two passes, both parallel and both resumable: each
part of the source is encoded into a scratch file, then each shard gathers its documents by hash.
"""

import collections
import hashlib
import json
import os
import pathlib

import numpy as np

from maxlike.data import files, store
from maxlike.data.sources import Source
from maxlike.data.tokenizers import Tokenizer
from maxlike.errors import UserError

VERSION = 1  # of the layout and of everything that decides the content
SHUFFLE_SEED = 0  # fixed: the order of a run comes from its own seed, on top, without a rebuild
SHARD_BYTES = 128 << 20  # of stored text a shard
_BATCH_CHARACTERS = 1 << 20  # encoded at once
# What is known of a document: where its hash puts it, where it came from, where its tokens lie in the scratch file.
_ENTRY = np.dtype([(name, "<u8") for name in ("high", "low", "part", "index", "start", "tokens", "bytes")])


class TokenStore:
    """A finished token layer. `documents`, `tokens` (bos and eos included) and `bytes` (UTF-8, of the text) in all."""

    def __init__(self, directory: pathlib.Path, manifest: dict):
        self.directory, self.manifest = directory, manifest
        self.documents, self.tokens, self.bytes = (manifest[name] for name in ("documents", "tokens", "bytes"))
        self.dtype = np.dtype(manifest["dtype"])
        self.fingerprint: str = manifest["fingerprint"]
        self.records = store.Records(directory, manifest["shards"])

    def entries(self, shard: int) -> np.ndarray:
        """What is known of each document of a shard, in record order (a structured array mapped from disk)."""
        path = self.directory / _entries_name(self.manifest["shards"][shard]["file"])
        return np.load(path, mmap_mode="r", allow_pickle=False)

    def lengths(self) -> np.ndarray:
        """Tokens of every document, in record order: int64 [documents]."""
        shards = range(len(self.manifest["shards"]))
        return np.concatenate([self.entries(shard)["tokens"] for shard in shards]).astype(np.int64)

    def name(self, document: int) -> str:
        """`part:index` of a document given by its record number."""
        shard, inside = self.records.locate(document)
        entry = self.entries(shard)[inside]
        return f"{self.manifest['parts'][int(entry['part'])]['name']}:{int(entry['index'])}"

    def read(self, documents: np.ndarray) -> list[np.ndarray]:
        """The tokens of documents."""
        return [np.frombuffer(record, self.dtype) for record in self.records.read(documents)]


def _entries_name(shard_file: str) -> str:
    return shard_file.replace(".array_record", ".entries.npy")


def fingerprint(source: Source, tokenizer: Tokenizer, cache: pathlib.Path) -> str:
    """Identifies a token layer: the documents, the tokenizer, and the version of this file."""
    ends = [tokenizer.bos_id, tokenizer.eos_id]
    return files.digest("tokens", VERSION, SHUFFLE_SEED, source.fingerprint(cache), tokenizer.fingerprint, ends)


def build(name: str, source: Source, tokenizer: Tokenizer, *, cache: pathlib.Path, workers: int) -> TokenStore:
    """The token layer of a source; `name` is the source's, for messages. Opens it when it is already there."""
    identity = fingerprint(source, tokenizer, cache)
    directory = cache / "tokens" / identity
    manifest = store.read_manifest(directory)
    if manifest is None:
        with store.building(directory):
            manifest = store.read_manifest(directory)  # somebody may have built it while we waited
            if manifest is None:
                manifest = _build(name, source, tokenizer, directory, identity, workers)
    return TokenStore(directory, manifest)


def _build(
    name: str, source: Source, tokenizer: Tokenizer, directory: pathlib.Path, identity: str, workers: int
) -> dict:
    parts = source.parts()
    count = max(1, -(-sum(size for _, size in parts) // SHARD_BYTES))
    scratch = directory / "scratch"
    scratch.mkdir(exist_ok=True)
    label = f"Encoding the documents of {name!r}"
    jobs = [(source, tokenizer, part, scratch) for part in range(len(parts))]
    facts = store.run_jobs(encode_part, jobs, workers, label)
    if not any(fact["documents"] for fact in facts):
        raise UserError(f"Data source {name!r} holds no documents; mend its paths, field or separator")
    dtype = token_dtype(tokenizer.vocab_size)
    jobs = [(scratch, directory / store.shard_name(shard, count), shard, count, dtype.str) for shard in range(count)]
    shards = [shard for shard in store.run_jobs(gather_shard, jobs, workers, label) if shard["records"]]
    totals = {key: sum(fact[key] for fact in facts) for key in ("documents", "tokens", "bytes", "inexact")}
    if any(totals[key] != sum(shard[key] for shard in shards) for key in ("tokens", "bytes")):
        raise RuntimeError(f"the shards of {directory} do not add up to its parts")
    skipped = sum((collections.Counter(fact["skipped"]) for fact in facts), collections.Counter())
    manifest = totals | {
        "kind": "tokens", "version": VERSION, "fingerprint": identity, "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size, "dtype": dtype.str, "eos_id": tokenizer.eos_id, "bos_id": tokenizer.bos_id,
        "shuffle_seed": SHUFFLE_SEED, "skipped": dict(skipped), "shards": shards,
        "parts": [{"name": part, "documents": fact["documents"]} for (part, _), fact in zip(parts, facts)],
    }  # fmt: skip
    store.write_manifest(directory, manifest)
    store.discard(scratch)
    return manifest


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where it holds every id, else uint32 (both little-endian)."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def document_hash(part: int, index: int) -> bytes:
    """16 bytes that decide a document's shard (the first four) and its place there."""
    return hashlib.blake2b(f"{SHUFFLE_SEED}:{part}:{index}".encode(), digest_size=16).digest()


def encode_part(job: tuple[Source, Tokenizer, int, pathlib.Path]) -> dict:
    """Encode one part of a source into a scratch file of tokens and one of entries. Keeps a part already done."""
    source, tokenizer, part, scratch = job
    done = scratch / f"{part:05d}.json"
    if done.is_file():
        return json.loads(done.read_text())
    dtype, table = token_dtype(tokenizer.vocab_size), tokenizer.bytes_per_token
    skipped: collections.Counter = collections.Counter()
    entries, start, inexact = [], 0, 0
    tokens_path, entries_path = scratch / f"{part:05d}.tokens", scratch / f"{part:05d}.npy"
    with open(files.temporary(tokens_path), "wb") as file:
        for batch in _batches(source.read(part, skipped)):
            for (index, text), ids in zip(batch, tokenizer.encode_batch([text for _, text in batch])):
                if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
                    raise RuntimeError(f"an id of document {index} is outside the vocabulary of {tokenizer.vocab_size}")
                size = tokenizer.text_bytes(text)
                inexact += int(table[ids].sum()) != size
                document = np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]]).astype(dtype)
                file.write(document.tobytes())
                key = document_hash(part, index)
                high, low = int.from_bytes(key[:8], "big"), int.from_bytes(key[8:], "big")
                entries.append((high, low, part, index, start, len(document), size))
                start += len(document)
    os.replace(files.temporary(tokens_path), tokens_path)
    table = np.array(entries, _ENTRY)
    _save(entries_path, table)
    facts = {
        "documents": len(entries), "tokens": start, "bytes": int(table["bytes"].sum()), "inexact": int(inexact),
        "skipped": dict(skipped),
    }  # fmt: skip
    files.replace(done, json.dumps(facts).encode())
    return facts


def _batches(documents):
    """Documents in lists of about a megabyte: the tokenizer is faster on many, and memory stays bounded."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document[1])
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _save(path: pathlib.Path, array: np.ndarray) -> None:
    with open(files.temporary(path), "wb") as file:
        np.save(file, array, allow_pickle=False)
    os.replace(files.temporary(path), path)


def gather_shard(job: tuple[pathlib.Path, pathlib.Path, int, int, str]) -> dict:
    """Write one shard: the documents of all parts whose hash falls into it, in the order of the hash."""
    scratch, path, shard, count, dtype = job
    known = store.finished_shard(path)
    if known is not None:
        return known
    parts = sorted(scratch.glob("*.npy"))
    tables = [np.load(part, mmap_mode="r", allow_pickle=False) for part in parts]
    chosen = np.concatenate([table[(table["high"] >> np.uint64(32)) % np.uint64(count) == shard] for table in tables])
    chosen = chosen[np.lexsort((chosen["low"], chosen["high"]))]
    tokens = {int(part.stem): _map(part.with_suffix(".tokens"), dtype) for part in parts}

    def records():
        for entry in chosen:
            start = int(entry["start"])
            yield tokens[int(entry["part"])][start : start + int(entry["tokens"])].tobytes()

    index = path.parent / _entries_name(path.name)
    _save(index, chosen)
    return store.write_shard(
        path, records(), index=index, tokens=int(chosen["tokens"].sum()), bytes=int(chosen["bytes"].sum())
    )


def _map(path: pathlib.Path, dtype: str) -> np.ndarray:
    """A scratch file mapped from disk (an empty one cannot be)."""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)
