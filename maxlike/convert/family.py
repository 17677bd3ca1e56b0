"""What a family of architectures is; see the package's docstring for how to write one."""

from collections.abc import Callable
from typing import Any, ClassVar

from maxlike.convert.config_json import ConfigJson
from maxlike.convert.structure import Cannot, Structure
from maxlike.convert.tensors import Rule


class Family:
    """Names of the classes in config.json's `architectures` (the first is the one we write), the `model_type`, the
    table of tensors, and both directions of the configuration.

    ignored: patterns (regular expressions) of tensors that files may hold and that are no parameters.
    tied: {name: other name} of tensors that files may hold twice; where the network has no parameter for the first,
        it must equal the second.
    prefix: a prefix of names that some files leave out.
    defaults: what the other library takes where config.json leaves a key out, of the keys whose value it is not that
        `network` takes by itself (null stays null).
    length_key: where config.json has the longest length a model was trained for, when no parameter says it.
    """

    architectures: ClassVar[tuple[str, ...]]
    model_type: ClassVar[str]
    tensors: ClassVar[tuple[Rule, ...]]
    ignored: ClassVar[tuple[str, ...]] = (r".*rotary_emb\.inv_freq",)
    tied: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    prefix: ClassVar[str] = ""
    defaults: ClassVar[dict[str, Any]] = {}
    length_key: ClassVar[str | None] = "max_position_embeddings"

    def copies(self, net: Structure) -> dict[str, str]:
        """{name: other name} of further tensors that this network's files hold twice, by which other readers go: an
        import needs only the other and refuses a difference, an export writes both."""
        return {}

    def unused(self, net: Structure) -> tuple[str, ...]:
        """Patterns of tensors that files may hold and that are no parameters of this network."""
        return self.ignored

    def network(self, config: ConfigJson) -> Callable[..., Any]:
        """The factory of the network, called with rngs=. Takes every key that matters; refuses by name what our layers
        cannot express. Inner factories are functools.partial of classes of `layers`."""
        raise ValueError(f"{type(self).__name__} does not say how a network follows from config.json")

    def ahead(self, config: ConfigJson) -> Callable[..., Any]:
        """The factory of the modules that predict further ahead (LanguageModel.mtp). Raises Cannot where the family has
        none."""
        raise Cannot(
            f"{self.architectures[0]} has no modules that predict further ahead, so LanguageModel.mtp cannot come from "
            "or go to its files: set it to None"
        )

    def config(self, net: Structure) -> dict[str, Any]:
        """The keys of config.json that describe a network. It need not check that they describe all of it: the exporter
        does. Raises Cannot (as the accessors of Structure do) for a network of another kind."""
        raise ValueError(f"{type(self).__name__} does not say how config.json follows from a network")
