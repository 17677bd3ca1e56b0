"""A key that config.json leaves out means what it means in `transformers`."""

import json

import pytest

from maxlike.convert import families
from maxlike.convert.config_json import ConfigJson
from maxlike.convert.structure import Cannot, _same

transformers = pytest.importorskip("transformers")
# What the library's own default configuration lacks to be a network.
COMPLETED = {"deepseek_v2": {"num_experts_per_tok": 6, "first_k_dense_replace": 1}}


def factory(family, values):
    config = ConfigJson(family.defaults | values, "config.json")
    network = family.network(config)
    config.finish()
    return network


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.model_type)
def test_what_is_left_out(family):
    """Each key of the library's default configuration, written out in full, is left out in turn: the same network, or
    a refusal."""
    config = transformers.CONFIG_MAPPING[family.model_type](**COMPLETED.get(family.model_type, {}))
    values = json.loads(config.to_json_string(use_diff=False))
    whole, kept = factory(family, values), []
    for key in sorted(set(values) - {"architectures", "model_type"} - set(COMPLETED.get(family.model_type, {}))):
        try:
            rest = factory(family, {name: value for name, value in values.items() if name != key})
        except Cannot:
            continue
        kept.append(key)
        # A head_dim that follows from the width is written either way, and shapes would tell.
        assert key == "head_dim" or _same(rest, whole), f"{key} = {values[key]}"
    assert kept, "every key was required"
