"""Published networks have exactly the published number of parameters. Building one takes no memory."""

import pathlib

import jax
import pytest

from maxlike import catalog, config

# Name -> parameters: model cards and papers; a bias or a norm too many shows here. Selection biases of routers are
# buffers here and not counted (DeepSeek-V3's 58 x 256 and LongCat's 28 x 768 are in the totals of their model cards).
COUNTS = {
    "deepseek_v3": 671_026_419_200 - 58 * 256,
    "ettin_17m": 16_913_600,
    "ettin_32m": 32_081_344,
    "ettin_68m": 68_457_664,
    "ettin_150m": 149_655_232,
    "ettin_400m": 395_881_664,
    "ettin_1b": 1_031_314_112,
    "gpt_1t": 1_008_038_758_400,
    "glm4_9b": 9_399_951_360,
    "moma_1_4b": 7_113_836_544,
    "llama3_70b": 70_553_706_496,
    "llama3_405b": 405_853_388_800,
    "longcat_flash": 560_664_980_480 - 28 * 768,
    "mamba2_2_7b": 2_702_599_680,
    "mixtral_8x7b": 46_702_792_704,
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
    "transnormer_7b": 6_836_719_616,
    "yi_6b": 6_061_035_520,
    "yi_9b": 8_829_407_232,
    "yi_34b": 34_388_917_248,
    "zebra_llama_1b": 1_285_700_736,
    "zebra_llama_3b": 3_389_592_112,
    "zebra_llama_8b": 8_379_095_296,
}


ELSEWHERE = {"llama_8b": 8_030_261_248}  # Llama 3 8B is an experiment to train, beside the others


def test_every_published_file_is_in_the_table():
    files = {name.removeprefix("published/") for name in catalog.names("experiment") if name.startswith("published/")}
    assert files == set(COUNTS)
    assert f"{len(files)} more under published/" in (pathlib.Path(__file__).parents[1] / "README.md").read_text()


def parameters(name: str) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(config.load(name).abstract_model().params))


@pytest.mark.parametrize("name", ELSEWHERE)
def test_parameters_of_experiments_to_train(name):
    assert parameters(name) == ELSEWHERE[name]


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name):
    assert parameters(f"published/{name}") == COUNTS[name]
    assert f"{COUNTS[name]:,} parameters" in catalog.doc(catalog.find("experiment", f"published/{name}"))
