"""Tokenizers: text to ids and back, exactly, and how many bytes of text each id stands for.

Every tokenizer has `vocab_size`, `eos_id` (closes a document), `bos_id` (opens one, so that its first token has a
prediction too; the same as eos unless told otherwise), `opens_prompts` (whether a prompt to continue begins with bos as
documents do), `encode`, `encode_batch`, `decode`, `bytes_per_token` and `fingerprint`. A special token stands for 0
bytes and is never made from text: a document that spells it out is encoded letter by letter. Files are read at first
use and nothing in them is executed.
"""

import functools
import hashlib
from typing import Literal

import numpy as np
import tokenizers

from maxlike.data import files
from maxlike.data.optional import needs
from maxlike.errors import UserError


class Tokenizer:
    """What the data layers and `generate` ask of a tokenizer; see the module's docstring."""

    vocab_size: int
    eos_id: int
    bos_id: int
    fingerprint: str
    bytes_per_token: np.ndarray
    opens_prompts: bool = True

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int32, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of many texts at once."""
        raise UserError(f"{type(self).__name__} is not a tokenizer; bind HuggingFace, Bytes, ... instead")

    def text_bytes(self, text: str) -> int:
        """UTF-8 bytes of a document that are text: all of it, but for pictures and the like spelled in it."""
        return len(text.encode())

    def decode(self, ids) -> str:
        """The text of ids; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""
        raise UserError(f"{type(self).__name__} is not a tokenizer; bind HuggingFace, Bytes, ... instead")


class Bytes(Tokenizer):
    """UTF-8 bytes as ids 0..255; 256 opens and closes a document. vocab_size 257."""

    vocab_size, eos_id, bos_id = 257, 256, 256
    fingerprint = files.digest("Bytes", 257)

    @functools.cached_property
    def bytes_per_token(self) -> np.ndarray:
        return np.array([1] * 256 + [0], np.int32)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids) -> str:
        return bytes(int(i) for i in ids if i < 256).decode(errors="replace")


class FileTokenizer(Tokenizer):
    """A tokenizer kept in a file. `path` as for data files (`package:...` included); it must exist at first use."""

    def __init__(self, path: str):
        self.path = path

    @property
    def _knob(self) -> str:
        return f"{type(self).__name__}.path"

    @functools.cached_property
    def _content(self) -> bytes:
        return files.expand(self.path, self._knob)[0].read_bytes()

    def _identity(self) -> tuple:
        """The knobs on which the ids depend."""
        return ()

    @functools.cached_property
    def fingerprint(self) -> str:
        return files.digest(type(self).__name__, hashlib.sha256(self._content).hexdigest(), self._identity())

    def __getstate__(self):
        """Worker processes get the path and read the file themselves."""
        return {name: value for name, value in vars(self).items() if name not in _READ_FROM_FILE}


_READ_FROM_FILE = ("_content", "_model", "_ranks", "bytes_per_token")


class ByteLevelTokenizer(FileTokenizer):
    """What HuggingFace and Tiktoken share: a byte-level BPE of the `tokenizers` library in `_model`."""

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._model.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids) -> str:
        return self._model.decode([int(i) for i in ids], skip_special_tokens=True)


