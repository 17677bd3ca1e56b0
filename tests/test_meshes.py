"""Every family on every mesh computes what it computes on one device: losses and gradients over five steps.

ROWS holds one line a (family, mesh): add yours there. `pytest -m meshes tests/test_meshes.py` runs all of them.
"""

import functools
import math

import jax
import numpy as np
import pytest

from layers import kernels
from maxlike import config
from maxlike.program import Program
from maxlike.sharding import flat_axes, path_names

ROWS_, LENGTH, STEPS, VOCAB = 8, 32, 5, 256
# Five steps must not blow up rounding errors. Adam divides by the root of the second moment: with the usual epsilon a
# gradient of rounding errors becomes a step; with this one parameters move by a tenth of their gradients. A norm
# divides by the size of what it reads: embeddings of 0.02 make gradients 50 times as large and their errors with them.
SHRUNK = (
    f"vocab = {VOCAB}",
    f"steps = {STEPS}",
    "dim = 32",
    "width = 64",
    f"experiment.Experiment.batch_size = {ROWS_}",
    f"experiment.Experiment.sequence_length = {LENGTH}",
    "experiment.Experiment.optimizer = @adamw.AdamW()",
    "adamw.AdamW.eps = 0.1",
    "others/schedules.WSD.lr = 0.01",
    "norm.RMSNorm.eps = 0.1",
    "stack.Stack.scan = True",
)
FAMILIES = {
    "transformer": ("heads = 8", "depth = 4", "attention.Attention.kv_heads = 4"),
    "linear_attention": (
        "heads = 8",
        "depth = 2",
        "layers = 3",
        "linear_attention.LightningAttention.norm = @norm.RMSNorm",
    ),
    "mamba_hybrid": (
        "heads = 8",
        "depth = 3",
        "mamba2.Mamba2.head_dim = 8",
        "mamba2.Mamba2.state = 8",
        "mla.MLA.kv_rank = 8",
        "mla.MLA.nope_dim = 4",
        "mla.MLA.rope_dim = 4",
        "mla.MLA.value_dim = 4",
    ),
    "moe": ("heads = 8", "depth = 2", "expert_width = 16"),
    "moma": ("heads = 8", "depth = 2", "first_image_id = 160"),
}
# What of two families a pipeline can compute alike: two stages need two periods of the pattern, and MoMa's routers that
# choose among the tokens of a batch have those of a micro-batch there.
PIPED = {
    "mamba_hybrid_deep": ("mamba_hybrid", (*(b for b in FAMILIES["mamba_hybrid"] if b != "depth = 3"), "depth = 6")),
    "moma_by_sequence": ("moma", (*FAMILIES["moma"], "modality_moe.ModalityMoE.routing_scope = 'sequence'")),
}
GATHER = ("sharding.Mesh.keys = 'gather'",)
MESHES = {
    "data": ("mesh/data", ()),
    "fsdp": ("mesh/fsdp", ()),
    "hsdp": ("mesh/hsdp", ()),
    "tensor": ("mesh/tensor", ("sharding.Mesh.shape = {'tensor': 4}",)),
    "fsdp_tp": ("mesh/fsdp_tp", ()),
    "hsdp_tp": ("mesh/hsdp_tp", ()),
    "context": ("mesh/context", ()),
    "context_gather": ("mesh/context", GATHER),
    "fsdp_context": ("mesh/fsdp_context", ()),
    "fsdp_context_gather": ("mesh/fsdp_context", GATHER),
    "tensor_context": ("mesh/context", ("sharding.Mesh.shape = {'fsdp': 2, 'context': 2, 'tensor': 2}",)),
    "expert": ("mesh/expert", ()),
    "expert_fsdp": ("mesh/expert_fsdp", ()),
    "expert_tp": ("mesh/expert_tp", ()),
    "pipeline": ("mesh/pipeline", ("micro_batches = 2",)),
    "pipeline_fsdp": ("mesh/pipeline_fsdp", ("micro_batches = 2",)),
    "pipeline_1f1b": ("mesh/pipeline_1f1b", ("micro_batches = 2",)),
    "pipeline_twice": ("mesh/pipeline_repeats", ("micro_batches = 2", "pipeline.Circular.repeats = 2")),
    "pipeline_ring": (
        "mesh/pipeline",
        ("micro_batches = 2", "sharding.Mesh.shape = {'stage': 2, 'context': 2, 'fsdp': 2}"),
    ),
    "pipeline_1f1b_ring": (
        "mesh/pipeline_1f1b",
        ("micro_batches = 2", "sharding.Mesh.shape = {'stage': 2, 'context': 2, 'fsdp': 2}"),
    ),
    "pipeline_experts": (
        "mesh/pipeline",
        ("micro_batches = 2", "sharding.Mesh.shape = {'stage': 2, 'expert': 2, 'tensor': 2}"),
    ),
    "pipeline_1f1b_experts": (
        "mesh/pipeline_1f1b",
        ("micro_batches = 2", "sharding.Mesh.shape = {'stage': 2, 'expert': 2, 'tensor': 2}"),
    ),
}
FAST = {
    ("transformer", "hsdp_tp"): pytest.mark.large,
    ("transformer", "pipeline"): (),
    ("moe", "expert_tp"): pytest.mark.large,
}
UNLIKE = {(family, mesh) for mesh in MESHES if "pipeline" in mesh for family in ("mamba_hybrid", "moma")}
UNLIKE |= {(family, mesh) for mesh in MESHES if "pipeline" not in mesh for family in PIPED}
# Four runs of layers need four periods.
UNLIKE |= {(family, "pipeline_twice") for family in (*FAMILIES, *PIPED) if family != "transformer"}
ROWS = [
    pytest.param(family, mesh, marks=FAST.get((family, mesh), pytest.mark.meshes))
    for mesh in MESHES
    for family in (*FAMILIES, *PIPED)
    if (family, mesh) not in UNLIKE
]


