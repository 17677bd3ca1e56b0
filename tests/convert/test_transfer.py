"""Loading piece by piece, and every way in which a directory can be wrong."""

import functools
import json
import weakref

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from layers.attention import Attention
from layers.block import Block
from layers.language_model import LanguageModel
from layers.mlp import MLP, GatedMLP
from layers.norm import RMSNorm
from layers.rope import LinearScaling, NTKScaling, RoPE
from layers.stack import Stack
from maxlike import checkpoint_tree
from maxlike.convert import decoder, export_job, families, structure, transfer
from maxlike.convert.forms import ByHead, Flat, Fused, Matrix, Same, Shifted, Taps, Transposed
from maxlike.convert.structure import Cannot, Structure
from maxlike.convert.tensor_files import TensorFiles
from maxlike.errors import UserError
from tests.reference import checkpoint

F = functools.partial


def network(**changes):
    """The network of the reference checkpoint, knob by knob."""
    knobs = {"heads": 2, "rope": RoPE, "qk_norm": RMSNorm} | changes.pop("attention", {})
    block = F(Block, mixer=F(Attention, **knobs), ffn=F(GatedMLP, width=32), norm=RMSNorm)
    stack = {"pattern": (block,), "depth": 2} | changes.pop("stack", {})
    return F(LanguageModel, **{"vocab": 2048, "dim": 16, "stack": F(Stack, **stack), "norm": RMSNorm} | changes), block


def load(directory, factory, sharding=None):
    family, _, _ = families.read(directory)
    graph, state = jax.eval_shape(lambda: nnx.split(factory(rngs=nnx.Rngs(params=0))))
    flat = checkpoint_tree.flatten(nnx.to_pure_dict(state))
    place = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place) for path, leaf in flat.items()}
    net = Structure(nnx.merge(graph, state))
    return family, net, transfer.load(TensorFiles(directory), family, net, abstract)


@pytest.mark.parametrize("form", [Flat(), Matrix(), Matrix(2), Transposed(), Transposed(2), Taps(), Shifted()])
def test_forms_invert(form):
    array = np.arange(24.0).reshape(2, 3, 4)
    stored = form.store((array,))
    assert stored.shape == form.shape((array.shape,))
    np.testing.assert_array_equal(form.load(stored, (array.shape,))[0], array)


def test_kernels_that_share_heads_lie_head_by_head():
    arrays = (
        np.arange(24.0).reshape(2, 3, 4),
        100 + np.arange(12.0).reshape(2, 3, 2),
        200 + np.arange(6.0).reshape(2, 3),
    )
    shapes = tuple(array.shape for array in arrays)
    stored = ByHead().store(arrays)
    assert stored.shape == ByHead().shape(shapes) == (21, 2)
    for array, back in zip(arrays, ByHead().load(stored, shapes), strict=True):
        np.testing.assert_array_equal(back, array)
    np.testing.assert_array_equal(stored[7:14, 1], [16, 17, 18, 19, 108, 109, 204])  # the second head, of input 1
    halves = arrays[2].reshape(2, 3), arrays[1][:, :, 0]
    np.testing.assert_array_equal(ByHead(groups=1).store(halves)[:, 0], [200, 201, 202, 100, 102, 104])
    offsets = arrays[0][0], arrays[1][0]
    assert ByHead(inputs=0).shape(tuple(x.shape for x in offsets)) == (18,)
    np.testing.assert_array_equal(ByHead(inputs=0).store(offsets)[:6], [0, 1, 2, 3, 100, 101])


@pytest.mark.parametrize("form", [Fused(Transposed()), Fused(Matrix(), axis=1), Fused(Flat()), Fused(Same())])
def test_fused_parts_lie_one_after_another(form):
    arrays = (np.arange(12.0).reshape(3, 4), 100 + np.arange(6.0).reshape(3, 2))
    if isinstance(form.part, Same):
        arrays = tuple(array.T for array in arrays)
    shapes = tuple(array.shape for array in arrays)
    stored = form.store(arrays)
    assert stored.shape == form.shape(shapes)
    for array, back in zip(arrays, form.load(stored, shapes), strict=True):
        np.testing.assert_array_equal(back, array)
    first = form.part.store(arrays[:1])
    np.testing.assert_array_equal(np.take(stored, range(first.shape[form.axis]), form.axis), first)


def test_layers_have_one_name_however_they_are_grouped(tmp_path):
    directory = checkpoint.write(tmp_path / "a", num_hidden_layers=None, weights={})
    directory.joinpath("config.json").write_text(json.dumps(checkpoint.CONFIG | {"num_hidden_layers": 4}))
    weights = checkpoint.tensors(checkpoint.CONFIG | {"num_hidden_layers": 4})
    safetensors.numpy.save_file(weights, directory / "model.safetensors")
    plain = network(stack={"depth": 4})[0]
    other, block = network()
    groups = {"prefix": (block,), "pattern": (block, block), "depth": 2, "suffix": (block,), "remat": "full"}
    other = network(stack=groups)[0]
    assert structure.difference(structure.of(plain), structure.of(other), ("a", "b")) is None
    for factory in (plain, other):
        family, net, flat = load(directory, factory)
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        out.mkdir()
        transfer.store(family, net, flat, directory=out, dtype="float32", shard_bytes=10**9)
        written = safetensors.numpy.load_file(out / "model.safetensors")
        assert written.keys() == weights.keys()
        for name, value in weights.items():
            np.testing.assert_array_equal(written[name], value)


