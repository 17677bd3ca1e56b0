"""Published networks have exactly the published number of parameters. Building one takes no memory."""

import jax
import pytest

from maxlike import catalog, config

# Name -> parameters: model cards and papers; a bias or a norm too many shows here.
COUNTS = {
    "glm4_9b": 9_399_951_360,
    "llama3_70b": 70_553_706_496,
    "llama3_405b": 405_853_388_800,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_3b": 3_085_938_688,
    "qwen2_5_7b": 7_615_616_512,
    "qwen2_5_14b": 14_770_033_664,
    "qwen2_5_32b": 32_763_876_352,
    "qwen2_5_72b": 72_706_203_648,
    "starcoder2_3b": 3_030_371_328,
    "starcoder2_7b": 7_173_923_840,
    "starcoder2_15b": 15_957_889_024,
    "yi_6b": 6_061_035_520,
    "yi_9b": 8_829_407_232,
    "yi_34b": 34_388_917_248,
}


def test_every_published_file_is_in_the_table():
    files = {name.removeprefix("published/") for name in catalog.names("experiment") if name.startswith("published/")}
    assert files == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name):
    experiment = config.load(f"published/{name}")
    count = sum(leaf.size for leaf in jax.tree.leaves(experiment.abstract_model().params))
    assert count == COUNTS[name]
    assert f"{count:,} parameters" in catalog.doc(catalog.find("experiment", f"published/{name}"))
