"""OpenAI's vocabularies (GPT-2, cl100k, o200k) from their rank files, without the tiktoken package.

A rank file lists tokens in the order in which merges made them; the merges themselves are found again by encoding each
token with the tokens before it.
"""

import base64
import binascii
import functools
import gzip
from typing import Literal

import numpy as np
import tokenizers

from maxlike.data.tokenizers import ByteLevelTokenizer
from maxlike.errors import UserError

_LETTERS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_CAPITALS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
# How each vocabulary cuts text into words before merging, and the id of <|endoftext|> counted from the last rank.
_TIKTOKEN = {
    "gpt2": (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", 0),
    "cl100k": (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}",
        1,
    ),
    "o200k": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTERS}{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}{_CONTRACTIONS}?"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}",
        1,
    ),
}


class Tiktoken(ByteLevelTokenizer):
    """A rank file of OpenAI's vocabularies (.tiktoken, .tiktoken.gz: base64 bytes and a rank a line).

    path: the file, such as r50k_base.tiktoken (the ranks of GPT-2) or cl100k_base.tiktoken.
    pattern: how text is cut before merging: 'gpt2' (r50k), 'cl100k', 'o200k'. <|endoftext|> opens and closes documents;
        its id is 50256 for GPT-2 and 100257 for cl100k.
    Refuses a line that is not a rank, ranks with gaps, and ranks that lack one of the 256 single bytes.
    """

    def __init__(self, *, path: str, pattern: Literal["gpt2", "cl100k", "o200k"]):
        super().__init__(path)
        if pattern not in _TIKTOKEN:
            raise UserError(f"Tiktoken.pattern={pattern!r} must be one of {', '.join(map(repr, _TIKTOKEN))}")
        self.pattern = pattern

    def _identity(self) -> tuple:
        return (self.pattern,)

    @functools.cached_property
    def _ranks(self) -> dict[bytes, int]:
        content = self._content
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        ranks = {}
        for number, line in enumerate(content.splitlines(), 1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error) as error:
                raise UserError(f"{self.path}:{number} is not 'base64 rank' ({error}); fetch the file again") from error
        if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([i]) not in ranks for i in range(256)):
            raise UserError(
                f"{self._knob}: {self.path} is incomplete (ranks with gaps, or bytes missing); fetch it again"
            )
        return ranks

    @functools.cached_property
    def eos_id(self) -> int:
        return len(self._ranks) + _TIKTOKEN[self.pattern][1]

    @property
    def bos_id(self) -> int:
        return self.eos_id

    @property
    def vocab_size(self) -> int:
        return self.eos_id + 1

    @functools.cached_property
    def bytes_per_token(self) -> np.ndarray:
        table = np.zeros(self.vocab_size, np.int32)
        for token, rank in self._ranks.items():
            table[rank] = len(token)
        return table

    @functools.cached_property
    def _model(self) -> tokenizers.Tokenizer:
        letter = byte_letters()
        spell = {token: "".join(letter[byte] for byte in token) for token in self._ranks}
        merges = []
        for token, rank in sorted(self._ranks.items(), key=lambda item: item[1]):
            if len(token) > 1:
                parts = merge(token, self._ranks, rank)
                if len(parts) == 2:  # else nothing merges into it: it is only ever taken whole
                    merges.append((spell[parts[0]], spell[parts[1]]))
        vocabulary = {spell[token]: rank for token, rank in self._ranks.items()}
        model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, ignore_merges=True))
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_TIKTOKEN[self.pattern][0]), "isolated")
        to_letters = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, to_letters])
        model.decoder = tokenizers.decoders.ByteLevel()
        return model

    def decode(self, ids) -> str:
        return self._model.decode([int(i) for i in ids if i < len(self._ranks)])


def byte_letters() -> dict[int, str]:
    """The printable character that a byte-level vocabulary writes for each byte (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def merge(token: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    """Byte-pair encoding of one token by the merges of rank less than `below`: the two parts it was made from."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        candidates = [(ranks.get(parts[i] + parts[i + 1], below), i) for i in range(len(parts) - 1)]
        rank, at = min(candidates)
        if rank >= below:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts
