"""Joining the processes of a cluster. jax.distributed does the finding; this decides whether to ask it."""

import os

from launch import environment
from maxlike.errors import UserError


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Initialises jax.distributed where flags ask for it or the environment shows several processes."""
    explicit = (coordinator, processes, process)
    if any(value is not None for value in explicit):
        if any(value is None for value in explicit):
            raise UserError("--coordinator, --processes and --process go together: give all three, on every host")
        import jax

        jax.distributed.initialize(coordinator, processes, process)
    elif environment.platform() == "tpu" or _several():  # a TPU worker learns from its metadata whether it is alone
        import jax

        jax.distributed.initialize()


def _several() -> bool:
    """Whether a scheduler that jax.distributed knows has started more than one process."""
    counts = (os.environ.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
    return any(count.isdigit() and int(count) > 1 for count in counts)
