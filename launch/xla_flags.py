"""XLA's flags, for all hardware in one table, each tried before it is used.

XLA aborts the process on a flag it does not know, so flags are tried in a process of their own, once for each version
of jaxlib and libtpu; the answers are kept beside the compile cache.
"""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

from maxlike import catalog
from maxlike.errors import UserError


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag with its value, and why it is there."""

    text: str
    why: str

    @property
    def name(self) -> str:
        return self.text.partition("=")[0]


# platform -> group -> flags. The group `default` is always on; `--xla GROUP` adds another one.
TABLE: dict[str, dict[str, tuple[Flag, ...]]] = {
    "cpu": {
        "default": (
            Flag(
                "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT",
                "matrix products through XLA's packed CPU library; chosen for the step of quickstart",
            ),
        ),
    },
    "gpu": {
        "default": (
            Flag(
                "--xla_gpu_enable_latency_hiding_scheduler=true",
                "starts collectives early and ends them late, so that they run beside compute (NVIDIA's images)",
            ),
        ),
        # FSDP over many GPUs. Not the default: the pipeliner has failed on loops of micro-batches (jax issue 22210).
        "overlap": (
            Flag("--xla_gpu_enable_pipelined_all_gather=true", "gathers the next layer's parameters in this layer"),
            Flag("--xla_gpu_enable_pipelined_reduce_scatter=true", "scatters a layer's gradients in the next layer"),
            Flag("--xla_gpu_enable_pipelined_all_reduce=true", "the same for replicated parameters"),
            Flag("--xla_gpu_enable_while_loop_double_buffering=true", "spares the copies pipelining adds to the loop"),
            Flag("--xla_gpu_all_gather_combine_threshold_bytes=134217728", "one gather a layer, not one a matrix"),
            Flag("--xla_gpu_reduce_scatter_combine_threshold_bytes=134217728", "one scatter a layer"),
            Flag("--xla_gpu_all_reduce_combine_threshold_bytes=134217728", "one reduction a layer"),
        ),
        # Tensor parallel (async TP in TorchTitan). Not the default: it takes apart the gathers of FSDP too.
        "collective_matmul": (
            Flag("--xla_gpu_threshold_for_windowed_einsum_mib=0", "a gather and its product become a ring of pieces"),
            Flag("--xla_gpu_multi_streamed_windowed_einsum=true", "the pieces' products run on streams of their own"),
        ),
    },
    "tpu": {  # collective matmul is libtpu's own default
        "default": (
            Flag("--xla_tpu_enable_async_collective_fusion=true", "collectives run beside the fusions around them"),
            Flag("--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true", "the gathers of FSDP among them"),
            Flag("--xla_tpu_overlap_compute_collective_tc=true", "compute and collectives share the tensor core"),
            Flag("--xla_enable_async_all_gather=true", "gathers in the background (MaxText's recipes set these)"),
        ),
        # Not the default: with it libtpu 0.0.42.1 fails on published/longcat_flash over 1,024 devices.
        "multiple_steps": (
            Flag(
                "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
                "over several fusions where one is short (MaxText's recipes)",
            ),
        ),
        # Data parallel between slices, over the data-centre network.
        "multislice": (
            Flag("--xla_tpu_enable_data_parallel_all_reduce_opt=true", "gradients of several layers in one reduction"),
            Flag("--xla_tpu_data_parallel_opt_different_sized_ops=true", "even where their sizes differ"),
        ),
        # v6e only: its vector memory is large enough.
        "large_vmem": (Flag("--xla_tpu_scoped_vmem_limit_kib=98304", "larger fusions (MaxText's recipes for v6e)"),),
    },
}

# What it takes for the compiler of a platform to read its flags.
_CPU = "import jax; jax.devices()"  # jaxlib knows the flags of all its backends
_TPU = "from jax.experimental import topologies as t; t.get_topology_desc('v5e:2x2', platform='tpu')"
_PROBES = {"cpu": ("XLA_FLAGS", _CPU), "gpu": ("XLA_FLAGS", _CPU), "tpu": ("LIBTPU_INIT_ARGS", _TPU)}


def variable(platform: str) -> str:
    """The environment variable in which the compiler of a platform looks for its flags."""
    return _PROBES[platform][0]


def chosen(platform: str, groups: list[str]) -> list[Flag]:
    """The default flags and those of the groups. Raises UserError for a group that this platform does not have."""
    table = TABLE.get(platform, {"default": ()})
    flags = list(table["default"])
    for group in groups:
        if group not in table:
            known = ", ".join(name for name in table if name != "default") or "none"
            raise UserError(
                f"--xla={group}{catalog.nearest(group, table)}: the groups of flags for {platform} are {known}"
            )
        flags += table[group]
    return list(dict.fromkeys(flags))


def accepted(platform: str, flags: list[Flag], record: pathlib.Path) -> list[Flag]:
    """Those flags that the installed compiler knows; names the others on stderr. record: where answers are kept."""
    library = "libtpu" if platform == "tpu" else "jaxlib"
    version = f"{library} {importlib.metadata.version(library)}"
    known = json.loads(record.read_text()) if record.is_file() else {}
    answers = known.setdefault(version, {})
    new = [flag for flag in flags if flag.text not in answers]
    if new:
        together = len(new) > 1 and _probe(platform, new)  # all are known, as a rule: one try will do
        for flag in new:
            answers[flag.text] = together or _probe(platform, [flag])
            if not answers[flag.text]:
                print(f"XLA of {version} does not know {flag.text}: running without it", file=sys.stderr)
        record.parent.mkdir(parents=True, exist_ok=True)
        temporary = record.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(known, indent=1))
        temporary.replace(record)
    return [flag for flag in flags if answers[flag.text]]


def _probe(platform: str, flags: list[Flag]) -> bool:
    name, code = _PROBES[platform]
    # The devices are left alone: a CPU client reads XLA_FLAGS, and libtpu compiles for a described topology.
    quiet = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment = os.environ | quiet | {name: " ".join(flag.text for flag in flags)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True).returncode == 0
