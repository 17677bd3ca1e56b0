"""Rows about decoding: a cache against the whole row, and a mixer's two forms against each other."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers import kernels
from layers.context import Context, Source
from layers.encoder_decoder import EncoderDecoder
from layers.language_model import LanguageModel
from layers.stack import unroll
from maxlike.check.compare import Comparison, compare
from maxlike.check.subject import Subject
from maxlike.check.variant import LeftOut, Row
from maxlike.refusals import is_refusal

REORDERED = 1e-4  # of a tensor's magnitude, float32: the same result by another algorithm
PROMPTS, LENGTH = (7, 4), 16  # tokens of each row's prompt, and of the whole row
MIXERS = ("mixer", "second_mixer")  # names under which blocks hold them


def decode(subject: Subject) -> Iterator[Row]:
    """Ragged prompts and then token by token from a cache, against the whole row at once."""
    yield subject.row("decode", "cached decoding against the forward pass", functools.partial(_decode, subject))


def _decode(subject: Subject) -> Comparison:
    if not isinstance(subject.network, LanguageModel | EncoderDecoder):
        raise LeftOut("the network does not decode")
    if not subject.network.causal:
        raise LeftOut("the network is bidirectional: it continues no text")
    random = np.random.default_rng(3)
    tokens_BT = jnp.asarray(random.integers(1, subject.network.vocab, (len(PROMPTS), LENGTH)), jnp.int32)
    abstract = subject.base.experiment.abstract_model()

    def run(params: dict, buffers: dict) -> tuple[jax.Array, jax.Array]:
        network = abstract.merge(params, buffers)
        return _whole(network, tokens_BT), _cached(network, tokens_BT)

    whole, cached = _computed(subject, run)
    # A prompt's logits are only read at its end.
    read = [(row, t) for t in range(LENGTH) for row, prompt in enumerate(PROMPTS) if t >= prompt - 1]
    records = (
        {"logits": {f"token {t} of row {row} (prompt of {PROMPTS[row]})": x[row, t] for row, t in read}}
        for x in (cached, whole)
    )
    return compare(*records, REORDERED)


def _computed(subject: Subject, run: Callable) -> list[np.ndarray]:
    """The arrays of `run(params, buffers)`. Raises LeftOut with the sentence of a layer that refuses."""
    state = subject.start["params"], subject.start["buffers"]
    try:
        with subject.base.chosen():
            lowered = jax.jit(run).lower(*state)
    except ValueError as error:
        if not is_refusal(error):
            raise
        raise LeftOut(f"refused: {error}") from error
    return [np.asarray(x) for x in lowered.compile()(*state)]


def _whole(network: Any, tokens_BT: jax.Array) -> jax.Array:
    """Logits of whole rows."""
    ctx = Context.of(tokens_BT)
    if isinstance(network, EncoderDecoder):
        ctx = ctx.replace(source=Source.of(tokens_BT[:, ::-1]))
    elif network.prompt != "causal":
        prompts_B1 = jnp.asarray(PROMPTS)[:, None]
        ctx = ctx.replace(prefix_BT=ctx.positions_BT < prompts_B1)
        if network.prompt == "blank":
            blocks_BT = jnp.maximum(ctx.positions_BT - prompts_B1 + 1, 0)
            ctx = ctx.replace(blocks_BT=blocks_BT, anchors_BT=ctx.positions_BT - blocks_BT)
    return network.logits(network(tokens_BT, ctx).hidden_BTD)[..., : network.vocab]


def _cached(network: Any, tokens_BT: jax.Array) -> jax.Array:
    """Logits of the same rows, [B, T, V]: prompts as one ragged call, then a token a call; zero inside the prompts."""
    network = unroll(network)
    if isinstance(network, EncoderDecoder):
        network = network.given(Source.of(tokens_BT[:, ::-1]))
    prompts_B, rows_B = jnp.asarray(PROMPTS, jnp.int32), jnp.arange(len(PROMPTS))
    cache = network.init_cache(len(PROMPTS), LENGTH, jnp.float32)
    hidden_BTD, cache = network.extend(tokens_BT[:, : max(PROMPTS)], cache, prompts_B)
    last_BD = hidden_BTD[rows_B, prompts_B - 1]

    def step(carry: tuple, n: jax.Array) -> tuple[tuple, jax.Array]:
        last_BD, cache = carry
        place_B = prompts_B + n
        token_B = tokens_BT[rows_B, jnp.minimum(place_B, LENGTH - 1)]
        hidden_B1D, cache = network.extend(token_B[:, None], cache, (place_B < LENGTH).astype(jnp.int32))
        return (hidden_B1D[:, 0], cache), last_BD

    count = LENGTH - min(PROMPTS) + 1
    _, hidden_NBD = jax.lax.scan(step, (last_BD, cache), jnp.arange(count))
    logits_NBV = network.logits(jnp.swapaxes(hidden_NBD, 0, 1))[..., : network.vocab]
    places_BN = prompts_B[:, None] - 1 + jnp.arange(count)
    out = jnp.zeros((len(PROMPTS), LENGTH, network.vocab))
    return out.at[rows_B[:, None], places_BN].set(logits_NBV, mode="drop")


def recurrent(subject: Subject) -> Iterator[Row]:
    """Each kind of mixer of the twin: a row at once, in its chunks, against one token at a time from its cache."""
    found = _mixers(subject)
    kinds = [type(mixer).__name__ for mixer in found.values()]
    for number, path in enumerate(found):
        before = kinds[:number].count(kinds[number])
        name = f"recurrent/{kinds[number]}{f'-{before + 1}' if before else ''}"
        if subject.wants(name):
            compared = f"{path}: the row at once against token by token"
            yield subject.row(name, compared, functools.partial(_recurrent, subject, path))
    if not found:
        yield Row("recurrent", "a mixer's row against its tokens", None, "no mixer of it has a cache", failed=False)


def _mixers(subject: Subject) -> dict[str, nnx.Module]:
    """{path: mixer} of one mixer of each kind (class, settings and shapes) that has a cache."""
    kinds, found = set(), {}
    for path, mixer in _caching("", unrolled(subject.network)):
        kind = (type(mixer), *_signature("", mixer))
        if kind not in kinds:
            kinds.add(kind)
            found[path] = mixer
    return found


def unrolled(network: Any) -> Any:
    """The network with the layers of its stacks in a row."""
    with kernels.choose("layers", "unrolled"):
        return jax.eval_shape(unroll, network)


def _caching(path: str, part: Any) -> Iterator[tuple[str, nnx.Module]]:
    """The mixers of a network's blocks, in order of depth."""
    for name, child in _children(part):
        at = f"{path}/{name}" if path else name
        if name in MIXERS:
            yield at, child
        else:
            yield from _caching(at, child)


