"""Generation: prompt and continuation as one compiled program, and `Generator`, strings in and strings out."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from maxlike.data.tokenizers import Tokenizer
from maxlike.decode.sampling import Sampling, SamplingRows, draw, penalise
from maxlike.decode.text_stream import TextStream
from maxlike.errors import UserError

SMALLEST_BUCKET = 32
PLAIN = Sampling()
NO_TOKEN = -1  # fills the stop set and the output past a row's end


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens_BN", "counts_B", "logprobs_BN", "sampling_logprobs_BN", "stopped_B"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Generated:
    """Continuations of a batch.

    tokens_BN: int32, the first counts_B of each row real, a stop token included; -1 after them.
    logprobs_BN: log-probability of each token under the model, before penalties, temperature and filters.
    sampling_logprobs_BN: under the distribution it was drawn from (0 at temperature 0). Both 0 past the end.
    stopped_B: whether a stop token ended the row, rather than its limit.
    """

    tokens_BN: jax.Array
    counts_B: jax.Array
    logprobs_BN: jax.Array
    sampling_logprobs_BN: jax.Array
    stopped_B: jax.Array


def generate(
    model: Any,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    sampling: SamplingRows,
    limits_B: jax.Array,
    stop_S: jax.Array,
    key: jax.Array,
    *,
    max_new: int,
    cache_dtype: jnp.dtype = jnp.float32,
) -> Generated:
    """Continues each row by at most min(limits_B, max_new) tokens, or through its first token of `stop_S`. Traceable.

    model: a network with `init_cache`, `extend` and `logits`. tokens_BT: prompts, padded on the right; the first
    lengths_B >= 1 are real. stop_S: ids that end a row; -1 matches none. max_new is the room that is compiled in;
    limits_B, like every knob of sampling, is data. A row's tokens do not depend on the rest of the batch: finished rows
    and padding write nothing, and noise comes from the request's seed.
    """
    B, T = tokens_BT.shape
    cache = model.init_cache(B, T + max_new, cache_dtype)
    # All but the last prompt token fill the cache; the loop begins with the last one. So no position of the prompt is
    # ever projected to the vocabulary but the one that is needed, and there is one copy of the head and the sampler.
    hidden_BTD, cache = model.extend(tokens_BT, cache, lengths_B - 1)
    last_B = jnp.take_along_axis(tokens_BT, lengths_B[:, None] - 1, 1)[:, 0]
    vocab = jax.eval_shape(model.logits, hidden_BTD[:, :1]).shape[-1]
    row_B1 = jnp.arange(B)[:, None]
    known_BT = jnp.where(jnp.arange(T) < lengths_B[:, None], tokens_BT, vocab)
    prompt_BV = jnp.zeros((B, vocab), bool).at[row_B1, known_BT].set(True, mode="drop")
    limits_B = jnp.minimum(limits_B, max_new)

    def unfinished(state):
        return jnp.any(~state["done_B"])

    def advance(state):
        live_B, n, out = ~state["done_B"], state["n"], state["out"]
        hidden_B1D, cache = model.extend(state["last_B"][:, None], state["cache"], live_B.astype(jnp.int32))
        logits_BV = model.logits(hidden_B1D)[:, 0]
        token_B, drawn_B = draw(
            penalise(logits_BV, prompt_BV, state["counts_BV"], sampling), sampling, lengths_B + n, key
        )
        logprob_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BV, -1), token_B[:, None], 1)[:, 0]
        stopped_B = live_B & jnp.any(token_B[:, None] == stop_S, -1)
        return {
            "n": n + 1,
            "last_B": token_B,
            "cache": cache,
            "counts_BV": state["counts_BV"].at[jnp.arange(B), token_B].add(live_B.astype(jnp.int32)),
            "done_B": state["done_B"] | stopped_B | (n + 1 >= limits_B),
            "out": Generated(
                tokens_BN=out.tokens_BN.at[:, n].set(jnp.where(live_B, token_B, NO_TOKEN)),
                counts_B=out.counts_B + live_B,
                logprobs_BN=out.logprobs_BN.at[:, n].set(jnp.where(live_B, logprob_B, 0.0)),
                sampling_logprobs_BN=out.sampling_logprobs_BN.at[:, n].set(jnp.where(live_B, drawn_B, 0.0)),
                stopped_B=out.stopped_B | stopped_B,
            ),
        }

    state = {
        "n": jnp.zeros((), jnp.int32),
        "last_B": last_B,
        "cache": cache,
        "counts_BV": jnp.zeros((B, vocab), jnp.int32),
        "done_B": limits_B <= 0,
        "out": Generated(
            tokens_BN=jnp.full((B, max_new), NO_TOKEN, jnp.int32),
            counts_B=jnp.zeros(B, jnp.int32),
            logprobs_BN=jnp.zeros((B, max_new), jnp.float32),
            sampling_logprobs_BN=jnp.zeros((B, max_new), jnp.float32),
            stopped_B=jnp.zeros(B, bool),
        ),
    }
    return jax.lax.while_loop(unfinished, advance, state)["out"]


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
    Refuses prompts that do not fit, a prompt without tokens where the tokenizer has no token to begin with, a tokenizer
    with more ids than the model, and a max_length beyond its learned positions.
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
        encoded = [self._encode(prompt, max_new) for prompt in prompts]
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

    def _encode(self, prompt: str, max_new: int) -> np.ndarray:
        """Ids of a prompt behind the token that opens a document, as in training."""
        begin = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        tokens = np.concatenate([begin, self.tokenizer.encode(prompt)]).astype(np.int32)
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
