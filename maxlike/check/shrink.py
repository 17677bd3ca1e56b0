"""The small twin of an experiment: same classes, same pattern, same knobs, smaller numbers."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from maxlike import catalog
from maxlike.gin_check import Binding, Check
from maxlike.gin_values import resolved

VOCAB, PADDED_VOCAB_MULTIPLE = 128, 16
BATCH, LENGTH = 16, 32
WIDEST = 128  # of a feed-forward
REPEATS = 2  # of a stack's pattern: the fewest that a scan or two pipeline stages can get wrong
EXPERTS, EXPERT_GROUPS = 8, 4
HEADS = ("heads", "kv_heads", "key_heads")


@dataclasses.dataclass(frozen=True)
class Change:
    """One knob that the twin has otherwise: `left` as gin writes it, with the value before and now."""

    left: str
    before: Any
    now: Any

    @property
    def text(self) -> str:
        return f"{self.left} = {self.now!r}"


class Bindings:
    """An operative configuration as values that can be asked for and overridden."""

    def __init__(self, text: str):
        reader = Check(catalog.roots())
        reader.read_text_as_file(text)
        effective = reader.effective().values()
        macros = {binding.argument: binding for binding in effective if binding.target is None}
        self.text = text
        self.all: list[tuple[Binding, Any]] = [
            (binding, resolved(binding.value, macros)) for binding in effective if binding.target is not None
        ]

    def values(self, knob: str, owner: str | None = None) -> list[Any]:
        """The values of a knob in all scopes; owner: the name of its class, None for any."""
        return [value for binding, value in self.all if binding.argument == knob and owner in (None, _owner(binding))]

    def number(self, knob: str, *owners: str) -> int | None:
        """The first whole number that one of the classes has for a knob, or None."""
        found = [value for owner in owners for value in self.values(knob, owner) if _is_number(value)]
        return found[0] if found else None

    def override(self, owner: str, knob: str, value: Any) -> list[str]:
        """gin lines that give a knob one value in every scope where it has another; `value` as gin writes it."""
        return [
            f"{binding.left} = {value!r}"
            for binding, present in self.all
            if (_owner(binding), binding.argument) == (owner, knob) and present != value
        ]


def shrink(bindings: Bindings) -> list[Change]:
    """The changes that make the small twin. Ratios stay (heads to key heads, feed-forward to model width, choices to
    experts); what has no rule here keeps its value."""
    sizes = _Sizes.of(bindings)
    changes = []
    for binding, value in bindings.all:
        rule = RULES.get(f"{_owner(binding)}.{binding.argument}", RULES.get(f"*.{binding.argument}"))
        if rule is None or not (binding.target.__module__.startswith("layers.") or _owner(binding) in OUTSIDE):
            continue
        now = rule(value, sizes, binding)
        if now != value:
            changes.append(Change(binding.left, value, now))
    return changes


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What several rules need: before and after."""

    bindings: Bindings
    vocab: tuple[int, int] | None
    dim: tuple[int, int]
    divisor: int  # of all numbers of heads
    experts: tuple[int, int]
    choices: tuple[int, int]

    @classmethod
    def of(cls, bindings: Bindings) -> "_Sizes":
        counts = [value for name in HEADS for value in bindings.values(name) if _is_number(value)]
        counts += [value for value in bindings.values("groups", "Mamba2") if _is_number(value)]
        common, fewest = math.gcd(*counts) if counts else 1, min(counts, default=1)
        divisor = max((d for d in range(1, common + 1) if common % d == 0 and fewest // d >= 2), default=1)
        heads = max((count // divisor for count in counts), default=1)
        step = math.lcm(8, *(count // divisor for count in counts))
        dim = bindings.number("dim", "LanguageModel", "EncoderDecoder") or 1
        small = -(-max(32, 8 * heads) // step) * step
        vocab = bindings.number("vocab", "LanguageModel", "EncoderDecoder")
        experts = bindings.number("count", "Experts") or EXPERTS
        choices = bindings.number("top_k", "TopK") or 1
        return cls(
            bindings=bindings,
            vocab=None if vocab is None else (vocab, _small_vocab(bindings, vocab)),
            dim=(dim, min(dim, small)),
            divisor=divisor,
            experts=(experts, min(experts, EXPERTS)),
            choices=(choices, choices if choices <= 3 else max(2, round(choices / 4))),
        )

    @property
    def layers(self) -> int:
        """Layers of the small network, over all its stacks."""
        return sum(
            _depth(value, self, binding)
            + len(self._of_scope("prefix", binding))
            + len(self._of_scope("suffix", binding))
            for binding, value in self.bindings.all
            if (_owner(binding), binding.argument) == ("Stack", "depth")
        )

    def _of_scope(self, knob: str, like: Binding) -> Any:
        """A knob of the same class in the same scope."""
        return next(
            value
            for binding, value in self.bindings.all
            if (binding.scope, binding.target, binding.argument) == (like.scope, like.target, knob)
        )

    def pattern(self, like: Binding) -> int:
        return len(self._of_scope("pattern", like))


Rule = Callable[[Any, _Sizes, Binding], Any]


def _owner(binding: Binding) -> str:
    return binding.target.__name__


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _small_vocab(bindings: Bindings, vocab: int) -> int:
    padded = (bindings.number("vocab_multiple", "LanguageModel", "EncoderDecoder") or 1) > 1
    return min(vocab, VOCAB - 8 if padded else VOCAB)


def _at_most(limit: int) -> Rule:
    return lambda value, sizes, binding: min(value, limit) if _is_number(value) else value


def _to(now: Any) -> Rule:
    return lambda value, sizes, binding: now


def _heads(value: Any, sizes: _Sizes, binding: Binding) -> Any:
    return value // sizes.divisor if _is_number(value) else value


def _dim(value: Any, sizes: _Sizes, binding: Binding) -> Any:
    return sizes.dim[1]


def _width(value: Any, sizes: _Sizes, binding: Binding) -> Any:
    """In the ratio of the model's width, a multiple of 16."""
    if not _is_number(value):
        return value
    scaled = value / sizes.dim[0] * sizes.dim[1] if sizes.vocab else 32
    return min(value, WIDEST, max(16, round(scaled / 16) * 16))


def _of_widest(*knobs: str, widest: int) -> Rule:
    """Together with its neighbours of the same class and scope: the widest becomes `widest`, ratios stay, all even."""

    def rule(value: Any, sizes: _Sizes, binding: Binding) -> Any:
        present = [other for name in knobs if _is_number(other := sizes._of_scope(name, binding))]
        if not _is_number(value) or max(present) <= widest:
            return value
        return max(4, 2 * round(value * widest / max(present) / 2))

    return rule


def _head_dim(value: Any, sizes: _Sizes, binding: Binding) -> Any:
    """In the ratio of width to heads, so that heads x head_dim stays as wide against the model as it was."""
    heads = [n for name in HEADS for n in sizes.bindings.values(name) if _is_number(n)]
    if not _is_number(value):
        return value
    if not heads:
        return min(value, 8)
    before, now = sizes.dim[0] / max(heads), sizes.dim[1] / (max(heads) // sizes.divisor)
    return min(value, max(4, 4 * round(value * now / before / 4)))


def _depth(value: Any, sizes: _Sizes, binding: Binding) -> Any:
    return min(value, REPEATS * sizes.pattern(binding))


def _layers(value: Any, sizes: _Sizes, binding: Binding) -> Any:
    return sizes.layers if value > 1 else value


def _scaled_ids(value: Any, sizes: _Sizes, binding: Binding) -> Any:
    return tuple(max(1, start * sizes.vocab[1] // sizes.vocab[0]) for start in value)


def _last_id(value: Any, sizes: _Sizes, binding: Binding) -> Any:
    return min(value, sizes.vocab[1] - 1)


def _special_ids(value: Any, sizes: _Sizes, binding: Binding) -> Any:
    if not value or max(value) < sizes.vocab[1]:
        return value
    return tuple(sizes.vocab[1] - 2 - place for place in range(min(len(value), 8)))


def _per_expert(value: Any, sizes: _Sizes, binding: Binding) -> Any:
    """A number of further experts in the ratio of those with weights."""
    return max(1, round(value * sizes.experts[1] / sizes.experts[0])) if _is_number(value) and value else value


def _per_choice(value: Any, sizes: _Sizes, binding: Binding) -> Any:
    return value * sizes.choices[1] / sizes.choices[0]


def _top_groups(value: Any, sizes: _Sizes, binding: Binding) -> Any:
    groups = sizes._of_scope("groups", binding)
    return max(1, round(value * min(groups, EXPERT_GROUPS) / groups))


def _text_only(now: int) -> Rule:
    """For networks of tokens: what an image tokenizer has under this name follows from its pictures."""
    return lambda value, sizes, binding: min(value, now) if sizes.vocab else value


_LATENT = ("nope_dim", "rope_dim", "value_dim")
OUTSIDE = ("Experiment", "Step", "NextToken", "MultiToken", "MaskedTokens")  # classes of maxlike with rules
RULES: dict[str, Rule] = {
    "Experiment.batch_size": _at_most(BATCH),
    "Experiment.sequence_length": _text_only(LENGTH),
    "Experiment.hooks": _to(()),
    "Experiment.warm_start": _to(None),
    "Experiment.products": _to(None),
    "Step.micro_batches": _to(1),
    "Step.gradients": _to(None),
    "Step.accumulate_dtype": _to("float32"),
    "Step.compute_dtype": _to("float32"),
    "MaskedTokens.mask_id": _last_id,
    "MaskedTokens.special_ids": _special_ids,
    "LanguageModel.vocab": lambda value, sizes, binding: sizes.vocab[1],
    "EncoderDecoder.vocab": lambda value, sizes, binding: sizes.vocab[1],
    "LanguageModel.modality_starts": _scaled_ids,
    "*.vocab_multiple": _at_most(PADDED_VOCAB_MULTIPLE),
    "LanguageModel.dim": _dim,
    "EncoderDecoder.dim": _dim,
    "Embed.positions": _at_most(2 * LENGTH),
    "Stack.depth": _depth,
    "LightningAttention.layers": _layers,
    **{f"*.{name}": _heads for name in HEADS},
    "Mamba2.groups": _heads,
    "*.head_dim": _head_dim,
    "*.width": _width,
    "*.state": _at_most(8),
    "*.rank": _at_most(4),
    "*.kv_rank": _at_most(16),
    "*.query_rank": _at_most(24),
    **{f"MLA.{name}": _of_widest(*_LATENT, widest=16) for name in _LATENT},
    **{f"GatedDeltaNet.{name}": _of_widest("key_dim", "value_dim", widest=8) for name in ("key_dim", "value_dim")},
    "*.window": _at_most(8),
    "*.chunk": _at_most(8),
    "NextToken.chunk": _at_most(16),
    "MultiToken.chunk": _at_most(16),
    "MaskedTokens.chunk": _at_most(16),
    "DualChunk.chunk": _at_most(12),
    "DualChunk.local": _at_most(4),
    "DualChunk.trained_length": _at_most(16),
    "Experts.count": _at_most(EXPERTS),
    "TopK.top_k": lambda value, sizes, binding: sizes.choices[1],
    "GroupLimit.groups": _at_most(EXPERT_GROUPS),
    "GroupLimit.top_groups": _top_groups,
    "GroupLimit.best": _at_most(EXPERTS // EXPERT_GROUPS),
    "ZeroExperts.identity": _per_expert,
    "ZeroExperts.constant": _per_expert,
    "ZeroExperts.zero": _per_expert,
    "BudgetBias.target": _per_choice,
    "BudgetBias.every": _to(1),
    "DeviceBalance.target": _per_choice,
    "DeviceBalance.groups": _at_most(EXPERT_GROUPS),
    "ModalityMoE.groups": lambda value, sizes, binding: tuple(min(count, 4) for count in value),
}
