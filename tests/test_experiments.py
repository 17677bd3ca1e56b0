"""Every experiment builds abstractly, matches its golden parameter table, and its tiny twin trains to golden losses.

`pytest tests/test_experiments.py --update-goldens` rewrites the goldens; read the difference before committing it.
"""

import pathlib

import jax
import numpy as np
import pytest

from layers import kernels
from layers.active import active_parameters
from maxlike import catalog, config
from maxlike.bench.timed import random_batch
from maxlike.compare.comparison import Comparison
from maxlike.errors import UserError
from maxlike.noun import Noun
from maxlike.program import Program
from maxlike.sharding import flat_axes, path_names

GOLDENS = pathlib.Path(__file__).parent / "goldens"
SCANNED = "stack.Stack.scan = True"
TINY = {
    "quickstart": ["dim = 16", "stack.Stack.depth = 2", "attention.Attention.heads = 2", "mlp.GatedMLP.width = 32"],
    "gpt2_124m": [
        "dim = 16",
        "stack.Stack.depth = 2",
        "attention.Attention.heads = 2",
        "mlp.MLP.width = 32",
        "schedules.Cosine.warmup = 1",
    ],
    "llama_1b": [
        "dim = 16",
        "stack.Stack.depth = 2",
        "attention.Attention.heads = 4",
        "attention.Attention.kv_heads = 2",
        "mlp.GatedMLP.width = 32",
        "schedules.Cosine.warmup = 1",
    ],
}
TINY["llama_8b"] = TINY["llama_1b"]
TINY["families/mamba_hybrid"] = [
    "dim = 16",
    "depth = 3",
    "width = 32",
    "mamba2.Mamba2.head_dim = 8",
    "mamba2.Mamba2.state = 8",
    "mla.MLA.kv_rank = 8",
    "mla.MLA.nope_dim = 4",
    "mla.MLA.rope_dim = 4",
    "mla.MLA.value_dim = 4",
]
TINY["families/transformer"] = ["dim = 16", "depth = 2", "heads = 2", "width = 32"]
TINY["families/moe"] = ["dim = 16", "depth = 2", "heads = 2", "width = 32", "expert_width = 16"]
TINY["families/linear_attention"] = ["dim = 16", "depth = 2", "layers = 3", "heads = 2", "width = 32"]
TINY["families/moma"] = ["vocab = 3050", "dim = 16", "depth = 2", "heads = 2", "width = 32"]
TINY["image_tokenizer"] = ["width = 16"]
OVERLAYS = {name: ["cpu"] for name in ("families/moma", "image_tokenizer")}  # data of their own
# One of each kind of published network trains; the others of its kind differ in numbers alone.
BLOCK = ["dim = 16", "depth = 2", "heads = 4", "kv_heads = 2", "width = 32", "schedules.Cosine.warmup = 1"]
TINY |= {f"published/{name}": BLOCK for name in ("qwen2_5_0_5b", "starcoder2_3b", "glm4_9b")}
TINY["published/ettin_17m"] = [
    "dim = 16",
    "depth = 3",
    "heads = 4",
    "width = 32",
    "near/attention.Attention.window = 5",
    "schedules.Cosine.warmup = 1",
    "schedules.Cosine.lr = 0.01",
    "masked_tokens.MaskedTokens.mask_id = 2047",
    "masked_tokens.MaskedTokens.special_ids = ()",
]
CONTINUED = {"families/moma_routers"}  # it begins with a finished run
# Comparisons and sweeps name their job; the arms of papers are built by the tests of each paper.
OWN_JOB = [name for name, path in catalog.names("experiment").items() if "\ninclude 'jobs/" in path.read_text()]
COMPARISONS = [name for name in OWN_JOB if name.startswith("papers/")]
PLAIN = [name for name in catalog.names("experiment") if name not in OWN_JOB and not name.startswith("papers/")]
TRAINED = [name for name in PLAIN if name in TINY or not (name.startswith("published/") or name in CONTINUED)]
QUICK = {"quickstart", "image_tokenizer", "families/transformer", "families/linear_attention"}
MESH = {"published/moma_1_4b": "mesh/fsdp"}  # experts of the published width, 5461, do not divide over two devices
SMALL = [
    "vocab = 2048",
    "steps = 5",
    "experiment.Experiment.batch_size = 8",
    "experiment.Experiment.sequence_length = 32",
    "step.Step.micro_batches = 1",
    SCANNED,
]
SMALL_PICTURES = ["steps = 5", "experiment.Experiment.batch_size = 8"]


def golden(name: str, text: str, update: bool) -> None:
    path = GOLDENS / name
    if update:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text, f"{path.name} differs: read the difference, then --update-goldens"


def parameter_table(experiment) -> str:
    """path | shape | axes | spec under mesh/fsdp_tp | optimizer group, a line a parameter."""
    model = experiment.abstract_model()
    layout = experiment.mesh.open()
    groups = experiment.optimizer.describe(model.axes)
    by_path = flat_axes(model.axes)
    lines = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(model.params)[0]:
        names = path_names(path)
        spec = layout.spec(by_path[names], leaf.shape, "/".join(names))
        placed = " ".join(str(entry) for entry in spec)
        group = groups["/".join(names)]
        lines.append(f"{'/'.join(names)} | {leaf.shape} {leaf.dtype} | {' '.join(by_path[names])} | {placed} | {group}")
    total = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    return "\n".join([*lines, f"{total:,} parameters"]) + "\n"


