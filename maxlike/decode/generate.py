"""Generator: strings in, strings out."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from maxlike.data.tokenizers import Tokenizer
from maxlike.decode.loop import Generated, generate
from maxlike.decode.sampling import Sampling, SamplingRows
from maxlike.decode.text_stream import TextStream
from maxlike.errors import UserError
from maxlike.refusals import is_refusal

SMALLEST_BUCKET = 32
PLAIN = Sampling()


@dataclasses.dataclass(frozen=True)
class Continuation:
    """One prompt's continuation on the host. `tokens` and both log-probabilities end with the stop token, or with the
    token in which a stop string became complete; `text` has neither. `finish` says whether one of them or the limit
    ended it."""

    text: str
    tokens: np.ndarray
    logprobs: np.ndarray
    sampling_logprobs: np.ndarray
    finish: Literal["stop", "length"]


class Generator:
    """Continues texts with a model: `generator(params, ["It is a truth"], max_new=50)` -> list of strings.

    graph: the static part of `nnx.split(model)`. tokenizer: see `maxlike.data.tokenizers`.
    max_length >= 2: longest prompt and continuation together, in tokens; at most the model's learned positions.
    batch_size >= 1: prompts that run together.
    cache_dtype: of keys, values and other decoding state.

    Prompts are sorted into buckets of 32, 64, 128, ... tokens, room for the continuation and the number of rows are
    rounded up likewise, and each combination compiles once (`programs`). Parameters may lie on any mesh, on one host or
    several (then every host makes the same calls); the results are replicated.
    Refuses a model that cannot continue a text (an encoder), prompts that do not fit, a prompt without tokens where the
    tokenizer has no token to begin with, a tokenizer with more ids than the model, and a max_length beyond its learned
    positions.
    """

    def __init__(
        self,
        graph: Any,
        tokenizer: Tokenizer,
        *,
        max_length: int = 1024,
        batch_size: int = 8,
        cache_dtype: Literal["float32", "bfloat16"] = "float32",
    ):
        if max_length < 2:
            raise UserError(f"Generator.max_length={max_length}: it must hold a prompt and a new token, so at least 2")
        if batch_size < 1:
            raise UserError(f"Generator.batch_size={batch_size}: it must be at least 1")
        self.graph, self.tokenizer = graph, tokenizer
        self.max_length, self.batch_size, self.cache_dtype = max_length, batch_size, jnp.dtype(cache_dtype)
        self.programs: dict[tuple, jax.stages.Compiled] = {}

    def __call__(
        self,
        params: dict,
        prompts: Sequence[str],
        *,
        buffers: dict | None = None,
        max_new: int = 128,
        sampling: Sampling | Sequence[Sampling] = PLAIN,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[str]:
        """The texts of `continuations`."""
        made = self.continuations(
            params, prompts, buffers=buffers, max_new=max_new, sampling=sampling, stop=stop, seed=seed
        )
        return [continuation.text for continuation in made]

    def continuations(
        self,
        params: dict,
        prompts: Sequence[str],
        *,
        buffers: dict | None = None,
        max_new: int = 128,
        sampling: Sampling | Sequence[Sampling] = PLAIN,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[Continuation]:
        """Continues every prompt by at most `max_new` tokens, until the end-of-text token or a `stop` string.

        params, buffers: pure dicts of the model's state, in the dtype to compute in. sampling: one for all, whose seed
        grows by one from prompt to prompt so that equal prompts differ, or one for each. seed: of the whole call.
        """
        if max_new < 1:
            raise UserError(f"max_new={max_new}: give at least 1 token to generate")
        if isinstance(sampling, Sampling):
            sampling = [dataclasses.replace(sampling, seed=sampling.seed + i) for i in range(len(prompts))]
        if len(sampling) != len(prompts):
            raise UserError(f"{len(sampling)} Sampling for {len(prompts)} prompts: give one for all, or one for each")
        encoded = [self.encode(prompt, max_new) for prompt in prompts]
        buckets: dict[int, list[int]] = {}
        for i, tokens in enumerate(encoded):
            buckets.setdefault(min(_bucket(len(tokens)), self.max_length), []).append(i)
        made: dict[int, Continuation] = {}
        for T, members in sorted(buckets.items()):
            for first in range(0, len(members), self.batch_size):
                chosen = members[first : first + self.batch_size]
                rows = [encoded[i] for i in chosen]
                requests = [sampling[i] for i in chosen]
                out = self._run((params, buffers or {}), rows, requests, T=T, max_new=max_new, seed=seed)
                for row, i in enumerate(chosen):
                    made[i] = self._read(out, row, encoded[i], stop)
        return [made[i] for i in range(len(prompts))]

    def encode(self, prompt: str, max_new: int) -> np.ndarray:
        """Ids of a prompt behind the token that opens a document, as in training."""
        text = self.tokenizer.encode(prompt)
        opens = self.tokenizer.bos_id is not None and (self.tokenizer.opens_prompts or not len(text))
        tokens = np.concatenate([[self.tokenizer.bos_id] if opens else [], text]).astype(np.int32)
        if not len(tokens):
            raise UserError("the prompt is empty and the tokenizer has no token to begin with: give at least one word")
        if len(tokens) + max_new > self.max_length:
            raise UserError(
                f"a prompt of {len(tokens)} tokens and max_new={max_new} exceed the {self.max_length} that fit: "
                "shorten the prompt or lower max_new"
            )
        return tokens

    def _run(
        self, states: tuple[dict, dict], rows: list[np.ndarray], requests: list[Sampling], *, T: int, max_new: int, seed
    ) -> Generated:
        """One batch on the device, rows filled up to a power of two with some that are finished from the start."""
        B = min(_bucket(len(rows), 1), self.batch_size)
        lengths_B, limits_B = np.ones(B, np.int32), np.zeros(B, np.int32)
        tokens_BT = np.zeros((B, T), np.int32)
        for i, row in enumerate(rows):
            tokens_BT[i, : len(row)], lengths_B[i], limits_B[i] = row, len(row), max_new
        sampling = SamplingRows.of(requests + [Sampling(temperature=0.0)] * (B - len(rows)))
        stop_S = np.array([self.tokenizer.eos_id], np.int32)
        inputs = (tokens_BT, lengths_B, sampling, limits_B, stop_S, np.uint32(seed))
        placed = jax.tree.leaves(states)[0].sharding
        replicated = NamedSharding(placed.mesh, PartitionSpec()) if isinstance(placed, NamedSharding) else placed
        inputs = jax.device_put(inputs, replicated)
        return jax.device_get(self._program(states, inputs, _bucket(max_new), replicated)(states, inputs))

    def _program(self, states: tuple[dict, dict], inputs: tuple, room: int, replicated) -> jax.stages.Compiled:
        """The compiled program for these shapes and shardings."""
        leaves = tuple((leaf.dtype, leaf.sharding) for leaf in jax.tree.leaves(states))
        name = (*inputs[0].shape, room, leaves)
        if name not in self.programs:

            def run(states: tuple[dict, dict], inputs: tuple) -> Generated:
                *arrays, seed = inputs
                model = nnx.merge(self.graph, *states)
                key = jax.random.key(seed)
                return generate(model, *arrays, key, max_new=room, cache_dtype=self.cache_dtype)

            self._check(states)
            self.programs[name] = jax.jit(run, out_shardings=replicated).lower(states, inputs).compile()
        return self.programs[name]

    def _check(self, states: tuple[dict, dict]) -> None:
        model = nnx.merge(self.graph, *states)
        try:
            jax.eval_shape(lambda: model.init_cache(1, 2, self.cache_dtype))
        except ValueError as refusal:
            if not is_refusal(refusal):
                raise
            raise UserError(f"this model cannot continue a text: {refusal}") from refusal
        if self.tokenizer.vocab_size > model.vocab:
            raise UserError(
                f"the tokenizer has {self.tokenizer.vocab_size} ids and the model {model.vocab}: "
                "set LanguageModel.vocab to the tokenizer's vocabulary"
            )
        positions = model.embed.positions
        if positions is not None and positions.shape[0] < self.max_length:
            raise UserError(
                f"Generator.max_length={self.max_length}: the model has {positions.shape[0]} learned positions; "
                "lower it to that"
            )

    def _read(self, out: Generated, row: int, prompt: np.ndarray, stop: Sequence[str]) -> Continuation:
        """Text up to a stop string, and the tokens through the one that completed it."""
        count = int(out.counts_B[row])
        tokens = out.tokens_BN[row, :count]
        stopped = bool(out.stopped_B[row])
        stream = TextStream(self.tokenizer.decode, prompt, stop)
        pieces = []
        for used, token in enumerate(tokens[:-1] if stopped else tokens, 1):
            pieces.append(stream.push(token))
            if stream.stopped:
                count, stopped = used, True
                break
        pieces.append(stream.finish())
        return Continuation(
            text="".join(pieces),
            tokens=tokens[:count],
            logprobs=out.logprobs_BN[row, :count],
            sampling_logprobs=out.sampling_logprobs_BN[row, :count],
            finish="stop" if stopped or stream.stopped else "length",
        )


def _bucket(size: int, smallest: int = SMALLEST_BUCKET) -> int:
    """The power of two times `smallest` that holds `size`."""
    while smallest < size:
        smallest *= 2
    return smallest
