"""Cached decoding equals the forward pass, of the small twin of every family: the row of `--job check` on every run of
the tests. The other rows wait for `pytest -m meshes`."""

import pytest

from maxlike import config
from maxlike.check import check

FAMILIES = ("transformer", "moe", "moma_routers", "linear_attention", "mamba_hybrid")


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_prompts_and_single_tokens_equal_whole_rows(family, tmp_path):
    (row,) = check.run(config.load(f"families/{family}"), tmp_path, ("decode",))
    assert row.verdict == "equal", row.note
    assert row.result.tolerance == 1e-4
