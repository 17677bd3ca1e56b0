"""What the backward pass may read from memory instead of computing it anew, by name."""

import jax
from jax.ad_checkpoint import checkpoint_name

from layers import axes

# Which experts (tokens) were chosen: a few integers a token. Computed anew, rounding might choose others.
CHOICE = "router_topk"
# The results of large matrix products, and attention's: with these the backward pass multiplies nothing twice.
LARGE = ("qkv", "attn_out", "mlp_up", "branch")
HOST = "pinned_host"
_NAMES = jax.checkpoint_policies.save_only_these_names
_BOTH = jax.checkpoint_policies.save_from_both_policies

POLICIES = {
    "full": _NAMES(CHOICE),
    "branches": _NAMES(CHOICE, "branch"),
    "matmul_half": _NAMES(CHOICE, "attn_out", "mlp_up"),
    "dots": _BOTH(_NAMES(CHOICE), jax.checkpoint_policies.dots_saveable),
    "dots_no_batch": _BOTH(_NAMES(CHOICE), jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[CHOICE],
        names_which_can_be_offloaded=[*LARGE],
        offload_src="device",
        offload_dst=HOST,
    ),
}


def chosen(index: jax.Array) -> jax.Array:
    """The indices that a router chose, which every policy keeps."""
    return checkpoint_name(index, CHOICE)


def policy(name: str):
    """The jax.checkpoint policy of that name. Raises ValueError where offloading finds no host memory."""
    if name == "offload":
        memories = host_memories(axes.device())
        if HOST not in memories:
            raise ValueError(
                f"Stack.remat='offload' needs {HOST!r} memory and {axes.device().device_kind!r} has {memories}: "
                "use 'matmul_half' or 'full'"
            )
    return POLICIES[name]


def host_memories(device: jax.Device) -> tuple[str, ...]:
    """The kinds of memory that a device reaches."""
    return tuple(memory.kind for memory in device.addressable_memories())
