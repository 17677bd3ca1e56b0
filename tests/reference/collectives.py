"""What a dense transformer sends in one training step, written down by hand from its sizes and its mesh."""

import collections
import dataclasses


@dataclasses.dataclass(frozen=True)
class Transformer:
    """layers L of width D with H query and G key heads of K channels, feed-forwards of width F, a tied vocabulary V;
    B rows of T tokens, in M micro-batches where stages share out the layers, by the schedule 1F1B if one_f_one_b;
    itemsize: bytes of a parameter and of an activation. No recomputation but that of a pipeline.

    With experts E > 0 a dense layer stands before the L layers, and theirs are mixtures of E experts of width W of
    which a token visits J.
    """

    L: int
    D: int
    H: int
    G: int
    K: int
    F: int
    V: int
    B: int
    T: int
    M: int = 1
    one_f_one_b: bool = False
    E: int = 0
    W: int = 0
    J: int = 0
    itemsize: int = 4


def sent(net: Transformer, mesh: dict[str, int]) -> dict[tuple[str, tuple[str, ...]], float]:
    """(kind, axes) -> bytes a device sends in a step, as the CPU backend writes it: where others reduce-scatter it
    all-reduces the whole (twice the bytes), and it sums each product's gradient of the stream by itself where they sum
    first: 5 a block (queries, keys, values; gate and up) where they send 2."""
    d, f, t, c, e, s = (mesh.get(axis, 1) for axis in ("data", "fsdp", "tensor", "context", "expert", "stage"))
    tokens = net.B // (d * f * e * s) * net.T // c  # of a device
    stream = tokens * net.D * net.itemsize
    attention = net.D * ((net.H + 2 * net.G) * net.K + net.H * net.K) * net.itemsize / t
    dense = attention + 3 * net.D * net.F * net.itemsize / t
    block = attention + net.D * net.E * net.itemsize if net.E else dense
    table = net.V * net.D / t
    ticks = net.M + s - 1 if s > 1 else 1
    layers = net.L // s * ticks  # that a device runs in a step
    bytes_ = collections.Counter()

    def add(kind, axes, array, times=1.0):
        """array: the whole of what is gathered, reduced or exchanged over these axes."""
        axes = tuple(axis for axis in mesh if axis in axes and mesh[axis] > 1)
        n = 1
        for axis in axes:
            n *= mesh[axis]
        if n > 1:
            bytes_[kind, axes] += times * array * (n - 1) / n * (2 if kind == "all-reduce" else 1)

    # Fsdp: each block's matrices forward and backward (a pipeline computes its forward pass twice), their gradients;
    # replicas and shares of a row sum what is left.
    add("all-gather", ("fsdp",), block, (2 if s == 1 else 3) * layers)
    add("all-reduce", ("fsdp",), block, layers)
    add("all-reduce", ("data", "expert", "context"), block / f, layers)

    if net.E:
        # The dense layer, once; experts come together along the model width once, and their gradients are cut again.
        add("all-gather", ("fsdp",), dense)
        add("all-reduce", ("fsdp",), dense)
        add("all-reduce", ("data", "expert"), dense / f)
        experts = 3 * net.D * net.W * net.E / e * net.itemsize
        add("all-gather", ("fsdp",), experts, net.L)
        add("reduce-scatter", ("fsdp",), experts, net.L)
        add("all-reduce", ("data",), experts / f, net.L)
        # Rows to their experts and back, backward the same. Between two devices there is room for the worst case.
        add("all-to-all", ("expert",), e * min(net.J, net.E // e) * stream, 4 * net.L)

    # The embedding: ids to the devices with other columns, a sum over rows of the table, an exchange; the way back. In
    # 1F1B at every tick, for the micro-batch of that tick.
    embedded = stream * s / net.M * ticks if net.one_f_one_b else stream
    add("all-gather", ("fsdp",), 4 * tokens * f)
    add("reduce-scatter", ("tensor",), stream)
    add("all-gather", ("tensor",), stream)
    add("all-to-all", ("fsdp",), embedded / t, 2)
    add("all-reduce", ("stage", "data", "expert", "context"), table * net.itemsize / f)

    # The head: gathered once, its float32 gradient summed once; of the logits three numbers a token. In 1F1B the table
    # is gathered for the embedding too, and the head's gradient summed for each micro-batch.
    add("all-gather", ("fsdp",), table * net.itemsize, 2 if net.one_f_one_b else 1)
    if net.one_f_one_b:
        add("all-reduce", ("data", "fsdp"), table * 4, net.M)
    else:
        add("all-reduce", ("stage", "data", "fsdp", "expert", "context"), table * 4)
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

    # Stages: at every tick the stream of a micro-batch, which all of them have a share of, to the next, backward its
    # gradient; 1F1B needs not the last. The circular pipeline brings rows to the first stage and back to the others.
    if s > 1 and net.one_f_one_b:
        bytes_["collective-permute", ("stage",)] = (2 * ticks - 1) * stream * s / net.M
    elif s > 1:
        bytes_["collective-permute", ("stage",)] = 2 * ticks * stream * s / net.M + 2 * 2 * (s - 1) * stream
    return bytes_
