"""What must be in the environment before jax is imported: the compile cache, XLA's flags, malloc's pages.

Flags that a user has set stay as they are; ours are in `launch.xla_flags`.
"""

import importlib.util
import os
import pathlib
import sys

from launch import xla_flags


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


def skip_absent_tpu() -> None:
    """Where libtpu is installed and there is no TPU, says so to jax, which would ask libtpu and print its complaints.

    Only where nothing at all speaks for a TPU (a container may see any one of its host's device files), and where
    libtpu is jax's one choice beside the CPU: another plugin may know devices that `platform` does not.
    """
    files = [*pathlib.Path("/dev").glob("accel*"), *pathlib.Path("/dev").glob("vfio/[0-9]*")]
    installed, others = (importlib.util.find_spec(name) is not None for name in ("libtpu", "jax_plugins"))
    if platform() == "cpu" and installed and not others and not files:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def prepare(groups: list[str], target: str | None = None) -> None:
    """Sets malloc, XLA's flags and the persistent compile cache, leaving alone whatever the user has set.

    groups: groups of XLA flags beside the default ones, see `xla_flags.TABLE`. target: the platform that programs are
    compiled for, None for this machine's.
    """
    hardware = platform() if target is None else target
    skip_absent_tpu()
    flags = xla_flags.chosen(hardware, groups)
    use_huge_pages()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    if flags:
        variable = xla_flags.variable(hardware)
        present = os.environ.get(variable, "")
        theirs = {word.partition("=")[0] for word in present.split()}
        ours = [flag for flag in flags if flag.name not in theirs]
        known = xla_flags.accepted(hardware, ours, cache_folder() / "xla_flags.json")
        os.environ[variable] = " ".join([present, *(flag.text for flag in known)]).strip()


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
