"""Jobs that run on simulated devices, or on none, whatever hardware this machine has."""

import importlib.util
import os

# Unoptimised code: such jobs compile dozens of small programs and run each for a moment.
JOBS = {"check": ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0")}


# libtpu compiles for a TPU that is not there if nobody asks the cloud which one this machine has. What it compiles must
# not come from the cache of compiled programs, which would have to load it onto a device.
WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # any: it asks for one, and compiles for what the topology says
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two plans at a time: neither has a TPU to lock
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}


def prepare(job: str, flags: list[str]) -> None:
    """Before jax is imported, and before `environment.prepare` asks for the platform: several CPU devices for the jobs
    of JOBS, and for `plan` whatever its --topology needs. What the user has set stays as it is.

    flags: the job's own flags of the command line.
    """
    wanted: tuple[str, ...] = JOBS.get(job, ())
    if job == "plan":
        topology = _value(flags, "--topology")
        if topology == "local":
            return
        if topology is not None and topology.startswith("cpu:") and topology[4:].isdigit():
            wanted = (f"--xla_force_host_platform_device_count={topology[4:]}", "--xla_backend_optimization_level=0")
        else:
            for name, value in WITHOUT_TPU.items():
                os.environ.setdefault(name, value)
    elif not wanted:
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    present = os.environ.get("XLA_FLAGS", "")
    ours = [flag for flag in wanted if flag.split("=")[0] not in present]
    os.environ["XLA_FLAGS"] = " ".join([present, *ours]).strip()


def compiles_for(job: str, flags: list[str]) -> str | None:
    """The platform whose compiler a job will ask for, where that is not this machine's: of `plan --topology v5e:4x4`
    the TPU's, so that the plan is of the program that a run will compile, with its flags. None without libtpu: the job
    says what is missing."""
    topology = _value(flags, "--topology") if job == "plan" else None
    if topology is None or topology.partition(":")[0] in ("cpu", "local"):
        return None
    return "tpu" if importlib.util.find_spec("libtpu") else None


def _value(flags: list[str], name: str) -> str | None:
    """Of `--name value` or `--name=value`."""
    for word, after in zip(flags, [*flags[1:], None]):
        if word == name:
            return after
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None
