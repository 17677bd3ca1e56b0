"""The check is green on what we ship."""

import pytest

from maxlike import config
from maxlike.check import check
from maxlike.errors import UserError

FAMILIES = ["transformer", "linear_attention", "mamba_hybrid", "moe", "moma", "moma_routers"]
OTHERS = ["quickstart", "llama_8b", "gpt2_124m", "image_tokenizer"]
PUBLISHED = ["ettin_17m", "glm4_9b", "mixtral_8x7b", "deepseek_v3", "longcat_flash", "zebra_llama_1b"]


@pytest.mark.meshes
@pytest.mark.parametrize(
    "name", [*(f"families/{name}" for name in FAMILIES), *OTHERS, *(f"published/{name}" for name in PUBLISHED)]
)
def test_every_row_holds(name, tmp_path):
    rows = check.run(config.load(name), tmp_path)
    assert [f"{row.name}: {row.note}" for row in rows if row.failed] == []
    assert sum(row.verdict == "equal" for row in rows) > 5
    assert {row.name.split("/")[0] for row in rows} == {*check.ROWS}


def test_a_row_that_is_not_there_is_no_success(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "run", lambda experiment, folder, wanted, done: [])
    with pytest.raises(UserError, match="mesh/nonsense"):
        check.check(None, tmp_path, rows="mesh/nonsense")


def test_a_kernel_that_refuses_the_twins_rows_is_left_out_with_its_sentence(tmp_path):
    (row,) = check.run(config.load("families/transformer"), tmp_path, ("kernels/attention=splash",))
    assert row.verdict == "left out" and "a multiple of 128 tokens, not 32" in row.note