def test_a_piece_and_a_tensor_at_a_time_onto_any_mesh(tmp_path, monkeypatch):
    directory = checkpoint.write(tmp_path / "a")
    whole = load(directory, network()[0])[2]
    alive, most, read = weakref.WeakSet(), [0], TensorFiles.read

    class Counted(np.ndarray):
        pass

    def counting(self, name):
        tensor = read(self, name).view(Counted)
        alive.add(tensor)
        most[0] = max(most[0], len(alive))
        return tensor

    monkeypatch.setattr(Counted, "__hash__", object.__hash__, raising=False)
    monkeypatch.setattr(Counted, "__eq__", object.__eq__, raising=False)
    monkeypatch.setattr(TensorFiles, "read", counting)
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    split = load(directory, network()[0], NamedSharding(mesh, PartitionSpec("fsdp")))[2]
    assert most[0] == 1
    for path, array in whole.items():
        np.testing.assert_array_equal(array, split[path])
        assert not split[path].sharding.is_fully_replicated


def test_an_export_holds_one_shard_at_a_time(tmp_path, monkeypatch):
    """While a tensor is fetched, no other one is on the host, and nothing of a shard that is written already."""
    family, net, flat = load(checkpoint.write(tmp_path / "a"), network()[0])
    fetched, written, most, fetch, save = [], [], [0], transfer._slice, safetensors.numpy.save_file

    def alive(references) -> int:
        return sum(reference() is not None for reference in references)

    def counted_slice(leaf, slot):
        assert not alive(written)
        array = fetch(leaf, slot).copy()
        fetched.append(weakref.ref(array))
        most[0] = max(most[0], alive(fetched))
        return array

    def counted_save(content, path, **knobs):
        written.extend(map(weakref.ref, content.values()))
        assert sum(array.nbytes for array in content.values()) <= 4096 or len(content) == 1
        save(content, path, **knobs)

    monkeypatch.setattr(transfer, "_slice", counted_slice)
    monkeypatch.setattr(safetensors.numpy, "save_file", counted_save)
    tmp_path.joinpath("b").mkdir()
    names = transfer.store(family, net, flat, directory=tmp_path / "b", dtype="float32", shard_bytes=4096)
    assert len(names) > 4 and most[0] == 1
    files = TensorFiles(tmp_path / "b")
    for name, value in checkpoint.tensors().items():
        np.testing.assert_array_equal(files.read(name), value)


def test_a_padded_vocabulary_is_zeros_that_are_not_exported(tmp_path):
    directory = checkpoint.write(tmp_path / "a")
    family, net, flat = load(directory, network(vocab_multiple=600)[0])
    table = np.asarray(flat["embed/table"])
    assert table.shape == (2400, 16) and not table[2048:].any() and table[:2048].any()
    tmp_path.joinpath("b").mkdir()
    transfer.store(family, net, flat, directory=tmp_path / "b", dtype="float32", shard_bytes=10**9)
    written = safetensors.numpy.load_file(tmp_path / "b/model.safetensors")
    np.testing.assert_array_equal(written["model.embed_tokens.weight"], table[:2048])


def test_half_precision_files_are_read_exactly(tmp_path):
    half = {name: value.astype(np.float16) for name, value in checkpoint.tensors().items()}
    flat = load(checkpoint.write(tmp_path / "a", half), network()[0])[2]
    assert flat["embed/table"].dtype == np.float32
    np.testing.assert_array_equal(flat["embed/table"], half["model.embed_tokens.weight"].astype(np.float32))


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [("aaaa", (0, 1)), ("abab", (0, 2)), ("aabbb", (2, 1)), ("abbbb", (1, 1)), ("aaabaaab", (0, 4)), ("cabab", (1, 2)),
     ("a", (0, 1)), ("abc", (2, 1))],
)  # fmt: skip
def test_layers_are_grouped_into_the_fewest_blocks(kinds, expected):
    assert decoder.grouped(kinds) == expected


def test_what_differs_is_named():
    one = structure.of(network()[0])
    other = structure.of(network(attention={"rope": F(RoPE, base=5e5), "window": 8, "qkv_bias": True}, vocab=64)[0])
    table = structure.difference(one, other, ("left", "right"))
    for words in (
        "RoPE.base",
        "Attention.window",
        "500000.0",
        "LanguageModel.vocab",
        "stack/*/mixer/query/bias",
        "0..1",
    ):
        assert words in table
    assert structure.difference(one, one, ("left", "right")) is None


