"""config.json with every key accounted for: used, known to be of no effect, or refused by name."""

import json
import pathlib
from typing import Any

from maxlike.convert.structure import Cannot
from maxlike.errors import UserError

REQUIRED = object()
# Keys that change nothing about the function of a network as we evaluate it: names, token ids, initial values, dropout
# and other regularisation, arithmetic details, and what a wrapper returns. `auto_map` names code, which is never run.
IRRELEVANT = frozenset(
    [
        "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "auto_map",
        "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id",
        "mask_token_id", "decoder_start_token_id", "tokenizer_class", "initializer_range", "initializer_factor",
        "attention_dropout", "hidden_dropout", "embedding_dropout", "residual_dropout", "use_cache",
        "output_attentions", "output_hidden_states", "return_dict", "torchscript", "id2label", "label2id",
        "problem_type", "finetuning_task", "pretraining_tp", "max_position_embeddings", "chunk_size_feed_forward",
        "task_specific_params", "prefix", "attn_implementation", "_attn_implementation",
        "_attn_implementation_autoset", "use_flash_attn", "max_length", "is_decoder",
        "router_aux_loss_coef", "router_jitter_noise", "output_router_logits", "aux_loss_alpha", "seq_aux", "ep_size",
    ]
)  # fmt: skip
MAX_BYTES = 16 << 20


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file. Raises UserError where it is missing, too large or not an object."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} has more than {MAX_BYTES} bytes, so it is no such file: name another directory")
        body = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name a directory that holds it") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): bring back a good copy") from error
    if not isinstance(body, dict):
        raise UserError(f"{path} holds no JSON object: bring back a good copy")
    return body


class ConfigJson:
    """The keys of a config.json as they are used up. `where` names it in messages."""

    def __init__(self, values: dict[str, Any], where: str):
        self._values, self._where = dict(values), where
        self._used: set[str] = set(IRRELEVANT)

    def take(self, key: str, default: Any = REQUIRED) -> Any:
        """The value of a key, or the default that the other library has for it."""
        self._used.add(key)
        value = self._values.get(key)
        if value is None and default is REQUIRED:
            raise Cannot(f"{self._where} has no {key}: bring back a good copy")
        if value is None:
            return default
        kinds = {bool: bool, int: int, float: (int, float), str: str}.get(type(default))
        if kinds is not None and (
            not isinstance(value, kinds) or (isinstance(value, bool) and type(default) is not bool)
        ):
            raise Cannot(f"{self._where}: {key} = {value!r} is not a {type(default).__name__}: bring back a good copy")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self.take(key, REQUIRED if default is None else default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise Cannot(f"{self._where}: {key} = {value!r} must be a whole number above 0: bring back a good copy")
        return value

    def choose(self, key: str, choices: dict[Any, Any], default: Any = REQUIRED) -> Any:
        """Our word for one of the values that we can express."""
        value = self.take(key, default)
        if not isinstance(value, str | bool | int | float) or value not in choices:
            known = ", ".join(repr(choice) for choice in choices)
            raise Cannot(f"{self._where}: {key} = {value!r} has no counterpart here, only {known}: it cannot be used")
        return choices[value]

    def expect(self, key: str, *values: Any) -> None:
        """The key is absent or has one of these values, with which it does nothing."""
        value = self.take(key, None)
        if value is not None and value not in values:
            raise Cannot(f"{self._where}: {key} = {value!r} has no counterpart here: it cannot be used")

    def within(self, key: str) -> "ConfigJson | None":
        """The object that a key holds, to be taken apart in its turn; None where it is absent or null."""
        value = self.take(key, None)
        if value is not None and not isinstance(value, dict):
            raise Cannot(f"{self._where}: {key} = {value!r} is not an object: bring back a good copy")
        return None if value is None else ConfigJson(value, f"{self._where}: {key}")

    def ignore(self, *keys: str) -> None:
        """These keys have no effect in this family."""
        self._used.update(keys)

    def finish(self) -> None:
        """Refuses the keys that nothing took. A network that does not ask is no encoder-decoder, and may say so."""
        if "is_encoder_decoder" not in self._used:
            self.expect("is_encoder_decoder", False)
        bookkeeping = ("_", "transformers")
        left = {
            key: value
            for key, value in self._values.items()
            if key not in self._used and value is not None and not key.startswith(bookkeeping)
        }
        if left:
            shown = ", ".join(f"{key} = {str(value)[:60]}" for key, value in list(left.items())[:8])
            raise Cannot(f"{self._where}: nothing here answers to {shown}: it cannot be used")
