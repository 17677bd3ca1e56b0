"""A checkpoint of another library as an experiment's model and tokenizer."""

import pathlib
from typing import Any, Literal

import tokenizers
from flax import nnx

from layers.stack import Stack
from maxlike.convert import families
from maxlike.convert.config_json import read_json
from maxlike.data import files
from maxlike.data.tokenizers import HuggingFace, SentencePiece, Tokenizer
from maxlike.errors import UserError

# Beside the weights a directory may hold these; they go along with what is imported and exported.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


class Pretrained:
    """Model factory: the network that DIR/config.json describes. Bound in `Experiment.model`; its numbers come from
    `--job import`, or from training.

    source: DIR, with config.json as Hugging Face's `save_pretrained` writes it (`package:...` for a shipped one).
    remat, scan: as for `layers.stack.Stack`.
    mtp: with the modules that predict further ahead, for an objective that trains them (DeepSeek-V3, LongCat-Flash,
        Qwen3-Next).
    Refuses architectures and options that our layers cannot express, by name.
    """

    def __init__(
        self,
        *,
        source: str,
        remat: Literal["none", "full", "branches", "matmul_half", "dots", "dots_no_batch", "offload"] = "none",
        scan: bool | None = None,
        mtp: bool = False,
    ):
        self.source, self.remat, self.scan, self.mtp = source, remat, scan, mtp

    def __call__(self, *, rngs: nnx.Rngs) -> Any:
        network = families.read(directory(self.source), mtp=self.mtp)[1](rngs=rngs)
        for part in vars(network).values():
            if isinstance(part, Stack):
                part.remat, part.scan = self.remat, self.scan
        return network


def tokenizer(*, source: str) -> Tokenizer:
    """The tokenizer in DIR: its byte-level tokenizer.json, else its SentencePiece tokenizer.model.

    The tokens that open and close a document are those that tokenizer_config.json names, else config.json's ids. A
    prompt begins with the opening one only where the tokenizer.json itself puts it in front of a text.
    """
    where = directory(source)
    if (where / "tokenizer.model").is_file():
        return SentencePiece(path=f"{source}/tokenizer.model", normalizer="model")
    if not (where / "tokenizer.json").is_file():
        raise UserError(
            f"{where} has neither tokenizer.json nor tokenizer.model: put one there, or bind another Data.tokenizer"
        )
    names = {kind: _special(where, kind) for kind in ("eos", "bos")}
    if names["eos"] is None:
        raise UserError(f"{where} does not say which token ends a text: add eos_token to its tokenizer_config.json")
    path = where / "tokenizer.json"
    return HuggingFace(path=f"{source}/{path.name}", eos=names["eos"], bos=names["bos"], opens_prompts=_opens(path))


def _opens(path: pathlib.Path) -> bool:
    """Whether a tokenizer.json puts a special token in front of a text."""
    model = tokenizers.Tokenizer.from_file(str(path))
    plain, special = (model.encode("a", add_special_tokens=add).ids for add in (False, True))
    return special[: len(plain)] != plain


def directory(source: str) -> pathlib.Path:
    """The directory of a `source`."""
    return files.resolve(source, "Pretrained.source")


def _special(where: pathlib.Path, kind: str) -> str | None:
    """The text of the "eos" or "bos" token, or None."""
    configured = where / "tokenizer_config.json"
    named = read_json(configured).get(f"{kind}_token") if configured.is_file() else None
    if isinstance(named, dict):
        named = named.get("content")
    if isinstance(named, str):
        return named
    number = read_json(where / "config.json").get(f"{kind}_token_id")
    number = number[0] if isinstance(number, list) and number else number
    added = read_json(where / "tokenizer.json").get("added_tokens", []) if number is not None else []
    return next((token["content"] for token in added if token["id"] == number), None)