class HuggingFace(ByteLevelTokenizer):
    """A `tokenizer.json` of the Hugging Face `tokenizers` library with a byte-level model (GPT-2, Llama 3, Qwen, ...).

    path: the file.
    eos, bos: the special tokens that close and open a document, by name; bos=None takes eos for both.
    opens_prompts: whether a prompt to continue begins with the opening token; a model that somebody else trained
        without one wants False.
    Refuses a file it cannot read, a name the vocabulary lacks, and models that lose text (WordPiece, lower-casing
    without byte-level), for which bits per byte would be wrong.
    """

    def __init__(self, *, path: str, eos: str = "<|endoftext|>", bos: str | None = None, opens_prompts: bool = True):
        super().__init__(path)
        self.eos, self.bos, self.opens_prompts = eos, bos, opens_prompts

    def _identity(self) -> tuple:
        return (self.eos, self.bos)

    @functools.cached_property
    def _model(self) -> tokenizers.Tokenizer:
        try:
            model = tokenizers.Tokenizer.from_buffer(self._content)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{self._knob}: {self.path} is not a tokenizer.json ({error}); mend the path") from error
        model.encode_special_tokens = True  # text that spells a special token stays text
        model.no_padding()
        model.no_truncation()
        if not isinstance(model.decoder, tokenizers.decoders.ByteLevel):
            raise UserError(
                f"{self._knob}: {self.path} is not byte-level, so it may lose text and bits per byte would be wrong; "
                "use a byte-level tokenizer, or SentencePiece for a .model file"
            )
        return model

    def _special(self, knob: str, name: str) -> int:
        found = self._model.token_to_id(name)
        if found is None:
            special = [token.content for token in self._model.get_added_tokens_decoder().values()]
            raise UserError(f"HuggingFace.{knob}={name!r} is not in {self.path}; its special tokens are {special}")
        return found

    @property
    def eos_id(self) -> int:
        return self._special("eos", self.eos)

    @property
    def bos_id(self) -> int:
        return self.eos_id if self.bos is None else self._special("bos", self.bos)

    @functools.cached_property
    def vocab_size(self) -> int:
        return max(self._model.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def bytes_per_token(self) -> np.ndarray:
        table = np.zeros(self.vocab_size, np.int32)
        for token, number in self._model.get_vocab(with_added_tokens=False).items():
            table[number] = len(token)  # a byte-level vocabulary writes each byte as one character
        for number, token in self._model.get_added_tokens_decoder().items():
            table[number] = 0 if token.special else len(token.content.encode())
        return table


class SentencePiece(FileTokenizer):
    """A SentencePiece `.model` with byte fallback (Llama 2, Mistral, Gemma).

    path: the file.
    normalizer: 'none' (default) keeps the text as it is: no space put in front, none removed, no Unicode folding, so
        the round trip is exact. 'model' does what the file says: use it with pretrained weights; one that puts a
        space in front counts a byte too many a document.
    Refuses a model without byte fallback (it would lose text), and one without an end-of-text piece.
    """

    def __init__(self, *, path: str, normalizer: Literal["none", "model"] = "none"):
        super().__init__(path)
        if normalizer not in ("none", "model"):
            raise UserError(f"SentencePiece.normalizer={normalizer!r} must be 'none' or 'model'")
        self.normalizer = normalizer

    def _identity(self) -> tuple:
        return (self.normalizer,)

    @functools.cached_property
    def _model(self):
        sentencepiece = needs("sentencepiece", "sentencepiece", "SentencePiece")
        content = self._content
        if self.normalizer == "none":
            # Appended to a serialised message, field 3 (normalizer_spec) is merged over the file's own: an empty
            # precompiled_charsmap (2), add_dummy_prefix (3) and remove_extra_whitespaces (4) false.
            content += b"\x1a\x06\x12\x00\x18\x00\x20\x00"
        model = sentencepiece.SentencePieceProcessor()
        try:
            model.LoadFromSerializedProto(content)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{self._knob}: {self.path} is not a SentencePiece model ({error}); mend it") from error
        if not any(model.is_byte(i) for i in range(model.vocab_size())):
            raise UserError(
                f"{self._knob}: {self.path} has no byte fallback, so text outside its vocabulary would be lost; train "
                "it with byte_fallback=true"
            )
        if model.eos_id() < 0:
            raise UserError(f"{self._knob}: {self.path} has no end-of-text piece; train it with eos_id >= 0")
        return model

    @property
    def eos_id(self) -> int:
        return self._model.eos_id()

    @property
    def bos_id(self) -> int:
        return self.eos_id if self._model.bos_id() < 0 else self._model.bos_id()

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size()

    @functools.cached_property
    def bytes_per_token(self) -> np.ndarray:
        model = self._model
        table = np.zeros(self.vocab_size, np.int32)
        for i in range(self.vocab_size):
            if model.is_byte(i):
                table[i] = 1
            elif not (model.is_control(i) or model.is_unknown(i) or model.is_unused(i)):
                table[i] = len(model.id_to_piece(i).replace("\u2581", " ").encode())
        return table

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(ids, np.int32) for ids in self._model.encode(texts, out_type=int)]

    def decode(self, ids) -> str:
        return self._model.decode([int(i) for i in ids])
