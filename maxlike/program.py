"""The compiled functions of an experiment on a mesh: initialise, step, evaluate."""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers import axes, kernels
from maxlike.data.loader import FiniteBatches
from maxlike.errors import UserError
from maxlike.experiment import Experiment
from maxlike.metrics import Mean
from maxlike.model import AbstractModel, split
from maxlike.row_order import RowOrder
from maxlike.sharding import Layout, state_shardings


@dataclasses.dataclass
class Program:
    """An experiment on a layout. Everything is traced under the layout's rules and compiled at most once."""

    experiment: Experiment
    layout: Layout
    model: AbstractModel
    state: Any  # abstract train state, each leaf with its sharding
    _steps: dict[tuple, jax.stages.Compiled] = dataclasses.field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, experiment: Experiment, layout: Layout) -> "Program":
        """Derives the abstract state and one sharding tree for it. Raises UserError where a rule does not fit."""
        program = cls(experiment, layout, experiment.abstract_model(), None)
        program.state = jax.eval_shape(program._make_state, jnp.zeros((), jnp.uint32))
        return program.on(layout)

    def on(self, layout: Layout) -> "Program":
        """The same experiment on another layout; its state is not traced again. Raises UserError as `of` does."""
        placed = state_shardings(self.state, self.model.params, self.model.axes, layout)
        placed["opt"] = self.experiment.step.moments.place(placed["opt"], self.state["opt"])
        state = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), self.state, placed
        )
        return Program(self.experiment, layout, self.model, state)

    def serves(self, experiment: Experiment) -> bool:
        """Whether the experiment differs in its beginning alone (seed, warm start), as one made by Experiment.rerun."""
        compared = [f.name for f in dataclasses.fields(Experiment) if f.name not in ("seed", "warm_start", "config")]
        return all(getattr(self.experiment, name) is getattr(experiment, name) for name in compared)

    def rerun(self, experiment: Experiment) -> "Program":
        """The same compiled functions for an experiment that it serves. Raises ValueError for another."""
        if not self.serves(experiment):
            raise ValueError("Program.rerun: the experiments differ in more than their beginning")
        again = copy.copy(self)  # with all that was made on demand, which depends on none of the three
        again.experiment = experiment
        return again

    @functools.cached_property
    def optimizer(self):
        return self.experiment.optimizer(self.model.axes, self.experiment.clock)

    @functools.cached_property
    def row_order(self) -> RowOrder:
        """The order of the tokens of a row on the devices."""
        return RowOrder(self.experiment.bare(), self.layout)

    @contextlib.contextmanager
    def placed(self) -> Iterator[None]:
        """What the program, and whatever else runs its network, is traced in."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(axes.place_with(self.layout))
            if self.layout.keys is not None:
                stack.enter_context(kernels.choose("context_attention", self.layout.keys))
            yield

    @property
    def shardings(self) -> Any:
        return jax.tree.map(lambda leaf: leaf.sharding, self.state)

    def init(self) -> dict:
        """The state of step 0, each leaf made where it lies: without out_shardings the moments land on one device."""
        return self._init(np.uint32(self.experiment.seed))

    @functools.cached_property
    def _init(self) -> Callable[[Any], dict]:
        # Random initialisers are slow to compile for a CPU and run once: unoptimised code is ready ten times sooner.
        on_cpu = self.layout.mesh.devices.flat[0].platform == "cpu"
        options = {"xla_backend_optimization_level": 0} if on_cpu else None
        return jax.jit(self._make_state, out_shardings=self.shardings, compiler_options=options)

    def compiler(self, batch: dict[str, np.ndarray]) -> Callable[[], jax.stages.Compiled]:
        """What gives the compiled step for batches like this one; it compiles at most once, and may in a thread. The
        step is traced here, and `kernels.report` then tells of this program alone."""
        key = tuple((name, batch[name].shape, str(batch[name].dtype)) for name in sorted(batch))
        if key in self._steps:
            return functools.partial(self._steps.get, key)
        kernels.forget()
        lowered = self.lower_step(batch)

        def compile_step() -> jax.stages.Compiled:
            self._steps[key] = lowered.compile()
            return self._steps[key]

        return compile_step

    def lower_step(self, batch: dict[str, np.ndarray]) -> jax.stages.Lowered:
        """`(state, batch, allow) -> (state, metrics)` for batches like this one, ready to compile.
        The state is donated; no device is touched."""
        return self.trace_step(batch).lower()

    def trace_step(self, batch: dict[str, np.ndarray]) -> jax.stages.Traced:
        """The same traced, which a layout without devices allows too: whatever the layers refuse is refused here."""
        experiment = self.experiment
        self.layout.check_rows(next(iter(batch.values())).shape[0] // experiment.step.micro_batches)
        rate = experiment.optimizer.schedule(experiment.clock)

        def step(state: dict, batch: dict, allow: jax.Array) -> tuple[dict, dict]:
            updates = state["step"] - state["guard"]["skipped"]
            with self.placed():
                state, metrics = experiment.step.update(
                    state,
                    batch,
                    allow,
                    model=self.model,
                    objective=experiment.objective,
                    optimizer=self.optimizer,
                    progress=updates / experiment.steps,
                )
            return state, metrics | {"learning_rate": rate(updates)}

        jitted = jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, self.layout.replicated))
        allow = jax.ShapeDtypeStruct((), jnp.bool_, sharding=self.layout.replicated)
        return jitted.trace(self.state, self.abstract_batch(batch), allow)

    def abstract_batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and shardings of a whole batch."""
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=self.layout.batch(shape))
            for name, (shape, dtype) in self.row_order.shapes(batch).items()
        }

    @functools.cached_property
    def feed(self) -> tuple[int, int]:
        """(which, of how many) of equal parts of a batch's rows this process reads. Processes whose devices lie apart
        only along axes that do not cut the rows (tensor, context) read the same part."""
        shape = (self.experiment.batch_size, self.experiment.sequence_length)
        places = self.layout.batch(shape).devices_indices_map(shape)
        return share_rows({device: index[0] for device, index in places.items()}, shape[0])[jax.process_index()]

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows of a batch onto its devices, in the order of `row_order`."""
        batch = self.row_order.of_batch(batch)
        shapes = {name: (x.shape[0] * self.feed[1], *x.shape[1:]) for name, x in batch.items()}
        shardings = {name: self.layout.batch(shape) for name, shape in shapes.items()}
        if jax.process_count() == 1:  # one call for all fields
            return jax.device_put(batch, shardings)
        make = jax.make_array_from_process_local_data
        return {name: make(shardings[name], x, shapes[name]) for name, x in batch.items()}

    def trained(self, state: dict) -> dict:
        """The parameters to use a model with: the averaged ones where the state has them, in the compute dtype."""
        dtype = jnp.dtype(self.experiment.step.compute_dtype)
        return self.model.cast(state["ema"] if "ema" in state else state["params"], dtype)

    def evaluate(self, state: dict, batches: FiniteBatches) -> dict[str, float]:
        """Metrics over all batches: the averaged parameters where the state has them, no noise."""
        params = state["ema"] if "ema" in state else state["params"]
        sums: dict[str, Mean] | None = None
        part, parts = self.feed
        for batch in batches.iterate(host=part, hosts=parts):
            means = self._evaluate(params, state["buffers"], self.put(batch))
            sums = means if sums is None else jax.tree.map(jnp.add, sums, means)
        values = {name: mean.value() for name, mean in jax.device_get(sums).items()}
        return {name: float(value) for name, value in values.items() if not np.ndim(value)}

    @functools.cached_property
    def _evaluate(self):
        step, objective = self.experiment.step, self.experiment.objective

        def evaluate(params: dict, buffers: dict, batch: dict) -> dict[str, Mean]:
            with self.placed():
                return step.loss(params, buffers, batch, None, self.model, objective)[1]

        return jax.jit(evaluate, out_shardings=self.layout.replicated)

    def _make_state(self, seed: jax.Array) -> dict:
        _, params, buffers = split(self.experiment.network, jax.random.key(seed))
        params, buffers = nnx.to_pure_dict(params), nnx.to_pure_dict(buffers)
        return self.experiment.step.init(params, buffers, self.optimizer, seed)


def share_rows(rows: dict[Any, slice], batch_size: int) -> dict[int, tuple[int, int]]:
    """Process -> (part, of parts): which of equal, consecutive parts of the batch hold the rows of its devices.

    rows: device (it has `process_index`) -> its rows. Raises UserError where a process's devices hold rows that are no
    such part: the data cannot be read by host then.
    """
    spans: dict[int, tuple[int, int]] = {}
    for device, of_batch in rows.items():
        start, stop, _ = of_batch.indices(batch_size)
        first, last = spans.get(device.process_index, (start, stop))
        spans[device.process_index] = min(first, start), max(last, stop)
    parts = sorted(set(spans.values()))
    if [part for part in parts if part[0] * len(parts) % batch_size or (part[1] - part[0]) * len(parts) != batch_size]:
        raise UserError(
            f"processes hold the rows {parts} of a batch of {batch_size}, which are no equal parts: order the axes of "
            "Mesh.shape so that those that cut the batch come first"
        )
    return {process: (parts.index(span), len(parts)) for process, span in spans.items()}
