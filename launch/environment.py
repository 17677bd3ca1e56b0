"""What must be in the environment before jax is imported: the compile cache, XLA's flags, malloc's pages.

Flags that a user has set stay as they are. XLA aborts the process on a flag it does not know, so each of ours is tried
once in a process of its own, and the answer is kept beside the compile cache under the version of jaxlib.
"""

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

# One table for all hardware: platform -> flags that were measured to help, or that a peer's guide recommends there.
XLA_FLAGS: dict[str, tuple[str, ...]] = {
    # Matrix multiplications through XLA's packed CPU library.
    "cpu": ("--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT",),
    # Overlap of collectives with compute.
    "gpu": ("--xla_gpu_enable_latency_hiding_scheduler=true",),
    "tpu": (),
}


def cache_folder() -> pathlib.Path:
    """Where compiled programs and prepared data are kept between runs: $MAXLIKE_CACHE, or ~/.cache/maxlike."""
    return pathlib.Path(os.environ.get("MAXLIKE_CACHE") or pathlib.Path.home() / ".cache" / "maxlike")


def platform() -> str:
    """The platform jax will take: JAX_PLATFORMS where it is set, else what this machine shows."""
    named = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    if named:
        return {"cuda": "gpu", "rocm": "gpu"}.get(named, named)
    if pathlib.Path("/dev/nvidiactl").exists() or pathlib.Path("/dev/kfd").exists():
        return "gpu"
    if importlib.util.find_spec("libtpu") and any(pathlib.Path(p).exists() for p in ("/dev/accel0", "/dev/vfio/0")):
        return "tpu"
    return "cpu"


def prepare() -> None:
    """Sets malloc, XLA_FLAGS and the persistent compile cache, leaving alone whatever the user has set."""
    use_huge_pages()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    present = os.environ.get("XLA_FLAGS", "")
    wanted = [flag for flag in XLA_FLAGS.get(platform(), ()) if flag.split("=")[0] not in present]
    if wanted:
        accepted = _accepted(wanted)
        os.environ["XLA_FLAGS"] = " ".join([present, *accepted]).strip()


def use_huge_pages() -> None:
    """On a CPU, starts this process again with glibc's malloc on huge pages, once.

    Every step allocates its temporaries anew, and touching them in pages of 4 KiB takes the kernel a fifth of the step:
    0.74 s a step of `quickstart` fell to 0.55 s on two cores. malloc reads the setting before Python runs, hence the
    restart; a GLIBC_TUNABLES of the user's is left alone.
    """
    if platform() != "cpu" or not sys.platform.startswith("linux") or "GLIBC_TUNABLES" in os.environ:
        return
    name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    if name == "glibc" and tuple(int(part) for part in version.split(".")[:2]) >= (2, 35):
        os.execve(sys.executable, sys.orig_argv, os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})


def _accepted(flags: list[str]) -> list[str]:
    version = importlib.metadata.version("jaxlib")
    record = cache_folder() / "xla_flags.json"
    known = json.loads(record.read_text()) if record.is_file() else {}
    answers = known.setdefault(version, {})
    for flag in flags:
        if flag not in answers:
            answers[flag] = _probe(flag)
            if not answers[flag]:
                print(f"XLA of jaxlib {version} does not know {flag}: running without it", file=sys.stderr)
            record.parent.mkdir(parents=True, exist_ok=True)
            temporary = record.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(known, indent=1))
            temporary.replace(record)
    return [flag for flag in flags if answers[flag]]


def _probe(flag: str) -> bool:
    # XLA parses its flags when the first backend is made; a CPU client is enough, and takes a second.
    code = "import jax; jax.devices()"
    environment = os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True).returncode == 0
