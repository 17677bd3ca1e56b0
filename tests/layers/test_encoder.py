"""LanguageModel in encoder form: the ModernBERT layout, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.attention import Attention
from layers.block import Block
from layers.context import Context
from layers.embed import Embed, Head, PredictionHead
from layers.language_model import LanguageModel
from layers.mlp import GatedMLP
from layers.norm import Identity, LayerNorm
from layers.rope import RoPE
from layers.stack import Stack
from tests.reference.random import random_module

F = functools.partial
NORM = F(LayerNorm, bias=False)


def encoder(rngs, *, vocab, dim, layers, heads, width, local=64, causal=False):
    """Every third layer sees all, the others `local` tokens to each side; the first has no norm before its mixer, for
    the embedding has one behind."""

    def block(base, window, **knobs):
        mixer = F(Attention, heads=heads, causal=causal, window=window, rope=F(RoPE, base=base))
        return F(Block, mixer=mixer, ffn=F(GatedMLP, width=width, activation="gelu"), norm=NORM, **knobs)

    near, far = block(10000.0, local + 1), block(160000.0, None)
    first = block(160000.0, None, mixer_norm=Identity)
    return LanguageModel(
        vocab=vocab,
        dim=dim,
        stack=F(Stack, prefix=(first,), pattern=(near, near, far), depth=layers - 1),
        norm=NORM,
        embed=F(Embed, norm=NORM),
        head=F(PredictionHead, norm=NORM, head=F(Head, bias=True)),
        rngs=rngs,
    )


VOCAB, D, H, FFN, LAYERS, T = 48, 32, 4, 24, 7, 30
TINY = {"vocab": VOCAB, "dim": D, "layers": LAYERS, "heads": H, "width": FFN, "local": 4}


def our_params(weights: dict[str, np.ndarray]) -> dict:
    """ModernBERT's names to ours; q, k and v lie behind each other, as do gate and up."""

    def block(i):
        at = f"model.layers.{i}"
        qkv = weights[f"{at}.attn.Wqkv.weight"].reshape(3, H, D // H, D)
        gate, up = np.split(weights[f"{at}.mlp.Wi.weight"], 2)
        mixer = {n: {"kernel": np.moveaxis(w, -1, 0)} for n, w in zip(("query", "key", "value"), qkv, strict=True)}
        mixer["out"] = {"kernel": weights[f"{at}.attn.Wo.weight"].T.reshape(H, D // H, D)}
        ffn = {"gate": gate, "up": up, "down": weights[f"{at}.mlp.Wo.weight"]}
        norm = {"mixer_norm": {"gain": weights[f"{at}.attn_norm.weight"]}} if i else {}
        ffn_norm = {"gain": weights[f"{at}.mlp_norm.weight"]}
        return norm | {"mixer": mixer, "ffn": {n: {"kernel": w.T} for n, w in ffn.items()}, "ffn_norm": ffn_norm}

    periods = {n: jax.tree.map(lambda *x: np.stack(x), *(block(i) for i in range(1 + n, LAYERS, 3))) for n in range(3)}
    return {
        "embed": {
            "table": weights["model.embeddings.tok_embeddings.weight"],
            "norm": {"gain": weights["model.embeddings.norm.weight"]},
        },
        "stack": {"prefix": {0: block(0)}, "periods": periods},
        "norm": {"gain": weights["model.final_norm.weight"]},
        "head": {
            "dense": {"kernel": weights["head.dense.weight"].T},
            "norm": {"gain": weights["head.norm.weight"]},
            "head": {"bias": weights["decoder.bias"]},
        },
    }


def random_weights(torch, model):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * 0.2 + (1.0 if "norm" in name else 0.0))
    return model.eval()


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
def test_logits_are_those_of_transformers(causal, record_property):
    """The pair of Ettin. The decoder's windows count the token itself there, the encoder's do not."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    name = "ModernBertDecoder" if causal else "ModernBert"
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCAB, hidden_size=D, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=H,
        global_attn_every_n_layers=3, local_attention=10 if causal else 8, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, cls_token_id=1, sep_token_id=2, attn_implementation="eager",
    )  # fmt: skip
    model = random_weights(torch, getattr(transformers, f"{name}For{'CausalLM' if causal else 'MaskedLM'}")(config))
    weights = {name.replace("lm_head", "head"): w.detach().numpy() for name, w in model.state_dict().items()}
    if causal:  # q, k and v apart
        for i in range(LAYERS):
            at = f"model.layers.{i}.attn"
            weights[f"{at}.Wqkv.weight"] = np.concatenate([weights.pop(f"{at}.{x}_proj.weight") for x in "qkv"])
    params = our_params(weights)
    graph, state = jax.eval_shape(lambda: nnx.split(encoder(nnx.Rngs(params=0), causal=causal, **TINY)))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, nnx.to_pure_dict(state))
    tokens = np.random.default_rng(0).integers(1, VOCAB, (2, T))

    @jax.jit
    def run(params, tokens_BT):
        network = nnx.merge(graph, params)
        return network.logits(network(tokens_BT, Context.of(tokens_BT)).hidden_BTD)

    got = run(jax.tree.map(jnp.asarray, params), jnp.asarray(tokens))
    with torch.no_grad():
        wanted = model(torch.from_numpy(tokens)).logits.numpy()
    record_property(f"worst {type(model).__name__}", float(np.abs(got - wanted).max()))
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def build(**knobs):
    return nnx.merge(*random_module(lambda rngs: encoder(rngs, **(TINY | knobs)))[:2])


def test_decoding_an_encoder_is_refused_and_its_twin_decodes():
    model, twin = build(), build(causal=True)
    assert not model.causal and twin.causal
    with pytest.raises(ValueError, match=r"Attention.causal=False has no cache"):
        model.init_cache(1, 4, jnp.float32)
    twin.init_cache(1, 4, jnp.float32)


def test_flops_count_the_dense_layer_of_the_head():
    model = build()
    assert model.flops_per_token(16) == 3 * (model.stack.flops_per_token(16) + 2 * D * D + 2 * D * VOCAB)


def test_a_shrunk_gradient_reaches_the_table_from_both_its_uses():
    tokens = jnp.asarray([[1, 2, 3]])

    def loss(table, scale):
        embed = Embed(6, 4, gradient_scale=scale, rngs=nnx.Rngs(params=0))
        embed.table[...] = table
        hidden = jnp.tanh(embed(tokens, Context.of(tokens)))
        return jnp.sum(jnp.square(Head(6, 4, rngs=nnx.Rngs(params=0))(hidden, embed.weights())))

    table = jax.random.normal(jax.random.key(0), (6, 4))
    whole, shrunk = (jax.value_and_grad(loss)(table, scale) for scale in (1.0, 0.1))
    assert whole[0] == shrunk[0]
    np.testing.assert_allclose(shrunk[1], 0.1 * whole[1], rtol=1e-5)


def test_refusals():
    with pytest.raises(ValueError, match=r"Embed.gradient_scale=0.0"):
        Embed(6, 4, gradient_scale=0.0, rngs=nnx.Rngs(params=0))
    with pytest.raises(ValueError, match=r"PredictionHead.activation='tanh'"):
        PredictionHead(6, 4, norm=NORM, activation="tanh", rngs=nnx.Rngs(params=0))
