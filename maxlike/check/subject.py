"""The small twin: how its variants are loaded, compiled and run."""

import contextlib
import copy
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers import axes, kernels
from layers.encoder_decoder import EncoderDecoder
from layers.language_model import LanguageModel
from maxlike import checkpoint_tree, config
from maxlike.check import documents, watch
from maxlike.check.compare import Comparison, Record, compare
from maxlike.check.shrink import Bindings, Change, shrink
from maxlike.check.steps import moved_by_a_bit, records
from maxlike.check.variant import LeftOut, Recorder, Row, Variant, broken
from maxlike.convert.structure import Structure
from maxlike.data.data import Batches
from maxlike.errors import UserError
from maxlike.experiment import Experiment
from maxlike.optimizers.moments import Moments
from maxlike.program import Program
from maxlike.refusals import is_refusal

STEPS = 2  # updates a variant makes: the second one reads what the first one wrote
NOISE = 0.05  # added to every parameter, so that none that begins at zero hides a mistake
DEVICES = (8, 4, 2)  # how many a mesh gets: fewer where it refuses the twin on more
MOVED = 3  # times that a reference is computed anew where a row departs from it
DEEP = 6  # periods of a twin that a pipeline of several rounds needs
Lines = Sequence[str]  # gin bindings


class Subject:
    """The small twin of an experiment in `folder`, where its gin file, documents and checkpoints are.

    rows: names of the rows to run, all of them where it is empty.
    """

    def __init__(self, experiment: Experiment, folder: pathlib.Path, rows: tuple[str, ...] = ()):
        if experiment.config is None:
            raise UserError(
                "the check shrinks a gin file, and this experiment was built in Python: load it by config.load"
            )
        self.folder, self.rows = folder, rows
        self._variants: dict[tuple, Variant] = {}
        self._lowered: dict[tuple[Variant, tuple], tuple[Program, jax.stages.Lowered]] = {}
        self._taken: dict[Variant, set[str]] = {}
        self._records: dict[Variant, Record] = {}
        self._starts: dict[tuple, dict] = {}
        self._on_mesh: dict[tuple[str, ...], tuple[Variant, Variant, str]] = {}
        bindings = Bindings(experiment.config.operative)
        self.changes: list[Change] = shrink(bindings)
        self.path = folder / "small.gin"
        lines = [f"# The small twin of {experiment.config.name}, for --job check.", bindings.text]
        self.path.write_text("\n".join([*lines, *(change.text for change in self.changes)]) + "\n")
        self.bindings = Bindings(self.real().config.operative)

    def wants(self, name: str) -> bool:
        """Whether a row is to be run: `--rows mesh` runs every `mesh/...`, `--rows mesh/fsdp` that one."""
        return not self.rows or any(name == wanted or name.startswith(f"{wanted}/") for wanted in self.rows)

    def wants_some(self, group: str) -> bool:
        """Whether a row of a group may be wanted."""
        return not self.rows or any(wanted.split("/")[0] == group for wanted in self.rows)

    def real(self, lines: Lines = (), overlays: Sequence[str] = ()) -> Experiment:
        """The twin with its own optimizer, on made-up documents, with further bindings and overlays."""
        try:
            experiment = config.load(str(self.path), overlays=overlays, bindings=lines)
        except UserError as error:
            if lines or overlays:
                raise
            raise UserError(
                f"the small twin of this experiment is refused ({error}): mend {self.path} and check that file instead"
            ) from error
        network = experiment.bare()
        if not isinstance(network, LanguageModel | EncoderDecoder):
            return experiment
        data = self._documents(network.vocab, experiment.batch_size, experiment.sequence_length)
        return dataclasses.replace(experiment, data=data)

    def variant(
        self, lines: Lines = (), overlays: Sequence[str] = ("mesh/single",), devices: int = DEVICES[0]
    ) -> Variant:
        """The twin with further bindings and overlays: the Recorder, whole moments, no clipping, which would hide a
        gradient's scale, and scanned layers, which compile once. Asked again for the same, it gives the same."""
        name = (tuple(lines), tuple(overlays), devices)
        if name not in self._variants:
            experiment = self.real(lines, overlays)
            step = copy.copy(experiment.step)
            step.clip_norm, step.moments = None, Moments()
            experiment = dataclasses.replace(experiment, optimizer=Recorder(), step=step)
            self._variants[name] = Variant(
                experiment, experiment.mesh.open(jax.devices()[:devices]), (("layers", "scan"),)
            )
        return self._variants[name]

    def on_mesh(self, overlays: Sequence[str], further: Lines = ()) -> tuple[Variant, Variant, str]:
        """(the twin on a mesh, the same twin on one device, remark), both with further bindings. Where the mesh refuses
        the twin on 8 devices, it gets 4 or 2 of them, and a deeper twin where the refusal names Stack.depth; the remark
        says so.

        Raises LeftOut with the first refusal.
        """
        name = tuple(overlays)
        if name in self._on_mesh:
            return self._on_mesh[name]
        patterns = self.bindings.values("pattern", "Stack")
        deeper = []
        if len(patterns) == 1:
            outside = sum(len(self.bindings.values(knob, "Stack")[0]) for knob in ("prefix", "suffix"))
            depth = DEEP * len(patterns[0])
            deeper = self.bindings.override("Stack", "depth", depth)
            deeper += self.bindings.override("LightningAttention", "layers", depth + outside)
        refusals: list[str] = []
        for devices, lines in [*((count, []) for count in DEVICES), (DEVICES[0], deeper)]:
            if lines and "Stack.depth" not in refusals[0]:
                break
            lines = [*lines, *further]
            try:
                variant = self.variant(lines, overlays, devices)
                self.lower(variant, self.batches[0])
            except (LeftOut, UserError) as refusal:
                refusals.append(str(refusal).removeprefix("refused: "))
                continue
            if variant.layout.mesh.size == 1:
                raise LeftOut("this mesh is one device")
            where = f"{DEEP} periods deep" if lines[: len(deeper)] == deeper != [] else f"on {devices} devices"
            remark = f"{where}: {refusals[0]}" if refusals else ""
            self._on_mesh[name] = variant, self.variant(lines), remark
            return self._on_mesh[name]
        raise LeftOut(f"refused: {refusals[0]}")

    def choosing(self, variant: Variant, op: str, implementation: str) -> Variant:
        """A variant with another implementation of one operation."""
        name = (variant, op, implementation)
        if name not in self._variants:
            choices = (*variant.choices, (op, implementation))
            self._variants[name] = Variant(variant.experiment, variant.layout, choices)
        return self._variants[name]

    @property
    def base(self) -> Variant:
        """The twin on one device."""
        return self.variant()

    @functools.cached_property
    def network(self) -> Any:
        """The twin's structure, shapes in place of numbers."""
        return self.base.experiment.bare()

    @functools.cached_property
    def structure(self) -> Structure:
        return Structure(self.network)

    @property
    def start(self) -> dict:
        """The state that the base begins with."""
        return self.start_of(self.base.experiment)

    def start_of(self, experiment: Experiment) -> dict:
        """A state of step 0 on the host, every parameter a little away from its initial value: the same one for all
        variants of one depth."""
        shapes = tuple(
            (path, leaf.shape) for path, leaf in checkpoint_tree.flatten(experiment.abstract_model().params).items()
        )
        if shapes not in self._starts:
            state = jax.device_get(Program.of(experiment, self.base.layout).init())
            random = np.random.default_rng(2)
            noisy = jax.tree.map(lambda p: p + NOISE * random.standard_normal(p.shape).astype(p.dtype), state["params"])
            self._starts[shapes] = state | {"params": noisy} | ({"ema": noisy} if "ema" in state else {})
        return self._starts[shapes]

    @functools.cached_property
    def batches(self) -> list[dict[str, np.ndarray]]:
        """The first batches of the documents."""
        batches = self.train_batches(self.base.experiment)
        return [batches.batch(step) for step in range(STEPS)]

    def train_batches(self, experiment: Experiment) -> Batches:
        return experiment.data.train(
            sequence_length=experiment.sequence_length, batch_size=experiment.batch_size, seed=experiment.seed
        )

    def lower(self, variant: Variant, batch: dict[str, np.ndarray]) -> tuple[Program, jax.stages.Lowered]:
        """The step of a variant, traced once. Raises LeftOut with the sentence of a layer or a mesh that refuses it."""
        shape = next(iter(batch.values())).shape
        if (variant, shape) in self._lowered:
            return self._lowered[variant, shape]
        kernels.forget()
        try:
            with variant.chosen():
                program = Program.of(variant.experiment, variant.layout)
                lowered = program.lower_step(batch)
        except ValueError as error:
            if not is_refusal(error):
                raise
            raise LeftOut(f"refused: {error}") from error
        self._taken[variant] = {op for op, _, _ in kernels.report()}
        self._lowered[variant, shape] = program, lowered
        return program, lowered

    def taken(self, variant: Variant) -> set[str]:
        """The operations that the variant's step picked an implementation for."""
        if variant not in self._taken:
            self.lower(variant, self.batches[0])
        return self._taken[variant]

    def record(self, variant: Variant) -> Record:
        """What a variant computes on the first batches; run once."""
        if variant not in self._records:
            self._records[variant] = self.run(variant, self.batches)
        return self._records[variant]

    def run(self, variant: Variant, batches: Sequence[dict[str, np.ndarray]]) -> Record:
        """Metrics, gradients and buffers of each step, and the parameters at the end, from `start`."""
        program, lowered = self.lower(variant, batches[0])
        return next(records(program, lowered.compile(), [self.start_of(variant.experiment)], batches))

    def moved(self, variant: Variant) -> list[Record]:
        """What a variant computes on the first batches from starts whose parameters are moved by their last bit."""
        start = self.start_of(variant.experiment)
        starts = (start | {"params": moved_by_a_bit(start["params"], seed)} for seed in range(MOVED))
        program, lowered = self.lower(variant, self.batches[0])
        return list(records(program, lowered.compile(), starts, self.batches))

    def forward(self, variant: Variant, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What every layer gives for a batch, in order of depth; empty for a network without stacks."""
        program, names = Program.of(variant.experiment, variant.layout), {}

        def run(params: dict, buffers: dict, batch: dict) -> dict[str, jax.Array]:
            with contextlib.ExitStack() as stack:
                stack.enter_context(axes.place_with(variant.layout))
                if variant.layout.keys is not None:
                    stack.enter_context(kernels.choose("context_attention", variant.layout.keys))
                found = watch.outputs(program.model.merge(params, buffers), batch)
            names.update(dict.fromkeys(found))  # jit hands a dict back sorted by its keys, not by depth
            return found

        with variant.chosen():
            compiled = jax.jit(run).lower(
                program.state["params"], program.state["buffers"], program.abstract_batch(batch)
            )
        placed, rows = jax.device_put(self.start_of(variant.experiment), program.shardings), program.put(batch)
        given = jax.device_get(compiled.compile()(placed["params"], placed["buffers"], rows))
        if "order" in rows:  # devices hold the tokens of a row in another order than the row
            back = np.argsort(np.asarray(rows["order"])[0])
            given = {name: x[:, back] for name, x in given.items()}
        return {name: given[name] for name in names}

    def against(
        self, one: Variant, other: Variant, tolerance: float, seen: Callable[[Record], Record] = lambda record: record
    ) -> Comparison:
        """Compares what is `seen` of two variants over the batches. Where they depart, the other one is moved by a bit,
        to know what rounding alone does to this twin; where they still do, the forward passes are looked at layer by
        layer, for a gradient or a metric departs at once whichever layer is at fault."""
        records = seen(self.record(one)), seen(self.record(other))
        result = compare(*records, tolerance)
        if result.first is None:
            return result
        result = compare(*records, tolerance, [seen(record) for record in self.moved(other)])
        return result if result.first is None else self.located(result, one, other)

    def located(self, result: Comparison, one: Variant, other: Variant) -> Comparison:
        """A comparison that departs, with the first layer whose output does."""
        batch = self.batches[0]
        if one.staged or other.staged:  # their layers see micro-batches
            return result
        layers = compare({"output": self.forward(one, batch)}, {"output": self.forward(other, batch)}, result.tolerance)
        return result if layers.first is None else dataclasses.replace(result, first=layers.first)

    def row(self, name: str, compared: str, judge: Callable[[], Comparison], remark: str = "") -> Row:
        """Runs one row. Whatever it raises is an answer too: the table goes on."""
        try:
            result = judge()
        except LeftOut as why:
            return Row(name, compared, None, str(why), failed=False)
        except Exception as error:
            return broken(name, compared, error)
        if result.first is not None:
            return Row(name, compared, result, result.first, failed=True)
        return Row(name, compared, result, "; ".join(filter(None, (remark, result.remark))), failed=False)

    @functools.cached_property
    def leaves(self) -> dict[str, jax.Array]:
        """{path: array} of the parameters and buffers of `start`, on the default device."""
        flat = checkpoint_tree.flatten(self.start["params"]) | checkpoint_tree.flatten(self.start["buffers"])
        return {path: jnp.asarray(leaf) for path, leaf in flat.items()}

    @functools.cache  # noqa: B019  (one subject a job)
    def _documents(self, vocab: int, batch_size: int, length: int) -> Any:
        return documents.data(self.folder, vocab=vocab, batch_size=batch_size, length=length)
