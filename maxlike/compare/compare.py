"""`--job compare`: every arm of a comparison for each seed, and the verdict."""

import pathlib

from maxlike.compare.comparison import Comparison


def compare(
    comparison: Comparison,
    run_dir: pathlib.Path,
    *,
    seeds: int | None = None,
    shard: str = "1/1",
    arms: tuple[str, ...] = (),
) -> None:
    """Runs every arm for each seed, each once and resumable, and judges the claim by its rule.

    seeds: another number of them than the comparison asks for. shard: i/n runs this process's share only, in a
    directory that the others share. arms: only these, without a verdict; repeatable.
    """
    del comparison, run_dir, seeds, shard, arms