def test_an_export_is_refused_where_no_family_says_all_of_it():
    assert export_job.describe(structure.of(network()[0]))[0].model_type == "qwen3"
    plain = network(attention={"qk_norm": None})[0]
    assert export_job.describe(structure.of(plain))[0].model_type == "llama"
    scaled = network(attention={"qk_norm": None, "rope": F(RoPE, scaling=F(LinearScaling, factor=2.0))})[0]
    assert export_job.describe(structure.of(scaled))[1]["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    for knobs, words in (
        ({"soft_cap": 30.0}, "Attention.soft_cap"),
        ({"scale": 0.5}, "Attention.scale"),
        ({"causal": False}, "Attention.causal"),
        ({"rope": None}, "position embedding NoneType"),
        ({"rope": F(RoPE, scaling=F(NTKScaling, factor=2.0))}, "NTKScaling"),
        ({"sinks": True}, "sinks"),
    ):
        with pytest.raises(Cannot, match=words):
            export_job.describe(structure.of(network(attention=knobs)[0]))
    block = F(Block, mixer=F(Attention, heads=2, rope=RoPE), ffn=F(MLP, width=32), norm=RMSNorm)
    ungated = structure.of(network(stack={"pattern": (block,)})[0])
    with pytest.raises(Cannot, match="stack/0/ffn/gate/kernel"):
        export_job.describe(ungated, "llama")
    with pytest.raises(UserError, match="did you mean 'llama'"):
        export_job.describe(structure.of(plain), "lama")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["Qwen9ForCausalLM"]}, "Qwen9ForCausalLM is not one we can express: did you mean"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' has no counterpart"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "extra": 1}}, "extra = 1"),
        ({"hidden_act": "mish"}, "hidden_act = 'mish'"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_attention_heads": 3, "head_dim": None}, "cannot be built.*heads=3|does not divide"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers = '2'"),
        ({"vocab_size": 0}, "vocab_size = 0"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps = 'small' is not a float"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"rope_parameters": [1]}, "rope_parameters = .1. is not an object"),
    ],
)
def test_a_config_that_cannot_be_expressed_is_refused_by_name(tmp_path, changes, words):
    directory = checkpoint.write(tmp_path / "a", {}, **changes)
    with pytest.raises(UserError, match=words):
        structure.of(families.read(directory)[1])


def test_tensors_that_do_not_fit_are_a_table(tmp_path):
    weights = checkpoint.tensors()
    weights["model.layers.0.mlp.up_proj.weight"] = np.zeros((31, 16), np.float32)
    weights["model.layers.1.self_attn.q_proj.bias"] = np.zeros(16, np.float32)
    del weights["model.norm.weight"]
    with pytest.raises(UserError) as error:
        load(checkpoint.write(tmp_path / "a", weights), network()[0])
    lines = str(error.value).splitlines()[2:]
    assert [line.split()[:2] for line in lines] == [
        ["missing", "model.norm.weight"],
        ["extra", "model.layers.1.self_attn.q_proj.bias"],
        ["changed", "model.layers.0.mlp.up_proj.weight"],
    ]
    assert "[31, 16]" in lines[2] and "[32, 16]" in lines[2]


def test_tied_tensors_must_be_equal(tmp_path):
    weights = checkpoint.tensors()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    load(checkpoint.write(tmp_path / "a", weights), network()[0])
    weights["lm_head.weight"][0] += 1
    with pytest.raises(UserError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight and their values differ"):
        load(checkpoint.write(tmp_path / "b", weights), network()[0])


def damage(kind, directory):
    model, config = directory / "model.safetensors", directory / "config.json"
    index = directory / "model.safetensors.index.json"
    if kind == "truncated":
        model.write_bytes(model.read_bytes()[:-100])
    elif kind == "no header":
        model.write_bytes(b"\xff" * 64)
    elif kind == "pickle":
        model.rename(directory / "pytorch_model.bin")
    elif kind == "outside":
        index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    elif kind == "not held":
        index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    elif kind == "no map":
        index.write_text("{}")
    elif kind == "integers":
        weights = checkpoint.tensors()
        weights["model.norm.weight"] = np.zeros(16, np.int8)
        safetensors.numpy.save_file(weights, model)
    elif kind == "no json":
        config.write_text("{'a': 1}")
    elif kind == "a list":
        config.write_text("[]")
    elif kind == "no config":
        config.unlink()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("truncated", "cannot be read as safetensors"),
        ("no header", "cannot be read as safetensors"),
        ("pickle", "is a pickle, which is never read"),
        ("outside", "no plain file name"),
        ("not held", "says that model.safetensors holds a, and it does not"),
        ("no map", "no weight_map"),
        ("integers", "model.norm.weight is I8"),
        ("no json", "is not JSON"),
        ("a list", "holds no JSON object"),
        ("no config", "cannot be read"),
    ],
)
def test_a_damaged_directory_is_one_sentence(tmp_path, kind, words):
    directory = checkpoint.write(tmp_path / "a")
    damage(kind, directory)
    with pytest.raises(UserError, match=words):
        load(directory, network()[0])