def _children(part: Any) -> list[tuple[str, Any]]:
    if isinstance(part, nnx.List):
        return [(str(i), child) for i, child in enumerate(part)]
    if isinstance(part, nnx.Module):
        return [(name, child) for name, child in vars(part).items() if isinstance(child, nnx.Module)]
    return []


def _signature(path: str, part: nnx.Module) -> list[tuple[str, str]]:
    """What a module is besides its numbers: settings and shapes by path."""
    lines = []
    for name, value in vars(part).items():
        if isinstance(value, nnx.Variable):
            lines.append((f"{path}/{name}", str(value.shape)))
        elif isinstance(value, nnx.Module):
            lines += [(f"{path}/{name}", type(value).__name__), *_signature(f"{path}/{name}", value)]
        elif not name.startswith("_"):
            lines.append((f"{path}/{name}", repr(value)))
    return lines


def _recurrent(subject: Subject, path: str) -> Comparison:
    random = np.random.default_rng(4)
    x_BTD = jnp.asarray(random.standard_normal((2, LENGTH, subject.network.dim)), jnp.float32)
    abstract = subject.base.experiment.abstract_model()

    def run(params: dict, buffers: dict) -> tuple[jax.Array, jax.Array]:
        with kernels.choose("layers", "unrolled"):
            part = unroll(abstract.merge(params, buffers))
        for name in path.split("/"):
            part = part[int(name)] if name.isdecimal() else vars(part)[name]
        layer = jnp.zeros((), jnp.int32)
        whole_BTD, _ = part(x_BTD, Context.of(x_BTD[..., 0], layer=layer))

        def step(cache: Any, t: jax.Array) -> tuple[Any, jax.Array]:
            ctx = Context(jnp.full((2, 1), t), None, jnp.ones(2, jnp.int32), layer=layer)
            y_B1D, cache = part.extend(jax.lax.dynamic_slice_in_dim(x_BTD, t, 1, 1), cache, ctx)
            return cache, y_B1D[:, 0]

        _, tokens_TBD = jax.lax.scan(step, part.init_cache(2, LENGTH, jnp.float32), jnp.arange(LENGTH))
        return whole_BTD, jnp.swapaxes(tokens_TBD, 0, 1)

    whole, tokens = _computed(subject, run)
    records = ({path: {f"token {t}": x[:, t] for t in range(LENGTH)}} for x in (whole, tokens))
    return compare(*records, REORDERED)
