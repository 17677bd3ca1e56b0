"""Library: the experiments that runs are made of, each loaded once however many runs it has."""

import dataclasses
import functools
from collections.abc import Sequence

from maxlike import config
from maxlike.catalog import nearest
from maxlike.errors import UserError
from maxlike.experiment import Experiment


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
    """An experiment, and what is looked up in it more than once."""

    experiment: Experiment

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """Named fingerprints of all that decides the batches of the run but its number; builds the data where they
        are not there yet."""
        experiment = self.experiment
        batches = experiment.data.train(
            sequence_length=experiment.sequence_length,
            batch_size=experiment.batch_size,
            seed=experiment.seed,
            steps=experiment.steps,
        )
        return batches.identity(experiment.steps)

    @functools.cached_property
    def flops(self) -> float:
        """Training FLOPs of a run, by the network's own count."""
        experiment = self.experiment
        a_token = experiment.bare().flops_per_token(experiment.sequence_length)
        return a_token * experiment.clock.tokens_per_step * experiment.steps


class Library:
    """Loads what is asked for and keeps it.

    Overlays and bindings may be meant for other experiments of the same comparison: what one has no use for is left
    out, and refused by `refuse_useless` where none has.
    """

    def __init__(self):
        self._kept: dict[tuple, Loaded] = {}

    def load(self, experiment: str, overlays: Sequence[str] = (), bindings: Sequence[str] = ()) -> Loaded:
        """Raises UserError as config.load does."""
        key = (experiment, tuple(overlays), tuple(bindings))
        if key not in self._kept:
            self._kept[key] = Loaded(config.load(experiment, overlays=overlays, bindings=bindings, unused="keep"))
        return self._kept[key]

    def refuse_useless(self) -> None:
        """Raises UserError for an overlay's or a --set binding that no experiment loaded so far has a use for."""
        unused = [loaded.experiment.config.unused for loaded in self._kept.values()]
        for where, sentence in unused[0].items() if unused else ():
            if all(where in other for other in unused):
                raise UserError(sentence)


def parse_shard(shard: str) -> tuple[int, int]:
    """(i, n) of 'i/n'. Raises UserError for anything else, and for i outside of 1 .. n."""
    index, slash, count = shard.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise UserError(f"--shard {shard!r}: write i/n, the i-th of n shares, such as 1/4")
    return int(index), int(count)


def refuse_strangers(flag: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Raises UserError for a name that is not known, with the nearest that are."""
    for name in names:
        if name not in known:
            raise UserError(f"{flag} {name}: no such arm{nearest(name, known)}; the arms are {', '.join(known)}")