@pytest.mark.parametrize("name", PLAIN)
def test_parameter_table(name, request):
    experiment = config.load(name, overlays=[MESH.get(name, "mesh/fsdp_tp")])
    golden(f"{name}.params.txt", parameter_table(experiment), request.config.getoption("--update-goldens"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.large) for name in TRAINED]
)
def test_tiny_twin_trains_to_golden_losses(name, request):
    overlays = OVERLAYS.get(name, ["austen", "cpu"])
    small = SMALL_PICTURES if name == "image_tokenizer" else SMALL
    experiment = config.load(name, overlays=overlays, bindings=small + TINY[name])
    program = Program.of(experiment, experiment.mesh.open())
    batches = experiment.data.train(sequence_length=32, batch_size=8, seed=0)
    step, state, allow = program.lower_step(batches.batch(0)).compile(), program.init(), jax.device_put(np.bool_(True))
    losses = []
    for k in range(5):
        state, metrics = step(state, program.put(batches.batch(k)), allow)
        losses.append(float(metrics["loss"]))
    path = GOLDENS / f"{name}.losses.txt"
    path.parent.mkdir(exist_ok=True)
    if request.config.getoption("--update-goldens"):
        path.write_text("\n".join(f"{loss:.5f}" for loss in losses) + "\n")
    np.testing.assert_allclose(losses, [float(line) for line in path.read_text().split()], rtol=2e-4)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["gpt2_124m", "llama_1b", "llama_8b"])
@pytest.mark.parametrize("mesh", ["mesh/fsdp", "mesh/fsdp_tp"])
def test_the_large_ones_lower_at_full_size(name, mesh):
    experiment = config.load(name, overlays=["austen", mesh], bindings=[SCANNED])
    batch = random_batch(experiment, experiment.bare().vocab)
    text = Program.of(experiment, experiment.mesh.open()).lower_step(batch).as_text()
    assert "sharding" in text and f"tensor<{experiment.bare().padded_vocab}x{experiment.bare().dim}xf32>" in text


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("name", ["moe", "moma", "linear_attention", "mamba_hybrid"])
def test_the_families_lower_for_accelerators(name, platform):
    bindings = [*TINY[f"families/{name}"], SCANNED, "step.Step.compute_dtype = 'bfloat16'"]
    experiment = config.load(f"families/{name}", bindings=bindings)
    program = Program.of(experiment, experiment.mesh.open())
    batch = program.abstract_batch(random_batch(experiment, experiment.bare().vocab))

    def step(state, batch, allow):
        return experiment.step.update(
            state,
            batch,
            allow,
            model=program.model,
            objective=experiment.objective,
            optimizer=program.optimizer,
            progress=0.0,
        )

    with kernels.compile_for("gpu" if platform == "cuda" else "tpu"):
        traced = jax.jit(step).trace(program.state, batch, jax.ShapeDtypeStruct((), bool))
    assert "bf16" in traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("name", catalog.names("job"))
def test_every_job_file_names_a_function(name):
    def job_of(subject):
        try:
            return config.load(subject, job=name, kind=Noun).config.job
        except UserError:  # a job of another noun
            return None

    assert any(callable(job_of(subject)) for subject in ("quickstart", *OWN_JOB))


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_comparison_names_arms_and_scales_that_are_there(name):
    comparison = config.load(name, kind=Comparison)
    assert comparison.config.job.__name__ == "compare"
    assert comparison.rule
    for arm in comparison.arms:
        catalog.find("experiment", arm)
    for overlay in comparison.scales.values():
        catalog.find("overlay", overlay)


SIZES = [name for name in catalog.names("overlay") if name.startswith("families/")]
GENERAL = [name for name in catalog.names("overlay") if not name.startswith(("families/", "papers/"))]


@pytest.mark.parametrize("name", GENERAL)
def test_every_overlay_goes_on_the_quickstart(name):
    config.load("quickstart", overlays=[name])


@pytest.mark.parametrize("name", SIZES)
def test_every_size_of_a_family_fits_one_gpu_and_a_slice(name):
    family, size = name.rsplit("_", 1)
    experiment = config.load(family, overlays=[name, "h200"])
    target = {"300m": 3e8, "1b": 1e9}[size]
    assert 0.95 * target < active_parameters(experiment.bare()) < 1.15 * target
    state_bytes = 3 * 4 * sum(leaf.size for leaf in jax.tree.leaves(experiment.abstract_model().params))
    assert state_bytes < 100e9  # parameters, gradients and momentum in float32, of a card's 141 GB
    parameter_table(config.load(family, overlays=[name, "v5p"]))  # refuses what does not divide over eight


def test_the_families_spend_the_same_flops():
    flops = {
        name: config.load(name).bare().flops_per_token(256)
        for name in catalog.names("experiment")
        if name.startswith("families/")
    }
    for name, spent in flops.items():
        assert abs(spent / flops["families/transformer"] - 1) < 0.02, name


@pytest.mark.parametrize("kind", ["experiment", "overlay", "job"])
def test_every_file_says_what_it_is(kind):
    for name, path in catalog.names(kind).items():
        assert catalog.doc(path).endswith("."), f"{name}: its first line is a comment, one sentence"
