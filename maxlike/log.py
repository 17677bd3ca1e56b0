"""What a training run leaves behind as it goes: the terminal, metrics.jsonl, TensorBoard events, the report."""

import functools
import pathlib
import statistics
import sys
import time
from typing import Any

import jax

from layers import kernels
from layers.active import active_parameters
from maxlike.config import Configuration
from maxlike.console import Screen, Start, cache_words, duration, quantity
from maxlike.data.data import Batches
from maxlike.decode.cache_size import CacheSize, cache_size
from maxlike.experiment import Experiment
from maxlike.mfu import mfu
from maxlike.program import Program
from maxlike.report.report import write_report
from maxlike.run_dir import RunDirectory
from maxlike.writers import MetricsWriter


class Log:
    """Reads the metrics of a step only when the next step has been dispatched, so the device never waits for it.

    Only process 0 writes; the others read their metrics too, because the guard's policy is every process's.
    screen: where a person looks; it is closed with the log.
    """

    def __init__(self, run: RunDirectory, experiment: Experiment, screen: Screen):
        self.run, self.experiment = run, experiment
        self._last: dict[str, Any] | None = None
        self._chief = jax.process_index() == 0
        self._console = screen
        self._writer = MetricsWriter(run, say=self.say) if self._chief else None
        self._pending: tuple[int, dict[str, jax.Array], float] | None = None
        self._read_at = 0.0
        self._flops, self._devices = 0.0, 1
        self._rates: list[float] = []  # tokens/s of each step of this process
        self._samples: list[tuple[str, str]] = []
        self._validation: dict[str, float] = {}
        self._measured: dict[str, float | list[float]] = {}
        self._began = time.monotonic()

    @functools.cached_property
    def _cache(self) -> CacheSize:
        return cache_size(self.experiment)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self._console.close()
        if self._writer is not None:
            self._writer.close()

    def say(self, sentence: str) -> None:
        """One sentence for a person."""
        if self._chief:
            self._console.say(sentence)

    def alarm(self, sentence: str) -> None:
        """One sentence that concerns this process, whichever it is."""
        if self._chief:
            self._console.say(sentence)
        else:
            print(f"process {jax.process_index()}: {sentence}", file=sys.stderr, flush=True)

    def config(self, configuration: Configuration) -> None:
        """Keeps the operative configuration in the run; `--experiment RUN/config.gin` reruns it."""
        if self._chief:
            self.run.write_text("config.gin", configuration.text())

    def start(self, program: Program, batches: Batches, compiled: jax.stages.Compiled, seconds: float) -> None:
        """The table of what is about to run."""
        experiment, model = self.experiment, program.experiment.bare()
        self._flops = model.flops_per_token(experiment.sequence_length)
        self._devices = program.layout.mesh.size
        parameters = sum(leaf.size for leaf in jax.tree.leaves(program.model.params))
        device = jax.devices()[0]
        described = batches.describe(experiment.steps)
        shares = {name: row["asked"] for name, row in batches.accounting(experiment.steps).items()}
        start = Start(
            parameters=parameters,
            active=round(active_parameters(model)),
            flops_per_token=self._flops,
            mesh=dict(program.layout.mesh.shape),
            batch_tokens=experiment.clock.tokens_per_step,
            memory=_memory(compiled),
            device_kind=device.device_kind,
            devices=self._devices,
            idle=jax.device_count() - self._devices,
            cache=self._cache,
            kernels=tuple(kernels.report()),
            sources=tuple(
                (f"{row['source']} ({row['epochs']:.3g} epochs)", row["tokens"], shares[row["source"]])
                for row in described
            ),
        )
        if self._chief:
            self._console.start(start)
        self.say(f"compiled in {seconds:.1f} s")

    def resume(self, step: int) -> None:
        """Forgets what was written after `step`: the steps to come will be written once."""
        self._pending = self._last = None
        if self._writer is not None:
            self._writer.truncate(step)

    def step(self, step: int, metrics: dict[str, jax.Array], waited: float) -> None:
        """Takes the metrics of update number `step`, still in the making, and reads those of the one before.

        waited: seconds that the loop waited for the batch of this step, while the one before was running.
        """
        began = time.monotonic()
        self.flush(waited)
        self._pending = (step, metrics, began)

    def flush(self, waited: float = 0.0) -> None:
        """Reads the metrics that are outstanding. waited: seconds of that step which the loop waited for a batch."""
        if self._pending is None:
            return
        (step, metrics, began), self._pending = self._pending, None
        values = {name: value.tolist() for name, value in jax.device_get(metrics).items()}
        # A step runs from its dispatch, or from the end of the one before, to the moment its metrics can be read.
        now = time.monotonic()
        elapsed = now - max(self._read_at, began)
        self._read_at = now
        rate = self.experiment.clock.tokens_per_step / elapsed
        self._rates.append(rate)
        speed = {
            "tokens_per_second": rate,
            "input_wait": min(waited / elapsed, 1.0),
            "mfu": mfu(rate, self._flops, jax.devices()[0].device_kind, self._devices),
        }
        self._last = {"step": step} | values
        if self._writer is not None:
            row = {name: int(value) if isinstance(value, bool) else value for name, value in values.items()}
            row["tokens"] = step * self.experiment.clock.tokens_per_step
            self._writer.write(step, "train", row | {name: x for name, x in speed.items() if x is not None})
            self._console.update(step, values | speed)

    def take(self) -> dict[str, Any] | None:
        """The row of the newest step that was read, once; None where it was taken already."""
        row, self._last = self._last, None
        return row

    def validation(self, step: int, metrics: dict[str, float]) -> None:
        """The validation split after `step` updates."""
        self.flush()
        self._validation = metrics
        if self._writer is not None:
            self._writer.write(step, "validation", metrics)
        bits = f", {metrics['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in metrics else ""
        self.say(f"step {step}: validation loss {metrics['loss']:.4f}{bits}")

    def measured(self, step: int, values: dict[str, float | list[float]]) -> None:
        """What tools found in the network after `step` updates: one line; a list has a number for each layer."""
        self.flush()
        self._measured = values
        if self._writer is not None:
            self._writer.write(step, "measured", values)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if not isinstance(value, list))
        self.say(f"step {step}: measured {shown}")

    def samples(self, step: int, samples: list[tuple[str, str]]) -> None:
        """Generated text after `step` updates."""
        self.flush()
        self._samples = samples
        for prompt, text in samples:
            self.say(f"step {step}: {prompt}{text}")

    def finish(self) -> None:
        """Writes the report and says where everything is."""
        if not self._chief:
            return
        name = self.experiment.config.name if self.experiment.config else "EXPERIMENT"
        shown = self._shown()
        command = (
            f'python -m launch --experiment {shown / "config.gin"} --run_dir {shown} --job generate --prompt "..."'
        )
        # A network without a cache generates nothing.
        commands = [("generate", command)] if self._cache.refusal is None else []
        facts = [
            ("experiment", name),
            ("steps", f"{self.experiment.steps:,}"),
            ("tokens", quantity(self.experiment.steps * self.experiment.clock.tokens_per_step)),
            ("FLOPs a token", quantity(self.experiment.bare().flops_per_token(self.experiment.sequence_length))),
            *([("tokens a second, median", quantity(statistics.median(self._rates)))] if self._rates else []),
            ("decoding cache", cache_words(self._cache)),
            ("time since the run was last started", duration(time.monotonic() - self._began)),
            *((f"validation {name}", f"{value:.4f}") for name, value in self._validation.items()),
            *((f"measured {name}", f"{x:.4g}") for name, x in self._measured.items() if not isinstance(x, list)),
        ]
        write_report(self.run, title=name, facts=facts, samples=self._samples, commands=commands)
        self.say(f"report: {shown / 'report.html'}")
        for what, line in commands:
            self.say(f"{what}: {line}")

    def _shown(self) -> pathlib.Path:
        """The run's path as short as it can be written from here."""
        here = pathlib.Path.cwd()
        return self.run.path.relative_to(here) if self.run.path.is_relative_to(here) else self.run.path


def _memory(compiled: jax.stages.Compiled) -> float | None:
    """Peak bytes a device of the compiled step, by the compiler's own analysis, where the backend has one."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return float(held + analysis.temp_size_in_bytes + analysis.generated_code_size_in_bytes)
