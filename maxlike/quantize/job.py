"""`--job quantize`: a run's checkpoint in few bits, and what that costs on the validation split."""

import dataclasses
import json
import math
import pathlib
from typing import Any, Literal

import jax
import numpy as np
import safetensors.numpy
from rich.console import Console
from rich.table import Table

from maxlike import checkpoint_files as files
from maxlike import passport
from maxlike.errors import UserError
from maxlike.experiment import Experiment
from maxlike.quantize import targets
from maxlike.quantize.calibrate import Calibration
from maxlike.quantize.evaluate import Cost, Evaluator
from maxlike.quantize.grid import check_bits
from maxlike.quantize.hadamard import Rotation
from maxlike.quantize.recipe import Method, Recipe
from maxlike.quantize.weights import Weights
from maxlike.quantize.weights import quantize as quantize_weights
from maxlike.restore import restore
from maxlike.run_dir import RunDirectory

KEPT_BYTES = 2  # of a number that is not quantized: 16 bits


def quantize(
    experiment: Experiment,
    run_dir: pathlib.Path,
    *,
    bits: int = 4,
    activation_bits: int = 16,
    cache_bits: int = 16,
    method: Method = "rtn",
    group: int | None = None,
    levels: Literal["symmetric", "asymmetric", "half_step"] = "symmetric",
    hadamard_blocks: bool = False,
    rows: int = 128,
    batches: int | None = None,
    checkpoint: int | None = None,
    destination: str | None = None,
) -> Cost:
    """Quantizes a run's newest checkpoint (averaged weights where it has them) and evaluates it before and after on the
    same validation batches.

    The matrices inside the blocks get `bits` each, their inputs `activation_bits`, keys and values `cache_bits` (2, 3,
    4, 6, 8 or 16); embedding, head and norms stay. method: rtn, had, gptq, had_gptq, quarot, quarot_gptq or nf4.
    group: inputs that share a scale, None for all of an output (64 for nf4). levels: symmetric, asymmetric or
    half_step. hadamard_blocks: rotate blocks of a width that has no Hadamard matrix. rows: of the training split that
    GPTQ sees. batches: of the validation split, None for all. checkpoint: the step. destination: a new run directory,
    by default RUN/quantized/NAME: a checkpoint of the same experiment that evaluate, generate, export and WarmStart
    take, codes.safetensors with the codes and scales, and quantize.json.
    """
    for name, value in (("bits", bits), ("activation_bits", activation_bits), ("cache_bits", cache_bits)):
        check_bits(f"--{name}", value)
    if bits == activation_bits == cache_bits == 16:
        raise UserError("--bits 16 --activation_bits 16 --cache_bits 16 leaves nothing to quantize: lower one of them")
    if batches is not None and batches < 1:
        raise UserError(f"--batches={batches} must be at least 1, or None for the whole validation split")
    if jax.process_count() > 1:
        raise UserError("quantize runs as one process: start it on one host")
    recipe = Recipe(
        weights=bits,
        activations=activation_bits,
        cache=cache_bits,
        method=method,
        group=group,
        levels=levels,
        hadamard_blocks=hadamard_blocks,
    )
    targets.find(experiment.bare(), recipe)  # refuses before anything is read
    target = _destination(run_dir, recipe, destination)
    experiment.open_validation()
    calibration = Calibration.of(experiment, rows) if recipe.needs_hessian else None
    program, state, step = restore(experiment, run_dir, checkpoint)
    params = state["ema"] if "ema" in state else state["params"]
    weights = quantize_weights(experiment, params, state["buffers"], recipe, calibration)
    cost = Evaluator(program, recipe)(state, weights.params, batches)
    report = _report(run_dir, step, recipe, params, weights, cost)
    _show(weights, report)
    _write(experiment, pathlib.Path(run_dir), step, state, weights, report, target)
    return cost


def _destination(run_dir: pathlib.Path, recipe: Recipe, destination: str | None) -> pathlib.Path:
    target = pathlib.Path(run_dir) / "quantized" / _label(recipe) if destination is None else pathlib.Path(destination)
    if target.exists():
        raise UserError(f"{target} exists: name a new directory with --destination, or remove it")
    return target.absolute()


def _label(recipe: Recipe) -> str:
    """The recipe in a word that names a directory."""
    name = recipe.name + ("" if recipe.group is None else f"_g{recipe.group}")
    return name + ("" if recipe.levels == "symmetric" else f"_{recipe.levels}")


