"""Pieces add up to the whole text, half characters and half stop strings are held back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlike.data.tokenizers import Bytes, HuggingFace
from maxlike.decode.text_stream import TextStream

decode = Bytes().decode


def pieces(ids, **knobs) -> list[str]:
    stream = TextStream(knobs.pop("decode", decode), **knobs)
    return [*(stream.push(i) for i in ids), stream.finish()]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20).filter(lambda text: "\ufffd" not in text))
def test_pieces_add_up_and_are_whole_characters(text):
    out = pieces(Bytes().encode(text))
    assert "".join(out) == text
    assert not any("\ufffd" in piece for piece in out)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=20))
def test_bytes_that_are_no_text_are_left_out_and_the_rest_is_kept(raw):
    assert "".join(pieces(list(raw))) == raw.decode(errors="replace").replace("\ufffd", "")


def test_a_character_comes_when_its_last_byte_does():
    assert pieces(Bytes().encode("a€b")) == ["a", "", "", "€", "b", ""]


def test_real_tokenizer():
    tokenizer = HuggingFace(path="package:experiments/data/austen/tokenizer.json")
    text = "“Indeed!” — naïve 你好 🙂 said Elizabeth."
    ids = tokenizer.encode(text)
    assert "".join(pieces(ids, decode=tokenizer.decode, prompt=tokenizer.encode("Well, "))) == text


def test_the_prompt_decides_whether_a_word_begins():
    words = ["▁the", "▁cat", "s"]

    def decode(ids):  # SentencePiece drops the space of the first word
        return "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    assert "".join(pieces([1, 2], decode=decode, prompt=[0])) == " cats"
    assert "".join(pieces([1, 2], decode=decode)) == "cats"


@settings(max_examples=300, deadline=None)
@given(st.text("abé", max_size=16), st.lists(st.text("abé", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string(text, stop):
    stream = TextStream(decode, stop=stop)
    out = ""
    for i in Bytes().encode(text):
        out += stream.push(i)
        assert not any(s in out for s in stop)
        assert text.startswith(out)
    out += stream.finish()
    assert stream.stopped == any(s in text for s in stop)
    # The first to be complete counts, the longest of several; nothing of it and nothing behind it comes out.
    if stream.stopped:
        seen = text[: min(text.index(s) + len(s) for s in stop if s in text)]
        assert out == seen[: min(seen.index(s) for s in stop if s in seen)]
    else:
        assert out == text


@pytest.mark.parametrize(("text", "expected"), [("xEN", "xEN"), ("xENDy", "x"), ("xENEND", "xEN")])
def test_half_a_stop_string_is_held_back_until_it_is_decided(text, expected):
    ids = np.frombuffer(text.encode(), np.uint8)
    stream = TextStream(decode, stop=["END"])
    out = [stream.push(i) for i in ids]
    assert out[1] == out[2] == ""
    assert "".join(out) + stream.finish() == expected
