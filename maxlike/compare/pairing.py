"""Pairing: runs of one number must have seen the same tokens in the same order, or their difference says nothing."""

from collections.abc import Iterator, Mapping

from maxlike.compare.comparison import Comparison
from maxlike.compare.library import Loaded
from maxlike.errors import UserError

# In the order in which they are compared: rows of another length have other fingerprints, too.
KNOBS = ("batch_size", "sequence_length", "steps", "seed")


def check(comparison: Comparison, loaded: Mapping[str, Loaded]) -> None:
    """Raises UserError for the first field in which an arm cannot be paired with the others: of all arms the
    tokenizer, of matched ones also the tokens of a step, the steps, the seed and all that decides the batches."""
    first = comparison.baseline if comparison.baseline in comparison.matched else next(iter(comparison.matched), None)
    for arm in comparison.experiments:
        tokenizers = [loaded[name].experiment.data.tokenizer.fingerprint for name in (arm, comparison.baseline)]
        if tokenizers[0] != tokenizers[1]:
            raise UserError(f"{_arms(arm, comparison.baseline)}: their tokenizers differ; bind the same in both")
    for arm in comparison.matched:
        for difference in _differences(loaded[arm], loaded[first]):
            way_out = (
                f"give both the same, or name {arm} in Comparison.unmatched"
                if arm in comparison.after
                else "give both the same"
            )
            raise UserError(f"{_arms(arm, first)}: {difference}; {way_out}")


def _arms(arm: str, other: str) -> str:
    return f"the arms {arm} and {other} cannot be paired"


def _differences(one: Loaded, other: Loaded) -> Iterator[str]:
    knobs = [{name: value for name, value in vars(x.experiment).items() if name in KNOBS} for x in (one, other)]
    for name in KNOBS:
        if knobs[0][name] != knobs[1][name]:
            yield f"Experiment.{name} is {knobs[0][name]} and {knobs[1][name]}"
    for name in sorted(one.identity.keys() | other.identity.keys()):
        if one.identity.get(name) != other.identity.get(name):
            yield f"their data differ in {_described(name)}"
    if _held_out(one) != _held_out(other):
        yield "their held-out data (Experiment.data, validation) differ"


def _held_out(loaded: Loaded) -> str | None:
    experiment = loaded.experiment
    return None if experiment.data.validation is None else experiment.open_validation().fingerprint


def _described(name: str) -> str:
    """What a fingerprint of the batches is of, for a person."""
    if name.startswith("source "):
        return f"the {name}: its documents, or how Data.packing packs them"
    return f"the {name}"
