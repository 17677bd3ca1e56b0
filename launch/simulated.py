"""Jobs that run on simulated devices, whatever hardware this machine has."""

import os

# Unoptimised code: such jobs compile dozens of small programs and run each for a moment.
JOBS = {"check": ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0")}


def prepare(job: str) -> None:
    """Before jax is imported, and before `environment.prepare` asks for the platform: several CPU devices for the jobs
    of JOBS. What the user has set stays as it is."""
    if job not in JOBS:
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    present = os.environ.get("XLA_FLAGS", "")
    ours = [flag for flag in JOBS[job] if flag.split("=")[0] not in present]
    os.environ["XLA_FLAGS"] = " ".join([present, *ours]).strip()
