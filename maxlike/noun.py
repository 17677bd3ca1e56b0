"""Noun: what a gin file is about and a job takes: an experiment, a comparison of experiments, a sweep over one."""

import abc
from typing import Any, ClassVar, Self


class Noun(abc.ABC):
    """Base of the classes that a gin file may bind as what it is about; a job's first parameter names the one it takes.

    Every subclass is built from knobs alone and has a field `config`, the `maxlike.config.Configuration` it was loaded
    from. `binds`: how a gin file spells it. `contains_experiments`: whether overlays, and bindings of `--set` that name
    nothing its file imports, are for the experiments in it rather than for itself; `Configuration.overlays` and
    `Configuration.bindings` then hold them.
    """

    binds: ClassVar[str]
    contains_experiments: ClassVar[bool] = False
    config: Any

    @abc.abstractmethod
    def configured(self, configuration: Any) -> Self:
        """The same with its configuration, and whatever must be read while that is active."""

    @abc.abstractmethod
    def described(self) -> str:
        """What it is, for the sentence that refuses it where another noun is wanted."""
