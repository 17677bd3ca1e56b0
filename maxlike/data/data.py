"""Data: the noun that gin binds. Documents, a tokenizer, packing and a mixture in; batches out."""

import dataclasses
from typing import Literal

from maxlike.data import files, rows, store, token_store
from maxlike.data.loader import Batches, FiniteBatches
from maxlike.data.mixture import Mixture
from maxlike.data.reader import Reader, Transform
from maxlike.data.rows import Rows
from maxlike.data.sources import Source
from maxlike.data.token_store import TokenStore
from maxlike.data.tokenizers import Tokenizer
from maxlike.errors import UserError


@dataclasses.dataclass(frozen=True)
class Layers:
    """The token layer and the row layer of one source."""

    tokens: TokenStore
    rows: Rows

    def describe(self, name: str) -> dict:
        """What a source holds, and what was left out of it: plain values, for a table."""
        whole = self.rows.count * (self.rows.length + 1)
        return {
            "source": name,
            "documents": self.tokens.documents,
            "tokens": self.tokens.tokens,
            "bytes": self.tokens.bytes,
            "rows": self.rows.count,
            "padding": self.rows.padding / whole,
            "cut documents": self.rows.cut,
            "skipped": sum(self.tokens.manifest["skipped"].values()),
            "inexact": self.tokens.manifest["inexact"],
        }


class Data:
    """Documents to batches. Token and row layers are built at first use and kept under `cache`.

    sources: the training documents: a source, or {name: source}.
    tokenizer: how text becomes ids; every document is bos + tokens + eos.
    validation: held-out documents: a source, {name: source}, or None for none.
    mixture: a Mixture, constant weights {source: weight}, or None with a single source.
    packing: 'concat' (no padding, documents are cut) or 'best_fit' (documents are whole, some padding).
    workers: processes that read batches ahead; 0 reads in a thread, which gives millions of tokens a second.
    build_workers: processes that build the layers; 0 builds here.
    transforms: called in turn for every training row as `transform(row, generator) -> row`; the generator
        (numpy.random.Generator) depends on (seed, example) alone. A row holds tokens, segment_ids and positions, int32
        [sequence_length + 1]; shifting it into inputs and targets comes after, unless a transform has done so itself
        (then it has no 'tokens', and all the fields of a batch). Every row must come out with the same fields and
        shapes. An object's attributes are part of the fingerprint.
    cache: where layers are kept; None is $MAXLIKE_CACHE or ~/.cache/maxlike/data.

    Refuses no sources or names it cannot use, several sources without a mixture, mixtures of unknown names, negative
    workers, and (when batches are asked for) a source shorter than one row.
    """

    def __init__(
        self,
        *,
        sources: Source | dict,
        tokenizer: Tokenizer,
        validation: Source | dict | None = None,
        mixture: Mixture | dict | None = None,
        packing: Literal["concat", "best_fit"] = "concat",
        workers: int = 0,
        build_workers: int = 0,
        transforms: tuple[Transform, ...] = (),
        cache: str | None = None,
    ):
        if packing not in ("concat", "best_fit"):
            raise UserError(f"Data.packing={packing!r} must be 'concat' or 'best_fit'")
        if workers < 0 or build_workers < 0:
            raise UserError(f"Data.workers={workers} and Data.build_workers={build_workers} must not be negative")
        self.sources = _named(sources, "sources", "train")
        self.validation = None if validation is None else _named(validation, "validation", "validation")
        self.tokenizer, self.packing, self.transforms = tokenizer, packing, tuple(transforms)
        self.workers, self.build_workers, self.cache = workers, build_workers, cache
        if mixture is None:
            if len(self.sources) > 1:
                example = ", ".join(f"{name!r}: 1" for name in self.sources)
                raise UserError(
                    f"Data.mixture is missing: with several sources give their weights, as in {{{example}}}"
                )
            mixture = dict.fromkeys(self.sources, 1)
        self.mixture = Mixture(phases=((0, mixture),)) if isinstance(mixture, dict) else mixture
        self.mixture.interleave(list(self.sources), 1)  # refuses unknown names now rather than at the first step

    def layers(self, name: str, source: Source, sequence_length: int) -> Layers:
        """Build or open the layers of a source."""
        cache = files.cache_directory(self.cache)
        tokens = token_store.build(name, source, self.tokenizer, cache=cache, workers=self.build_workers)
        packed = rows.build(
            name, tokens, length=sequence_length, packing=self.packing, cache=cache, workers=self.build_workers
        )
        return Layers(tokens, packed)

    def train(self, *, sequence_length: int, batch_size: int, seed: int, steps: int | None = None) -> Batches:
        """The training batches: a function of the step. With `steps`, the length of the run, the mixture's cap on
        epochs is checked. `seed` (of order and transforms) does not touch what is on disk."""
        if batch_size < 1 or seed < 0:
            raise UserError(f"batch_size={batch_size} must be at least 1 and seed={seed} not negative")
        layers = {name: self.layers(name, source, sequence_length) for name, source in self.sources.items()}
        for name, built in layers.items():
            if built.tokens.tokens < sequence_length + 1:
                raise UserError(
                    f"Data source {name!r} has {built.tokens.tokens} tokens, fewer than a row of sequence_length + 1 = "
                    f"{sequence_length + 1}; add documents or shorten the rows"
                )
        reader = Reader(
            [built.rows for built in layers.values()],
            self.mixture.interleave(list(layers), batch_size),
            batch_size=batch_size,
            seed=seed,
            transforms=self.transforms,
            bytes_per_token=self.tokenizer.bytes_per_token,
        )
        batches = Batches(layers, reader, self.tokenizer, self.workers)
        if steps is not None:
            self.mixture.check_epochs(batches.epochs(steps))
        return batches

    def open_validation(self, *, sequence_length: int, batch_size: int) -> FiniteBatches:
        """The validation batches: every row once. Refuses when no validation source is bound."""
        if self.validation is None:
            raise UserError("Data.validation is not set; bind held-out documents to it, or switch validation off")
        layers = {name: self.layers(name, source, sequence_length) for name, source in self.validation.items()}
        return FiniteBatches(
            layers,
            batch_size=batch_size,
            bytes_per_token=self.tokenizer.bytes_per_token,
            eos_id=self.tokenizer.eos_id,
        )

    def verify(self, *, sequence_length: int) -> int:
        """Read every layer against its checksums; the number of shards. Refuses a damaged one by name."""
        sources = [*self.sources.items(), *(self.validation or {}).items()]
        layers = [self.layers(name, source, sequence_length) for name, source in sources]
        return sum(store.verify(layer.directory) for built in layers for layer in (built.tokens, built.rows))


def _named(sources: Source | dict, knob: str, name: str) -> dict[str, Source]:
    """{name: source}, also of a single one."""
    named = sources if isinstance(sources, dict) else {name: sources}
    if not named:
        raise UserError(f"Data.{knob} is empty; bind at least one source of documents")
    for key, source in named.items():
        if not isinstance(key, str) or not isinstance(source, Source):
            raise UserError(f"Data.{knob}: {key!r} is bound to {source!r}; it takes a name and a source such as Text")
    return dict(named)
