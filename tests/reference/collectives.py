"""What a dense transformer sends in one training step, written down by hand from its sizes and its mesh."""

import collections
import dataclasses


@dataclasses.dataclass(frozen=True)
class Transformer:
    """layers L of width D with H query and G key heads of K channels, feed-forwards of width F, a tied vocabulary V;
    B rows of T tokens; itemsize: bytes of a parameter and of an activation. No recomputation."""

    L: int
    D: int
    H: int
    G: int
    K: int
    F: int
    V: int
    B: int
    T: int
    itemsize: int = 4


def sent(net: Transformer, mesh: dict[str, int]) -> dict[tuple[str, tuple[str, ...]], float]:
    """(kind, axes) -> bytes a device sends in a step, as the CPU backend writes it: where others reduce-scatter it
    all-reduces the whole (twice the bytes), and it sums each product's gradient of the stream by itself where they sum
    first: 5 a block (queries, keys, values; gate and up) where they send 2."""
    d, f, t, c = (mesh.get(axis, 1) for axis in ("data", "fsdp", "tensor", "context"))
    tokens = net.B // (d * f) * net.T // c  # of a device
    stream = tokens * net.D * net.itemsize
    block = net.D * ((net.H + 2 * net.G) * net.K + net.H * net.K + 3 * net.F) * net.itemsize / t
    table = net.V * net.D / t
    bytes_ = collections.Counter()

    def add(kind, axes, array, times=1.0):
        """array: the whole of what is gathered, reduced or exchanged over these axes."""
        axes = tuple(axis for axis in mesh if axis in axes and mesh[axis] > 1)
        n = 1
        for axis in axes:
            n *= mesh[axis]
        if n > 1:
            bytes_[kind, axes] += times * array * (n - 1) / n * (2 if kind == "all-reduce" else 1)

    # Fsdp: each block's matrices forward and backward, their gradients; replicas and shares of a row sum what is left.
    add("all-gather", ("fsdp",), block, 2 * net.L)
    add("all-reduce", ("fsdp",), block, net.L)
    for axis in ("data", "context"):
        add("all-reduce", (axis,), block / f, net.L)

    # The embedding: ids to the devices with other columns, a sum over rows of the table, an exchange; the way back.
    add("all-gather", ("fsdp",), 4 * tokens * f)
    add("reduce-scatter", ("tensor",), stream)
    add("all-gather", ("tensor",), stream)
    add("all-to-all", ("fsdp",), stream / t, 2)
    add("all-reduce", ("data", "context"), table * net.itemsize / f)

    # The head: gathered once, its float32 gradient summed once; of the logits three numbers a token.
    add("all-gather", ("fsdp",), table * net.itemsize)
    add("all-reduce", ("data", "fsdp", "context"), table * 4)
    add("all-reduce", ("tensor",), tokens * 4, 3)

    # Tensor and sequence parallel: two gathers and two sums a block, forward and (five sums) backward; one of each for
    # the head.
    add("all-gather", ("tensor",), stream, 4 * net.L + 1)
    add("all-reduce", ("tensor",), stream, 7 * net.L + 1)

    # The ring: keys, values, and what says whether they are seen, go round but for the last step; backward once more,
    # with their gradients, which then go home.
    kv = 2 * tokens * net.G * net.K / t * net.itemsize
    marks = 2 * 4 * tokens
    if c > 1:
        bytes_["collective-permute", ("context",)] = net.L * ((c - 1) * 2 * (kv + marks) + c * kv)
    return bytes_
