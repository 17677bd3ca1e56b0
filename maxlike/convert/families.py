"""The families we know, and how a directory finds its own."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

from maxlike.catalog import nearest
from maxlike.convert.bert import Bert
from maxlike.convert.config_json import ConfigJson, read_json
from maxlike.convert.deepseek import DeepseekV2, DeepseekV3
from maxlike.convert.family import Family
from maxlike.convert.glm import Glm, Glm4
from maxlike.convert.gpt2 import Gpt2
from maxlike.convert.llama import Llama, Mistral
from maxlike.convert.longcat_flash import LongcatFlash
from maxlike.convert.mamba2 import Mamba2
from maxlike.convert.mixtral import Mixtral
from maxlike.convert.modernbert import ModernBert, ModernBertDecoder
from maxlike.convert.qwen import Qwen2, Qwen3
from maxlike.convert.qwen3_next import Qwen3Next
from maxlike.convert.qwen_moe import Qwen2Moe, Qwen3Moe
from maxlike.convert.starcoder2 import Starcoder2
from maxlike.convert.structure import Cannot
from maxlike.convert.t5 import T5
from maxlike.errors import UserError

# In this order an export tries them: the plainest class that expresses a network exactly is the one it is written as.
FAMILIES: tuple[Family, ...] = (
    Llama(), Mistral(), Qwen2(), Qwen3(), Starcoder2(), Glm(), Glm4(), Gpt2(), Bert(),
    Mixtral(), Qwen2Moe(), Qwen3Moe(), DeepseekV2(), DeepseekV3(), LongcatFlash(), Qwen3Next(),
    Mamba2(), ModernBert(), ModernBertDecoder(), T5(),
)  # fmt: skip


def named(model_type: str) -> Family:
    """The family of that model type ('llama')."""
    known = {family.model_type: family for family in FAMILIES}
    if model_type not in known:
        raise UserError(f"unknown family {model_type!r}{nearest(model_type, known)}; known are {', '.join(known)}")
    return known[model_type]


def of(values: dict[str, Any], where: str) -> Family:
    """The family of a parsed config.json, by its architecture, else by its model type."""
    architectures = values.get("architectures") or []
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    for family in FAMILIES:
        if name in family.architectures or (name is None and values.get("model_type") == family.model_type):
            return family
    known = {architecture for family in FAMILIES for architecture in family.architectures}
    what = name if name is not None else f"model_type = {values.get('model_type')!r}"
    raise Cannot(
        f"{where}: the architecture {what} is not one we can express{nearest(str(what), known)}; "
        f"known are {', '.join(sorted(known))}"
    )


def network(values: dict[str, Any], where: str, *, mtp: bool = False) -> tuple[Family, Callable[..., Any]]:
    """(family, factory of the network) of a parsed config.json; refuses what is left over.
    mtp: with the modules that predict further ahead, which decoding has no use for."""
    family = of(values, where)
    config = ConfigJson(family.defaults | values, where)
    factory = family.network(config)
    if mtp:
        factory = functools.partial(factory, mtp=family.ahead(config))
    config.finish()
    return family, _sentences(factory, where)


def read(directory: pathlib.Path, *, mtp: bool = False) -> tuple[Family, Callable[..., Any], dict[str, Any]]:
    """(family, factory of the network, config.json) of a directory; mtp: as for `network`."""
    if not directory.is_dir():
        raise UserError(f"there is no directory {directory}: name one that holds config.json and *.safetensors")
    path = directory / "config.json"
    values = read_json(path)
    return *network(values, str(path), mtp=mtp), values


def _sentences(factory: Callable[..., Any], where: str) -> Callable[..., Any]:
    """What a layer refuses is the file's fault here, and says so."""

    @functools.wraps(factory)
    def build(**arguments):
        try:
            return factory(**arguments)
        except ValueError as error:
            raise Cannot(f"{where} describes a network that cannot be built: {error}") from error

    return build
