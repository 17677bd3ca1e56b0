"""The twin is small and is the same experiment."""

import jax
import pytest

from maxlike import catalog, config
from maxlike.check.shrink import Bindings, shrink
from maxlike.convert.structure import Structure
from maxlike.errors import UserError

SOME = ["quickstart", "llama_8b", "families/mamba_hybrid", "families/moma_routers", "published/longcat_flash"]


def twin(name: str, tmp_path):
    whole = config.load(name)
    bindings = Bindings(whole.config.operative)
    path = tmp_path / "small.gin"
    path.write_text("\n".join([bindings.text, *(change.text for change in shrink(bindings))]))
    return whole, config.load(str(path))


def kinds(experiment) -> list[tuple[str, ...]]:
    """The classes in every layer of one period of each stack, by their paths."""
    network = experiment.bare()
    classes = {path: s.value for path, s in Structure(network).settings.items() if isinstance(s.value, str)}
    layers: dict[str, list[str]] = {}
    for path, value in classes.items():
        head, _, rest = path.partition("/")
        number, _, inner = rest.partition("/")
        layers.setdefault(number if number.isdecimal() else head, []).append(f"{inner}={value}")
    return sorted({tuple(sorted(parts)) for parts in layers.values()})


def check(name: str, tmp_path):
    whole, small = twin(name, tmp_path)
    assert kinds(whole) == kinds(small)
    assert sum(leaf.size for leaf in jax.tree.leaves(small.abstract_model().params)) < 2e6
    assert small.batch_size == 16
    if name != "image_tokenizer":
        assert small.sequence_length == 32 and small.bare().dim % 8 == 0
    return whole, small


@pytest.mark.parametrize("name", SOME)
def test_a_twin_has_the_classes_of_the_experiment(name, tmp_path):
    check(name, tmp_path)


@pytest.mark.meshes
@pytest.mark.parametrize("name", [name for name in catalog.names("experiment") if name not in SOME])
def test_every_experiment_has_a_twin(name, tmp_path):
    check(name, tmp_path)


def changes(name: str) -> dict:
    return {change.left: change.now for change in shrink(Bindings(config.load(name).config.operative))}


def test_ratios_stay():
    grouped = changes("llama_8b")  # 32 heads, 8 key heads
    assert (grouped["attention.Attention.heads"], grouped["attention.Attention.kv_heads"]) == (8, 2)
    routed = changes("published/longcat_flash")  # 512 experts, 256 without weights, 12 choices of which 8 with weights
    values = {left.split("/")[-1]: now for left, now in routed.items()}
    assert (values["experts.Experts.count"], values["zero_experts.ZeroExperts.identity"]) == (8, 4)
    assert (values["routers.TopK.top_k"], values["balance.BudgetBias.target"]) == (3, 2.0)


def test_an_override_reaches_every_scope():
    bindings = Bindings(config.load("families/moe").config.operative)
    assert bindings.override("Attention", "window", 4) == [
        "dense/attention.Attention.window = 4",
        "sparse/attention.Attention.window = 4",
    ]
    assert bindings.override("Attention", "causal", True) == []


def test_a_twin_that_a_constructor_refuses_names_its_file(tmp_path, monkeypatch):
    from maxlike.check import shrink as module
    from maxlike.check.subject import Subject

    monkeypatch.setitem(module.RULES, "Stack.depth", lambda value, sizes, binding: 0)
    with pytest.raises(UserError, match=r"Stack.depth=0 .* mend .*small.gin"):
        Subject(config.load("quickstart"), tmp_path)
