"""What a compiled program sends: hand-written programs with closed forms, and every form in which XLA writes them."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from maxlike.collectives import Collective, _groups, by_axis, collectives
from maxlike.hlo import Instruction


def mesh(**shape):
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def test_two_products_on_fsdp_and_tensor():
    # Y = X W1 W2 as a layer of fsdp 2 x tensor 4 has it. Of each weight an fsdp device gathers the other half, of W2
    # once more for the gradient of X W1; Y is summed over tensor, each weight's gradient over the batch on fsdp.
    devices = mesh(fsdp=2, tensor=4)
    D, F, B = 16, 64, 8

    def place(x, *spec):
        return jax.lax.with_sharding_constraint(x, NamedSharding(devices, PartitionSpec(*spec)))

    def loss(weights, x_BD):
        up_DF, down_FD = weights
        h_BF = place(place(x_BD, "fsdp", None) @ up_DF, "fsdp", "tensor")
        return jnp.sum(jnp.square(place(h_BF @ down_FD, "fsdp", None)))

    specs = (PartitionSpec("fsdp", "tensor"), PartitionSpec("tensor", "fsdp"))
    shardings = tuple(NamedSharding(devices, spec) for spec in specs)
    weights = tuple(jax.ShapeDtypeStruct(s, jnp.float32, sharding=p) for s, p in zip([(D, F), (F, D)], shardings))
    x_BD = jax.ShapeDtypeStruct((B, D), jnp.float32, sharding=NamedSharding(devices, PartitionSpec("fsdp", None)))
    lowered = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings)).lower(weights, x_BD)
    found = collectives(lowered.compile().as_text(), devices)
    local = D * F * 4 // 4  # bytes of a weight on one tensor device, whole over fsdp
    sums = by_axis(found)
    assert sums["all-gather", ("fsdp",)] == 3 * local // 2
    # the gradients of both weights (2 X / 2 each); this backend writes no reduce-scatter; and the loss
    assert sums["all-reduce", ("fsdp",)] == 2 * local + 4
    assert sums["all-reduce", ("tensor",)] == 2 * (B // 2) * D * 4 * 3 // 4  # Y; nobody asks for a gradient of X
    assert len(sums) == 3


def test_loops_multiply():
    devices = mesh(context=4, data=2)
    ring = [(i, (i + 1) % 4) for i in range(4)]

    @functools.partial(
        jax.shard_map, mesh=devices, in_specs=PartitionSpec("context"), out_specs=PartitionSpec("context")
    )
    def local(x):
        def inner(x, _):
            return jax.lax.ppermute(x, "context", ring) * 2, None

        def outer(x, _):
            return jax.lax.scan(inner, jnp.sin(x), length=3)[0], None

        return jax.lax.scan(outer, x, length=5)[0]

    found = collectives(jax.jit(local).lower(jnp.zeros((8, 6))).compile().as_text(), devices)
    assert [(c.kind, c.axes, c.dtype, c.bytes, c.times) for c in found] == [
        ("collective-permute", ("context",), "f32", 2 * 6 * 4, 15)
    ]
    assert found[0].name.endswith("ppermute")


def instruction(groups: str) -> Instruction:
    return Instruction("all-reduce.1", "f32[4]", "all-reduce", "%x", f", channel_id=1, replica_groups={groups}, a=b")


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,2},{1,3}}", [(0, 2), (1, 3)]),
        ("{}", [(0, 1, 2, 3, 4, 5, 6, 7)]),
        ("[2,4]<=[8]", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("[4,2]<=[2,4]T(1,0)", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("[2,4]<=[2,2,2]T(1,0,2)", [(0, 1, 4, 5), (2, 3, 6, 7)]),
        ("mesh['a'=2,'b'=4] {'b'}", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("mesh['a'=2,'b'=4] {'a'}", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}", [(3, 2), (1, 0)]),
        ("mesh['a'=8] {'a':(1)2}", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("mesh['a'=8] {'a':(2)2}", [(0, 2), (1, 3), (4, 6), (5, 7)]),
        ("mesh['a'=2,'b'=4] {'a','b':(2)2}", [(0, 1, 4, 5), (2, 3, 6, 7)]),
    ],
)
def test_groups_of_devices(text, groups):
    assert _groups(instruction(text), 8) == groups


def test_unknown_groups_are_refused():
    with pytest.raises(ValueError, match="no known form"):
        _groups(instruction("<8 devices>"), 8)


# As compilers for TPU and GPU write it: asynchronous halves, a loop that does not state its trip count (its bound lies
# in the carry), a conditional, a gather in pieces beside other work, a reduce-scatter as a fusion of an all-reduce.
TEXT = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p: f32[16,8]) -> f32[2,8] {
  %p = f32[16,8]{1,0:T(8,128)} parameter(0)
  %all-reduce.9 = f32[16,8]{1,0:T(8,128)} all-reduce(%p), channel_id=9, replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %slice = f32[2,8]{1,0} dynamic-slice(%all-reduce.9, %zero, %zero), dynamic_slice_sizes={2,8}
}

%body (carry: (s32[], bf16[4,8], s32[])) -> (s32[], bf16[4,8], s32[]) {
  %carry = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %x = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%carry), index=1
  %n = s32[] get-tuple-element(%carry), index=2
  %gather = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%x), channel_id=1, replica_groups=[2,4]<=[8]
  %gathered = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather-done(%gather), metadata={op_name="jit(step)/while/body (x)"}
  %y = bf16[4,8]{1,0} slice(%gathered), slice={[0:4], [0:8]}
  ROOT %out = (s32[], bf16[4,8], s32[]) tuple(%next, %y, /*index=2*/%n)
}

%condition (carry.1: (s32[], bf16[4,8], s32[])) -> pred[] {
  %carry.1 = (s32[], bf16[4,8]{1,0}, s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%carry.1), index=0
  %n.1 = s32[] get-tuple-element(%carry.1), index=2
  ROOT %less = pred[] compare(%i.1, %n.1), direction=LT
}

%piece.1 (u: f32[4]) -> f32[16] {
  %u = f32[4]{0} parameter(0)
  ROOT %begun = f32[16] all-gather(%u), channel_id=7, replica_groups=[2,4]<=[8], frontend_attributes={chain_id="0"}
}

%piece.2 (v: f32[4]) -> f32[16] {
  %v = f32[4]{0} parameter(0)
  ROOT %ended = f32[16] all-gather(%v), channel_id=7, replica_groups=[2,4]<=[8], frontend_attributes={chain_id="0"}
}

%idle (q: f32[4]) -> f32[4] {
  ROOT %q = f32[4]{0} parameter(0)
}

%busy (r: f32[4]) -> f32[4] {
  %r = f32[4]{0} parameter(0)
  ROOT %permuted = f32[4]{0} collective-permute(%r), channel_id=4, source_target_pairs={{0,1},{1,0},{2,2},{3,3}}
}

ENTRY %main (x.1: bf16[4,8], z: f32[16,8], w: f32[4], which: pred[]) -> f32[2,8] {
  %x.1 = bf16[4,8]{1,0} parameter(0)
  %z = f32[16,8]{1,0} parameter(1)
  %w = f32[4]{0} parameter(2)
  %which = pred[] parameter(3)
  %first = s32[] constant(0)
  %last = s32[] constant(14)
  %start = (s32[], bf16[4,8], s32[]) tuple(%first, %x.1, %last)
  %loop = (s32[], bf16[4,8]{1,0}, s32[]) while(%start), condition=%condition, body=%body
  %either = f32[4]{0} conditional(%which, %w, %w), true_computation=%busy, false_computation=%idle
  %beside.1 = f32[16]{0} fusion(%w), kind=kCustom, calls=%piece.1
  %beside.2 = f32[16]{0} fusion(%w), kind=kCustom, calls=%piece.2
  ROOT %scattered = f32[2,8]{1,0} fusion(%z), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_forms_of_other_backends():
    assert collectives(TEXT, mesh(data=2, fsdp=4)) == [
        Collective("all-gather", ("fsdp",), "bf16", 4 * 8 * 2 * 3, 7, "gather"),
        Collective("collective-permute", ("fsdp",), "f32", 16, 1, "permuted"),
        Collective("all-gather", ("fsdp",), "f32", 4 * 4 * 3, 1, "begun"),
        Collective("reduce-scatter", ("data", "fsdp"), "f32", 16 * 8 * 4 * 7 // 8, 1, "all-reduce.9"),
    ]


def test_a_loop_of_unknown_length_is_refused():
    unknown = TEXT.replace("constant(14)", "parameter(4)")
    with pytest.raises(ValueError, match="gather runs in a loop whose trip count"):
        collectives(unknown, mesh(data=2, fsdp=4))


def test_a_smaller_mesh_and_another_text_are_refused():
    with pytest.raises(ValueError, match="more devices than the mesh of 4"):
        collectives(TEXT.replace("[2,4]<=[8]", "[4,2]<=[8]"), mesh(data=4))
    with pytest.raises(ValueError, match="no computation is marked ENTRY"):
        collectives("module @jit_step {}", mesh(data=8))