def _report(
    run_dir: pathlib.Path, step: int, recipe: Recipe, params: dict, weights: Weights, cost: Cost
) -> dict[str, Any]:
    """What quantize.json holds."""
    numbers = sum(leaf.size for leaf in jax.tree.leaves(params))
    quantized = {matrix.target.path: matrix.codes_NIO.size for matrix in weights.matrices}
    rest = KEPT_BYTES * (numbers - sum(quantized.values()))
    return {
        "source": {"run": str(pathlib.Path(run_dir).absolute()), "step": step},
        "name": _label(recipe),
        "recipe": dataclasses.asdict(recipe),
        "layers": [
            {
                "layer": matrix.target.layer,
                "parameter": matrix.target.path,
                "matrices": len(matrix.errors_N),
                "shape": [matrix.target.inputs, matrix.target.outputs],
                "bits": matrix.bits,
                "hadamard_blocks": {"inputs": _block(matrix.target.enters), "outputs": _block(matrix.target.leaves)},
                "relative_error": [float(error) for error in matrix.errors_N],
                "damp": matrix.damp,
            }
            for matrix in weights.matrices
        ],
        "kept_in_16_bits": weights.kept,
        "bytes": {
            "before": KEPT_BYTES * numbers,
            "after": math.ceil(
                rest + sum(matrix.bits * quantized[matrix.target.path] / 8 for matrix in weights.matrices)
            ),
        },
        "validation": dataclasses.asdict(cost),
    }


def _block(rotation: Rotation | None) -> int | None:
    """Channels that a Hadamard matrix mixes before rounding, None without one."""
    return None if rotation is None else rotation.block


def _show(weights: Weights, report: dict[str, Any]) -> None:
    title = f"{report['name']}, step {report['source']['step']}; error: |W - Q|² / |W|²"
    table = Table(title=title, title_justify="left")
    table.add_column("in the blocks", no_wrap=True)
    for column in ("layers", "shape", "bits", "error", "worst"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in report["layers"]:
        errors, (inputs, outputs) = row["relative_error"], row["shape"]
        means = f"{row['bits']:.3f}", f"{sum(errors) / len(errors):.1e}", f"{max(errors):.1e}"
        table.add_row(row["parameter"].removesuffix("/kernel"), f"{len(errors)}", f"{inputs} x {outputs}", *means)
    console = Console()
    if weights.matrices:
        console.print(table)
    for path, why in weights.kept.items():
        print(f"in 16 bits: {path} ({why})")
    before, after, validation = report["bytes"]["before"], report["bytes"]["after"], report["validation"]
    if weights.matrices:
        print(f"parameters: {before:,} bytes in 16 bits, {after:,} quantized ({before / after:.2f} times less)")
    error = validation["standard_error"]
    within = "" if error is None else f" ± {error:.2g} (standard error over batches)"
    print(
        f"validation loss {validation['before']['loss']:.4f} -> {validation['after']['loss']:.4f}, "
        f"{validation['rise']:+.4f}{within} nats a token over {validation['tokens']:,} tokens"
    )
    if "bits_per_byte" in validation["before"]:
        pair = (validation[when]["bits_per_byte"] for when in ("before", "after"))
        print("bits per byte {:.4f} -> {:.4f}".format(*pair))


def _write(
    experiment: Experiment,
    run_dir: pathlib.Path,
    step: int,
    state: dict,
    weights: Weights,
    report: dict[str, Any],
    target: pathlib.Path,
) -> None:
    """The quantized run directory. A checkpoint without moments: it is for use, not for training on."""
    source = RunDirectory(run_dir, mode="read").checkpoints / str(step)
    with RunDirectory(target) as run:
        run.write_text("quantize.json", json.dumps(report, indent=1) + "\n")
        if not weights.matrices:
            print(f"{target}: quantize.json; weights stay in 16 bits, so there is no new checkpoint")
            return
        tree = "ema" if "ema" in state else "params"
        record = files.read_record(source)
        stamps = passport.stamped("quantize", source, record, tree, {"recipe": report["name"]})
        quantized = state | {"params": weights.params} | ({"ema": weights.params} if "ema" in state else {})
        store = experiment.checkpoints.open(run.checkpoints, say=print)
        store.save(step, quantized, record.metadata | {"passport": stamps})
        store.close()
        if store.failures:
            raise UserError(f"the quantized checkpoint could not be written to {target}: free some space and try again")
        if experiment.config is not None:
            run.write_text("config.gin", experiment.config.text())
        _write_codes(run.file("codes.safetensors"), weights, report["recipe"])
    print(f"{target}: checkpoint of quantized weights, codes.safetensors, quantize.json")


def _write_codes(path: pathlib.Path, weights: Weights, recipe: dict[str, Any]) -> None:
    """One byte a code, in the basis in which a matrix was rounded."""
    tensors = {}
    for matrix in weights.matrices:
        parts = {"codes": matrix.codes_NIO, "scales": matrix.scales_NGO, "zeros": matrix.zeros_NGO}
        tensors |= {
            f"{matrix.target.path}/{name}": np.asarray(part) for name, part in parts.items() if part is not None
        }
    safetensors.numpy.save_file(tensors, path, metadata={"recipe": json.dumps(recipe)})
