"""What to do with a step whose loss or gradient is not finite, or spikes."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from maxlike.errors import UserError

_MEMORY = 0.98  # of the running mean and variance of the loss: about the last 50 steps
_SETTLE = 50  # steps before a spike can be told from the first descent


class Guard:
    """Watches the loss and the gradient norm of every step, inside the compiled step.

    on_bad: what happens at a bad step.
        skip: the update is dropped and counted; training stops after `patience` of them in a row.
        stop: training stops at once.
        rewind: training goes back to the last checkpoint and drops every update from there to the bad step: what led
            to a spike may lie some batches before it (PaLM, section 5.1, skips the batches around it).
    patience: bad steps in a row that are tolerated, >= 1.
    spike_sigmas: a finite loss this many standard deviations above its running mean is bad too; None: only what is not
        finite is bad. OLMo-core's SkipStep uses 6.

    Raises UserError for patience < 1 or spike_sigmas <= 0.
    """

    def __init__(
        self,
        *,
        on_bad: Literal["skip", "stop", "rewind"] = "skip",
        patience: int = 10,
        spike_sigmas: float | None = None,
    ):
        if patience < 1:
            raise UserError(f"Guard.patience={patience}: it must be at least 1")
        if spike_sigmas is not None and spike_sigmas <= 0:
            raise UserError(
                f"Guard.spike_sigmas={spike_sigmas}: give a positive number, or None to accept any finite loss"
            )
        self.on_bad = on_bad
        self.patience = patience
        self.spike_sigmas = spike_sigmas

    def init(self) -> dict[str, jax.Array]:
        """Counters and the running statistics of the loss, part of the train state."""
        zero, count = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
        return {"mean": zero, "variance": zero, "seen": count, "skipped": count, "bad_in_a_row": count}

    def judge(
        self, watch: dict[str, Any], loss: jax.Array, grad_norm: jax.Array, allow: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        """(whether the step is bad, the new statistics). Bad losses do not enter them; a step that is bad or not
        allowed counts as skipped."""
        bad = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
        if self.spike_sigmas is not None:
            limit = watch["mean"] + self.spike_sigmas * jnp.sqrt(watch["variance"])
            bad |= (watch["seen"] >= _SETTLE) & (loss > limit)
        # The first loss starts the mean; afterwards both moments forget exponentially.
        memory = jnp.where(watch["seen"] == 0, 0.0, _MEMORY)
        surprise = jnp.where(bad, 0.0, loss - watch["mean"])
        mean = watch["mean"] + (1 - memory) * surprise
        variance = memory * (watch["variance"] + (1 - memory) * surprise**2)
        new = {
            "mean": jnp.where(bad, watch["mean"], mean),
            "variance": jnp.where(bad, watch["variance"], variance),
            "seen": watch["seen"] + jnp.where(bad, 0, 1),
            "skipped": watch["skipped"] + (bad | ~allow),
            "bad_in_a_row": jnp.where(bad, watch["bad_in_a_row"] + 1, 0),
        }
        return bad, new
