"""Exact round trips and exact bytes, for every tokenizer; the shipped one is what its script makes."""

import base64
import gzip
import itertools
import json
import pickle

import numpy as np
import pytest
import sentencepiece
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlike.data import files, tokenizers, train_tokenizer
from maxlike.data.sources import Text
from maxlike.data.tiktoken import Tiktoken
from maxlike.errors import UserError

SHIPPED = "package:experiments/data/austen/tokenizer.json"
HARD = "hello  world! f(x):...日本語 🦊 \r\n\t1234567 don't WE'RE <|endoftext|> <s> é\u0301 \n\n x "


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One tokenizer of each class, trained or written here."""
    folder = tmp_path_factory.mktemp("tokenizers")
    text = (HARD + "the cat sat on the mat, the end. ") * 30
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.split("\n")), model_prefix=str(folder / "spm"), vocab_size=340,
        model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    tokens = [bytes([i]) for i in range(256)] + [b"th", b"the", b" the", b"ca", b"cat", b" cat", b"12", b"123"]
    ranks = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    (folder / "ranks.tiktoken.gz").write_bytes(gzip.compress(ranks))
    return {
        "bytes": tokenizers.Bytes(),
        "huggingface": tokenizers.HuggingFace(path=SHIPPED),
        "sentencepiece": tokenizers.SentencePiece(path=str(folder / "spm.model")),
        "gpt2": Tiktoken(path=str(folder / "ranks.tiktoken.gz"), pattern="gpt2"),
        "cl100k": Tiktoken(path=str(folder / "ranks.tiktoken.gz"), pattern="cl100k"),
        "o200k": Tiktoken(path=str(folder / "ranks.tiktoken.gz"), pattern="o200k"),
    }


KINDS = ["bytes", "huggingface", "sentencepiece", "gpt2", "cl100k", "o200k"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(text=st.one_of(st.just(HARD), st.text(st.characters(codec="utf-8", exclude_characters="\u2581\0"), max_size=60)))
def test_round_trip_and_bytes_are_exact(made, kind, text):
    tokenizer = made[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.bytes_per_token[ids].sum() == len(text.encode())
    assert tokenizer.bytes_per_token.shape == (tokenizer.vocab_size,)
    assert not np.isin([tokenizer.eos_id, tokenizer.bos_id], ids).any()  # text never makes a special token
    assert tokenizer.bytes_per_token[[tokenizer.eos_id, tokenizer.bos_id]].tolist() == [0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_batches_pickles_and_specials(made, kind):
    tokenizer = made[kind]
    copy = pickle.loads(pickle.dumps(tokenizer))
    texts = [HARD, "", "the cat"]
    for one, many in zip(texts, copy.encode_batch(texts)):
        np.testing.assert_array_equal(tokenizer.encode(one), many)
    assert copy.fingerprint == tokenizer.fingerprint
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("the cat"), tokenizer.eos_id]) == "the cat"
    assert len({made[other].fingerprint for other in KINDS}) == len(KINDS)


def test_merges_found_from_ranks_are_those_of_the_reference(made):
    """Greedy merging by rank, written out, against the tokenizer built from the ranks."""
    ranks = made["gpt2"]._ranks

    def reference(piece):
        parts = [piece[i : i + 1] for i in range(len(piece))]
        while True:
            ranked = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
            if not ranked:
                return [ranks[part] for part in parts]
            at = min(ranked)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]

    for word in ("the", " the", "cathedral", " cat", "tthee", "thcat", "123"):
        assert made["gpt2"].encode(word).tolist() == reference(word.encode())


def test_ids_agree_with_the_tiktoken_package(made):
    tiktoken = pytest.importorskip("tiktoken")
    for kind in ("gpt2", "cl100k", "o200k"):
        from maxlike.data.tiktoken import _TIKTOKEN

        pattern, offset = _TIKTOKEN[kind]
        theirs = tiktoken.Encoding(kind, pat_str=pattern, mergeable_ranks=made[kind]._ranks, special_tokens={})
        assert made[kind].encode(HARD * 3).tolist() == theirs.encode_ordinary(HARD * 3)
        assert made[kind].eos_id == 264 + offset


def test_sentencepiece_with_its_own_normalizer_agrees_with_the_library(made):
    path = made["sentencepiece"].path
    theirs = sentencepiece.SentencePieceProcessor(model_file=path)
    ours = tokenizers.SentencePiece(path=path, normalizer="model")
    assert ours.encode("the cat").tolist() == theirs.encode("the cat")
    assert ours.fingerprint != made["sentencepiece"].fingerprint


def test_shipped_tokenizer_is_made_by_its_script_from_the_training_part_alone(tmp_path):
    training = Text(paths=train_tokenizer.AUSTEN, end_byte=-train_tokenizer.HELD_OUT_BYTES)
    path = train_tokenizer.write(train_tokenizer.train({"austen": training}, vocab=2048), str(tmp_path / "t.json"))
    assert path.read_bytes() == files.expand(SHIPPED, "shipped")[0].read_bytes()
    shipped = tokenizers.HuggingFace(path=SHIPPED)
    assert (shipped.vocab_size, shipped.eos_id, shipped.bos_id) == (2048, 0, 0)


def test_refusals(tmp_path):
    word_piece = hf.Tokenizer(hf.models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    word_piece.save(str(tmp_path / "wordpiece.json"))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f g"] * 9), model_prefix=str(tmp_path / "plain"), vocab_size=12,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "junk").write_text("{}")
    (tmp_path / "ranks").write_text("YQ== 0\nnot a rank line\n")
    (tmp_path / "few").write_text("YQ== 0\n")
    cases = [
        (tokenizers.HuggingFace(path=str(tmp_path / "wordpiece.json")), "not byte-level"),
        (tokenizers.HuggingFace(path=str(tmp_path / "junk")), "is not a tokenizer.json"),
        (tokenizers.HuggingFace(path=str(tmp_path / "missing.json")), "there is no file"),
        (tokenizers.HuggingFace(path=SHIPPED, eos="</s>"), r"eos='</s>' is not in .*<\|endoftext\|>"),
        (tokenizers.SentencePiece(path=str(tmp_path / "plain.model")), "no byte fallback"),
        (tokenizers.SentencePiece(path=str(tmp_path / "junk")), "is not a SentencePiece model"),
        (Tiktoken(path=str(tmp_path / "ranks"), pattern="gpt2"), "ranks:2 is not 'base64 rank'"),
        (Tiktoken(path=str(tmp_path / "few"), pattern="gpt2"), "is incomplete"),
    ]
    for tokenizer, message in cases:
        with pytest.raises(UserError, match=message):
            _ = tokenizer.eos_id
    with pytest.raises(UserError, match="must be one of 'gpt2'"):
        Tiktoken(path="x", pattern="llama")
    with pytest.raises(UserError, match="vocab=100 is smaller than 257"):
        train_tokenizer.train({}, vocab=100)


def test_special_tokens_of_a_file_stand_for_no_bytes(tmp_path):
    content = json.loads(files.expand(SHIPPED, "shipped")[0].read_text())
    added = content["added_tokens"][0]
    content["added_tokens"] += [
        added | {"id": 2048, "content": "<tool>"},
        added | {"id": 2049, "content": "zz!", "special": False},
    ]
    (tmp_path / "t.json").write_text(json.dumps(content))
    tokenizer = tokenizers.HuggingFace(path=str(tmp_path / "t.json"), bos="<tool>")
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (2050, 2048)
    assert tokenizer.bytes_per_token[2048:].tolist() == [0, 3]
    assert tokenizer.decode(tokenizer.encode("a <tool> zz! b")) == "a <tool> zz! b"
