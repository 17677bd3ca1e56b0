"""Documents of text and pictures: how a picture is spelled in a text, and the tokenizer that reads it.

In a document's text a picture is BEGIN, the first 8 hexadecimal digits of the fingerprint of the image tokenizer that
made it, a character for each id, END; the characters are Unicode's private ones of plane 16. So a document stays text:
every source, the token layer and the mixture take it as any other, and a picture whose ids mean something else than the
model's is refused wherever it comes from.
"""

import functools
import re
from collections.abc import Iterable

import numpy as np

from maxlike.data import files
from maxlike.data.tokenizers import Tokenizer
from maxlike.errors import UserError

FIRST = 0x100000
BEGIN, END = "\U0010fffc", "\U0010fffd"
MOST_CODES = ord(BEGIN) - FIRST
DIGITS = 8
SHOWN = "<image>"
_PICTURE = re.compile(f"{BEGIN}([0-9a-f]{{{DIGITS}}})([\U00100000-\U0010fffb]*)({END}|\\Z)")


def spell(codes: Iterable[int], image_tokenizer: str) -> str:
    """The text of a picture's ids; image_tokenizer: the fingerprint."""
    return f"{open_picture(image_tokenizer)}{''.join(chr(FIRST + int(code)) for code in codes)}{END}"


def open_picture(image_tokenizer: str) -> str:
    """The text in front of a picture's ids: as the end of a prompt, it asks for a picture."""
    return BEGIN + image_tokenizer[:DIGITS]


class TextAndPictures(Tokenizer):
    """Text by a tokenizer of its own; each picture as a begin marker, its ids, and an end marker.

    Ids: 0 .. T - 1 the text's (T = text.vocab_size), T begin, T + 1 end, from T + 2 the picture's. So
    `LanguageModel.vocab = T + 2 + codes` and `LanguageModel.modality_starts = (T + 2,)`: the markers are text. A marker
    and a picture's id stand for 0 bytes of text; bits per byte of mixed rows therefore count the pictures' bits too,
    over the bytes of the text alone. Decoding shows a picture as <image>.

    text: a tokenizer such as HuggingFace. codes: ids of the image tokenizer, its vocabulary, 1..65532.
    image_tokenizer: its fingerprint, which `--job tokenize_images` prints.
    Refuses pictures made by another image tokenizer, and ids beyond `codes`. What only looks like a part of a picture
    is encoded as text; an open picture at the end of a text is begun and not ended.
    """

    def __init__(self, *, text: Tokenizer, codes: int, image_tokenizer: str):
        if not 1 <= codes <= MOST_CODES:
            raise UserError(f"TextAndPictures.codes={codes} must lie between 1 and {MOST_CODES}")
        if not re.fullmatch(f"[0-9a-f]{{{DIGITS},}}", image_tokenizer):
            raise UserError(
                f"TextAndPictures.image_tokenizer={image_tokenizer!r} must be the fingerprint that "
                "`--job tokenize_images` printed, of hexadecimal digits"
            )
        self.text, self.codes, self.image_tokenizer = text, codes, image_tokenizer

    @property
    def begin_id(self) -> int:
        return self.text.vocab_size

    @property
    def end_id(self) -> int:
        return self.text.vocab_size + 1

    @property
    def first_code_id(self) -> int:
        return self.text.vocab_size + 2

    @property
    def vocab_size(self) -> int:
        return self.first_code_id + self.codes

    @property
    def eos_id(self) -> int:
        return self.text.eos_id

    @property
    def bos_id(self) -> int:
        return self.text.bos_id

    @functools.cached_property
    def fingerprint(self) -> str:
        return files.digest("TextAndPictures", self.text.fingerprint, self.codes, self.image_tokenizer)

    @functools.cached_property
    def bytes_per_token(self) -> np.ndarray:
        return np.concatenate([self.text.bytes_per_token, np.zeros(2 + self.codes, np.int32)])

    def text_bytes(self, text: str) -> int:
        return len(_PICTURE.sub("", text).encode())

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        pieces = [_PICTURE.split(text) for text in texts]  # text, digits, codes, end, text, ...
        encoded = iter(self.text.encode_batch([piece for found in pieces for piece in found[::4]]))
        rows = []
        for found in pieces:
            row = [next(encoded)]
            for at in range(1, len(found), 4):
                row += [self._picture(*found[at : at + 3]), next(encoded)]
            rows.append(np.concatenate(row).astype(np.int32))
        return rows

    def _picture(self, digits: str, spelled: str, end: str) -> np.ndarray:
        if digits != self.image_tokenizer[:DIGITS]:
            raise UserError(
                f"a picture was made by the image tokenizer {digits} and TextAndPictures.image_tokenizer is "
                f"{self.image_tokenizer[:DIGITS]}: its ids mean something else; run `--job tokenize_images` again"
            )
        codes = np.array([ord(character) - FIRST for character in spelled], np.int32)
        if len(codes) and codes.max() >= self.codes:
            raise UserError(f"a picture has the id {codes.max()} and TextAndPictures.codes is {self.codes}: raise it")
        ends = [self.end_id] if end else []
        return np.concatenate([[self.begin_id], codes + self.first_code_id, ends]).astype(np.int32)

    def decode(self, ids) -> str:
        shown, run = [], []
        for i in [*(int(i) for i in ids), self.end_id]:
            if i < self.begin_id:
                run.append(i)
                continue
            if run:
                shown.append(self.text.decode(run))
                run = []
            if i == self.begin_id:
                shown.append(SHOWN)
        return "".join(shown)

    def pictures(self, ids) -> list[np.ndarray]:
        """The picture ids (from 0) after each begin marker, up to the first id that is not a picture's."""
        found, inside = [], False
        for i in (int(i) for i in ids):
            if i == self.begin_id:
                found.append([])
            inside = i == self.begin_id or (inside and i >= self.first_code_id)
            if inside and i >= self.first_code_id:
                found[-1].append(i - self.first_code_id)
        return [np.array(codes, np.int32) for codes in found]
