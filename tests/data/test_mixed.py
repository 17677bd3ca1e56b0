"""Documents of text and pictures: round trips, markers, exact bytes, refusals."""

import json

import numpy as np
import pytest

from maxlike import config
from maxlike.data import token_store
from maxlike.data.mixed import BEGIN, END, TextAndPictures, open_picture, spell
from maxlike.data.sources import Jsonl
from maxlike.data.tokenizers import Bytes
from maxlike.errors import UserError

MADE_BY = "0123456789abcdef"


@pytest.fixture
def mixed():
    return TextAndPictures(text=Bytes(), codes=20, image_tokenizer=MADE_BY)


def test_a_picture_becomes_its_ids_between_markers(mixed):
    assert (mixed.begin_id, mixed.end_id, mixed.first_code_id, mixed.vocab_size) == (257, 258, 259, 279)
    text = f"a cat\n{spell([0, 19, 4], MADE_BY)}é{spell([], MADE_BY)}{spell([7], MADE_BY)}"
    ids = mixed.encode(text)
    cat = [*b"a cat\n", 257, 259, 278, 263, 258, *"é".encode(), 257, 258, 257, 266, 258]
    assert ids.dtype == np.int32 and ids.tolist() == cat
    assert mixed.decode(ids) == "a cat\n<image>é<image><image>"
    assert [codes.tolist() for codes in mixed.pictures(ids)] == [[0, 19, 4], [], [7]]
    assert mixed.bytes_per_token[ids].sum() == mixed.text_bytes(text) == len("a cat\né".encode())
    assert mixed.decode(ids[:8]) == "a cat\n<image>"  # text that grows never changes what was shown


def test_text_alone_is_the_text_tokenizers(mixed):
    texts = ["plain", "", "häßlich 🦊", "\U00100003 private", f"half a picture {BEGIN}01", f"{END}{END}"]
    for ours, theirs, text in zip(mixed.encode_batch(texts), Bytes().encode_batch(texts), texts):
        np.testing.assert_array_equal(ours, theirs)
        assert mixed.decode(ours) == text


def test_a_prompt_can_ask_for_a_picture(mixed):
    assert mixed.encode("cat\n" + open_picture(MADE_BY)).tolist() == [*b"cat\n", 257]
    assert mixed.encode("cat" + spell([3, 4], MADE_BY)[:-1]).tolist() == [*b"cat", 257, 262, 263]


def test_the_token_layer_counts_text_alone(mixed, tmp_path, cache):
    documents = [f"one {spell([1, 2], MADE_BY)}", "two"]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    built = token_store.build("d", Jsonl(paths=str(tmp_path / "d.jsonl")), mixed, cache=cache, workers=0)
    assert (built.documents, built.bytes, built.manifest["inexact"]) == (2, 7, 0)
    assert built.tokens == (4 + 4 + 2) + (3 + 2)


def test_fingerprint_is_of_all_that_decides_ids(mixed):
    others = [
        TextAndPictures(text=Bytes(), codes=21, image_tokenizer=MADE_BY),
        TextAndPictures(text=Bytes(), codes=20, image_tokenizer="f" * 16),
    ]
    assert len({mixed.fingerprint, *(other.fingerprint for other in others)}) == 3
    assert TextAndPictures(text=Bytes(), codes=20, image_tokenizer=MADE_BY).fingerprint == mixed.fingerprint


def test_refuses(mixed):
    with pytest.raises(UserError, match="made by the image tokenizer ffffffff"):
        mixed.encode(f"x{spell([1], 'f' * 32)}")
    with pytest.raises(UserError, match=r"the id 20 and TextAndPictures\.codes is 20"):
        mixed.encode(spell([20], MADE_BY))
    with pytest.raises(UserError, match="codes=0"):
        TextAndPictures(text=Bytes(), codes=0, image_tokenizer=MADE_BY)
    with pytest.raises(UserError, match="fingerprint"):
        TextAndPictures(text=Bytes(), codes=5, image_tokenizer="tokenizer")


def test_a_model_that_takes_text_for_pictures_is_refused():
    experiment = config.load("families/moma", bindings=["first_image_id = 2049"])
    with pytest.raises(UserError, match=r"set it to \(2050,\)"):
        experiment.check_vocabulary()
    config.load("families/moma").check_vocabulary()
