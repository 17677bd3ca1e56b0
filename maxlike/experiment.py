"""Experiment: the noun every job takes."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

from flax import nnx

from layers.language_model import LanguageModel
from maxlike.checkpoint import Checkpoints
from maxlike.data.data import Data
from maxlike.data.loader import FiniteBatches
from maxlike.data.mixed import TextAndPictures
from maxlike.data.pictures import Pictures
from maxlike.errors import UserError
from maxlike.hooks import Hook
from maxlike.model import AbstractModel
from maxlike.noun import Noun
from maxlike.schedules import Clock
from maxlike.sharding import Mesh
from maxlike.step import Step
from maxlike.watchdog import Watchdog


@dataclasses.dataclass(kw_only=True)
class Experiment(Noun):
    """Everything that determines a training run, as objects.

    model: factory, called as `model(rngs=...)` -> a network (`layers.language_model.LanguageModel`).
    objective: `(model, batch, key) -> (loss, metrics)`, see `maxlike.objectives`.
    optimizer: `(axes, clock) -> optax.GradientTransformation`, see `maxlike.optimizers`.
    data: documents, tokenizer and packing, or pictures; see `maxlike.data`.
    mesh: device mesh and sharding rules.
    steps: number of updates. batch_size: rows a step, over all devices. sequence_length: tokens a row (T).
    seed: of the initial parameters, the data order and all noise.
    step: precision, micro-batches, clipping, averaging and what to do with a bad step.
    checkpoints: when to save and what to keep. hooks: called after every step.
    products: `network -> network`, such as layers.low_precision.Float8: how its matrix products are computed; None: in
        the step's compute dtype.
    watchdog: when a step that takes long is recorded, and whether that ends the run.
    warm_start: `(state, abstract state, say) -> (state, passport)`, such as WarmStart, Upcycle or Deepen: parameters of
        another run to begin with, or None.
    config: the `maxlike.config.Configuration` it was loaded from; None where it was built in Python.

    Raises UserError for counts below 1, or a batch that the micro-batches do not divide.
    """

    binds: ClassVar[str] = "experiment.Experiment"

    model: Callable
    objective: Callable
    optimizer: Callable
    data: Data | Pictures
    mesh: Mesh
    steps: int
    batch_size: int
    sequence_length: int
    seed: int = 0
    step: Step = dataclasses.field(default_factory=Step)
    checkpoints: Checkpoints = dataclasses.field(default_factory=Checkpoints)
    hooks: tuple[Hook, ...] = ()
    watchdog: Watchdog = dataclasses.field(default_factory=Watchdog)
    products: Callable | None = None
    warm_start: Callable | None = None
    config: Any = None

    def __post_init__(self):
        for name in ("steps", "batch_size", "sequence_length"):
            if getattr(self, name) < 1:
                raise UserError(f"Experiment.{name}={getattr(self, name)}: it must be at least 1")
        if self.batch_size % self.step.micro_batches:
            raise UserError(
                f"Experiment.batch_size={self.batch_size} is not a multiple of "
                f"Step.micro_batches={self.step.micro_batches}: change one of the two"
            )
        self._abstract: AbstractModel | None = None

    def configured(self, configuration: Any) -> "Experiment":
        """The same with its configuration, under which its model is built; traces the model, which reads its knobs."""
        made = dataclasses.replace(self, model=configuration.inside(self.model), config=configuration)
        made.abstract_model()
        return made

    def described(self) -> str:
        return "an experiment"

    def changed(self, **fields: Any) -> "Experiment":
        """The same with other fields. A network that stays is not traced again."""
        made = dataclasses.replace(self, **fields)
        if made.model is self.model and made.products is self.products:
            made._abstract = self._abstract
        return made

    def rerun(self, *, seed: int, warm_start: Callable | None) -> "Experiment":
        """The same from another beginning. It shares every other object, so `Program.rerun` serves it, and its
        operative configuration says what it is."""
        config = self.config and self.config.with_value(Experiment, "seed", seed)
        if config is not None and warm_start is not self.warm_start:
            config = config.with_value(type(warm_start), "source", str(warm_start.source))
        made = dataclasses.replace(self, seed=seed, warm_start=warm_start, config=config)
        made._abstract = self._abstract
        return made

    @property
    def clock(self) -> Clock:
        """What schedules convert durations with."""
        return Clock(steps=self.steps, tokens_per_step=self.batch_size * self.sequence_length)

    def network(self, *, rngs: nnx.Rngs) -> Any:
        """A new network, with the products that it is to compute with."""
        network = self.model(rngs=rngs)
        return network if self.products is None else self.products(network)

    def abstract_model(self) -> AbstractModel:
        """Shapes and logical axes, without computing a number; traced once."""
        if self._abstract is None:
            self._abstract = AbstractModel.of(self.network)
        return self._abstract

    def open_validation(self) -> FiniteBatches:
        """The validation batches, of the size that the device sees at a time while it trains."""
        return self.data.open_validation(
            sequence_length=self.sequence_length, batch_size=self.batch_size // self.step.micro_batches
        )

    def check_vocabulary(self) -> None:
        """Raises UserError where the tokenizer has ids that the model has no embedding for, or takes for text."""
        tokenizer, network = self.data.tokenizer, self.bare()
        ids, vocab = tokenizer.vocab_size, network.vocab
        if ids > vocab:
            raise UserError(
                f"the tokenizer has {ids} ids and LanguageModel.vocab is {vocab}: raise it to at least {ids}"
            )
        if isinstance(tokenizer, TextAndPictures) and isinstance(network, LanguageModel):
            first = tokenizer.first_code_id
            if network.modality_starts and network.modality_starts[0] != first:
                raise UserError(
                    f"LanguageModel.modality_starts={network.modality_starts} begins elsewhere than the pictures' ids "
                    f"of the tokenizer: set it to ({first},)"
                )

    def bare(self) -> Any:
        """The network's structure with shapes in place of numbers: for its methods that need none."""
        abstract = self.abstract_model()
        return abstract.merge(abstract.params, abstract.buffers)