def batch(step: int) -> dict[str, np.ndarray]:
    """Rows of a few documents with padding behind them; some targets are masked, more in some rows than in others."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, VOCAB, (ROWS_, LENGTH + 1)).astype(np.int32)
    segments = 1 + np.cumsum(rng.random((ROWS_, LENGTH)) < 0.1, 1)
    segments = np.where(np.arange(LENGTH) < rng.integers(LENGTH // 2, LENGTH + 1, (ROWS_, 1)), segments, 0)
    begins = np.diff(segments, axis=1, prepend=-1) != 0
    index = np.arange(LENGTH)
    positions = index - np.maximum.accumulate(np.where(begins, index, 0), 1)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": segments.astype(np.int32),
        "positions": positions.astype(np.int32),
        "loss_weights": ((segments > 0) & (rng.random((ROWS_, LENGTH)) < 0.9)).astype(np.float32),
        "target_bytes": np.full((ROWS_, LENGTH), 4, np.int32),
    }


def train(family: str, overlay: str, bindings: tuple[str, ...], start: dict | None = None):
    """(state of step 0, losses and gradient norms of the steps, Adam's first moments behind each step), on the host.
    start: the state of step 0, None to initialise one."""
    name, small = PIPED.get(family) or (family, FAMILIES[family])
    experiment = config.load(f"families/{name}", overlays=[overlay], bindings=[*SHRUNK, *small, *bindings])
    program = Program.of(experiment, experiment.mesh.open())
    kernels.forget()
    step = program.lower_step(batch(0)).compile()
    start = jax.device_get(program.init()) if start is None else start
    state = jax.device_put(start, program.shardings)
    allow = jax.device_put(np.bool_(True), program.layout.replicated)
    numbers, moments = [], {}
    for k in range(STEPS):
        state, metrics = step(state, program.put(batch(k)), allow)
        numbers.append((float(metrics["loss"]), float(metrics["grad_norm"])))
        # the gradients so far, clipped to a norm of 1 and averaged: behind the first step, a tenth of the gradient
        moments |= {f"step {k}: {'/'.join(n)}": np.asarray(leaf) for n, leaf in flat(state["opt"]) if "mu" in n}
    assert len(moments) >= STEPS * len(flat(state["params"]))
    return start, numbers, moments


def flat(tree):
    return [(path_names(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


@functools.cache
def alone(family: str):
    return train(family, "mesh/single", ())


@pytest.mark.parametrize(("family", "mesh"), ROWS)
def test_a_mesh_changes_nothing(family, mesh):
    start, one_numbers, one_moments = alone(family)
    _, numbers, moments = train(family, *MESHES[mesh], start)
    np.testing.assert_allclose(numbers, one_numbers, rtol=1e-5)
    for name, value in one_moments.items():
        # of an array's largest, or an eps of float32 of all gradients, whose norm is 1
        atol = 1e-5 * np.abs(value).max() + 1e-8
        np.testing.assert_allclose(moments[name], value, rtol=0, atol=atol, err_msg=name)


# What the rules replicate over fsdp on purpose: gains and offsets of norms, convolutions over a few taps, and numbers a
# head, none with a dimension of the model's width that would have to be gathered in another layout.
SMALL_AXES = {"layers", "norm", "taps", "heads", "kv_heads", "head_dim", "groups", "state"}
# Where a pipeline needs another depth than the file's.
EVEN = {"families/moe": ("depth = 4",), "families/linear_attention": ("depth = 4", "layers = 5")}


def wanted(axes: set[str]) -> set[str]:
    """The mesh axes that must cut a parameter of these logical axes."""
    found = set() if axes <= SMALL_AXES else {"fsdp"}
    found |= {"tensor"} if axes & {"heads", "kv_heads", "mlp", "vocab"} else set()
    found |= {"expert"} if "experts" in axes else set()
    return found | ({"stage"} if "layers" in axes else set())


@pytest.mark.parametrize("mesh", ["fsdp", "hsdp_tp", "expert_fsdp", "pipeline_fsdp", "tensor"])
@pytest.mark.parametrize("name", [*(f"families/{family}" for family in FAMILIES), "published/deepseek_v3"])
def test_no_parameter_and_no_moment_is_replicated_by_accident(name, mesh):
    overlay, bindings = MESHES[mesh]
    bindings = [*bindings, *(EVEN.get(name, ()) if mesh == "pipeline_fsdp" else ())]
    bindings += ["vocab = 3072"] if name == "families/moma" else []
    experiment = config.load(name, overlays=[overlay], bindings=bindings)
    program = Program.of(experiment, experiment.mesh.open())
    by_path, sizes = flat_axes(program.model.axes), program.layout.mesh.shape
    least = held = 0
    for names, leaf in flat(program.state):
        axes = next((by_path[names[i:]] for i in range(len(names)) if names[i:] in by_path), None)
        on = set(jax.tree.leaves(tuple(leaf.sharding.spec)))
        must = set() if axes is None else wanted({*axes}) & {*sizes}
        whole = ", ".join(sorted(must - on))
        assert not whole, f"{'/'.join(names)} {leaf.shape} {axes} lies whole on each device of {whole}"
        # buffers are replicated: a number an expert
        assert axes is not None or leaf.size <= 1 or names[0] == "buffers", f"{'/'.join(names)} mirrors no parameter"
        least += leaf.size / math.prod(sizes[axis] for axis in must)
        held += math.prod(leaf.sharding.shard_shape(leaf.shape))
    assert held <= least
