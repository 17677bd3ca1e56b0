"""The order in which devices hold the tokens of a row where a mesh cuts its length (context parallel).

In order, device i holds the i-th part, and under causality the last one meets C times the keys of the first. Head-tail
cuts a row into 2 C pieces and gives device i the pieces i and 2 C - 1 - i, so that all meet the same number. Tokens are
put there once, on the host, on the way to the devices, with their targets, positions, segments and weights; nothing is
put back, for a loss does not ask where a token lies. The batch's field `order` says where in the row each one was.
"""

import functools
import math
from typing import Any

import numpy as np

from layers import kernels
from layers.attention import Attention
from layers.context import AnyOrder, InOrder
from layers.encoder_decoder import EncoderDecoder
from layers.language_model import LanguageModel
from layers.mla import MLA
from layers.parts import every_part
from maxlike.errors import UserError
from maxlike.sharding import Layout

MIXERS = ("mixer", "second_mixer")  # what blocks call them


@functools.lru_cache(maxsize=8)
def head_tail(length: int, parts: int) -> np.ndarray:
    """Place in the row, int32 [length], of the tokens of device 0, then of device 1, ..."""
    pieces = np.arange(length, dtype=np.int32).reshape(2 * parts, -1)
    return np.concatenate([pieces[i] for device in range(parts) for i in (device, 2 * parts - 1 - device)])


class RowOrder:
    """What of a batch goes where on a layout, for one network.

    network: its structure. Reads Layout.balance: None takes head-tail order wherever it can be and is of use.
    Raises UserError for a network without rows of tokens on a mesh that cuts them, and a balance that cannot be.
    """

    def __init__(self, network: Any, layout: Layout):
        cut = layout.mesh_axes("length")
        self.parts, self.balance = math.prod(layout.mesh.shape[axis] for axis in cut), layout.balance
        if not cut:
            self.obstacle = "no mesh axis cuts the length"
        elif not isinstance(network, LanguageModel | EncoderDecoder):
            raise UserError(
                f"Mesh.shape[{cut[0]!r}]={self.parts} cuts rows of tokens, and {type(network).__name__} has none: use "
                "another axis"
            )
        else:
            self.obstacle = _obstacle(network)
        if self.balance and self.obstacle is not None:
            raise UserError(f"Mesh.balance = True cannot be: {self.obstacle}; leave it None")

    def places(self, length: int) -> np.ndarray | None:
        """Place in the row of the tokens as devices hold them, int32 [length]; None for in order. Tells the kernel
        report which it is and why."""
        if self.parts == 1:
            return None
        obstacle = self.obstacle
        if obstacle is None and length % (2 * self.parts):
            obstacle = f"rows of {length} tokens do not divide into {2 * self.parts} pieces"
            if self.balance:
                raise UserError(f"Mesh.balance = True cannot be: {obstacle}; change Experiment.sequence_length")
        if self.balance is False:
            obstacle = "Mesh.balance = False"
        if obstacle is not None:
            kernels.take("row_order", "in_order", obstacle)
            return None
        kernels.take("row_order", "head_tail", "every device meets the same number of keys under causality")
        return head_tail(length, self.parts)

    def of_batch(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch as devices hold it, with its field `order` where that is not the rows' own."""
        length = batch["inputs"].shape[1] if self.parts > 1 else 0
        places = self.places(length)
        if places is None:
            return batch
        order = np.broadcast_to(places, (batch["inputs"].shape[0], length))
        return {name: x[:, places] if x.ndim > 1 else x for name, x in batch.items()} | {"order": order}

    def shapes(self, batch: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """(shape, dtype) of the fields that `of_batch` would give."""
        shapes = {name: (tuple(x.shape), x.dtype) for name, x in batch.items()}
        if self.parts > 1 and self.places(batch["inputs"].shape[1]) is not None:
            shapes["order"] = (tuple(batch["inputs"].shape), np.dtype(np.int32))
        return shapes


def _obstacle(network: Any) -> str | None:
    """Why the tokens of this network's rows stay in order; None where they need not."""
    if not isinstance(network, LanguageModel):
        return f"{type(network).__name__} needs rows in order"
    parts = every_part(network)
    mixers = [vars(part)[name] for part in parts for name in MIXERS if name in vars(part)]
    needy = [part for part in parts if isinstance(part, InOrder)]
    needy += [mixer for mixer in mixers if not isinstance(mixer, AnyOrder)]
    if needy:
        return f"{type(needy[0]).__name__} needs rows in order"
    far = [p for p in parts if isinstance(p, MLA) or (isinstance(p, Attention) and p.causal and p.window is None)]
    return None if far else "no attention is causal over whole rows, so parts of a row cost the same"
