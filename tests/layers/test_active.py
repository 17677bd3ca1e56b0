"""The parameters that one token uses."""

import jax
import pytest

from layers.active import active_parameters
from maxlike import config


def count(name: str) -> tuple[int, float]:
    experiment = config.load(name)
    return sum(leaf.size for leaf in jax.tree.leaves(experiment.abstract_model().params)), active_parameters(
        experiment.bare()
    )


def test_a_dense_network_uses_all_of_them():
    total, active = count("quickstart")
    assert active == total


@pytest.mark.parametrize(
    ("name", "idle", "published"),
    [
        ("mixtral_8x7b", 32 * 6 * 3 * 4096 * 14336, 12.9e9),
        # 37 B in the report, which leaves out the embedding's table.
        ("deepseek_v3", 58 * 248 * 3 * 7168 * 2048, 37.0e9 + 129280 * 7168),
        # 27 B in the report, without the embedding's table and the routers.
        ("longcat_flash", 28 * 504 * 3 * 6144 * 2048, 27.0e9 + 131072 * 6144 + 28 * 768 * 6144),
    ],
)
def test_published_active_parameters(name, idle, published):
    total, active = count(f"published/{name}")
    assert active == pytest.approx(total - idle, rel=1e-9)
    assert active == pytest.approx(published, rel=0.02)


def test_groups_of_experts_share_out_their_tokens():
    total, active = count("families/moma")
    # 6 layers, 8 experts of 3 x 128 x 320; of its own group's 4 a token meets one.
    assert total - active == pytest.approx(6 * 7 * 3 * 128 * 320)
