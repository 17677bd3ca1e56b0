"""Train a byte-level BPE tokenizer on the training documents of an experiment and write it as tokenizer.json.

The one shipped with the Austen corpus was made by this, on the training documents alone:

    python -m maxlike.data.train_tokenizer
"""

import collections
import pathlib

import tokenizers

from maxlike.data import files
from maxlike.data.sources import Source, Text
from maxlike.errors import UserError

EOS = "<|endoftext|>"
AUSTEN = (
    "package:experiments/data/austen/pride_and_prejudice.txt",
    "package:experiments/data/austen/sense_and_sensibility.txt",
)
HELD_OUT_BYTES = 140_000  # at the end of the Austen corpus: validation, which no tokenizer may see


def train(sources: dict[str, Source], *, vocab: int) -> tokenizers.Tokenizer:
    """Byte-pair encoding of `vocab` ids: <|endoftext|> (id 0), the 256 bytes, and merges of the documents of all
    sources. Words are cut by GPT-2's rule. The same documents give the same tokenizer, byte for byte."""
    if vocab < 257:
        raise UserError(f"train_tokenizer.vocab={vocab} is smaller than 257: the 256 bytes and {EOS}")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[EOS],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (
        text
        for source in sources.values()
        for part in range(len(source.parts()))
        for _, text in source.read(part, collections.Counter())
    )
    model.train_from_iterator(texts, trainer)
    if model.get_vocab_size() < vocab:
        raise UserError(f"The documents hold only {model.get_vocab_size()} merges and bytes; lower vocab={vocab}")
    return model


def write(model: tokenizers.Tokenizer, output: str) -> pathlib.Path:
    """Write tokenizer.json, whole or not at all."""
    path = files.resolve(output, "train_tokenizer.output")
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace(path, model.to_str(pretty=True).encode())
    return path


def train_tokenizer(experiment, run, *, vocab: int = 2048, output: str = "tokenizer.json") -> None:
    """Train a tokenizer on the experiment's training documents; `vocab` ids, written to `output`.

    The experiment needs some tokenizer to begin with: bind maxlike.data.tokenizers.Bytes, then the new file.
    """
    path = write(train(experiment.data.sources, vocab=vocab), output)
    print(f"Wrote {path}: {vocab} ids; use it by HuggingFace.path = {str(path)!r}")


if __name__ == "__main__":
    corpus = {"austen": Text(paths=AUSTEN, end_byte=-HELD_OUT_BYTES)}
    print(write(train(corpus, vocab=2048), "package:experiments/data/austen/tokenizer.json"))
