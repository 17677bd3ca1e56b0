"""`--job export`: a run's weights as config.json, safetensors and tokenizer files that other libraries load."""

import json
import pathlib
import shutil
from typing import Any, Literal

import jax
import numpy as np

from maxlike import checkpoint_tree, merging
from maxlike.convert import ahead, families, proof, transfer
from maxlike.convert.config_json import IRRELEVANT, read_json
from maxlike.convert.family import Family
from maxlike.convert.import_job import KEPT, filled
from maxlike.convert.pretrained import COMPANIONS
from maxlike.convert.structure import Cannot, Structure, difference, of
from maxlike.convert.tensor_files import TensorFiles
from maxlike.convert.tensors import expand
from maxlike.data import files
from maxlike.data.tokenizers import HuggingFace, SentencePiece, Tokenizer
from maxlike.errors import UserError
from maxlike.experiment import Experiment
from maxlike.program import Program
from maxlike.run_dir import RunDirectory
from maxlike.warm_start import load_parameters

SHARD_BYTES = 5 * 10**9
OF_THE_FILE = {"architectures", "model_type", "torch_dtype", "dtype", "auto_map", "transformers_version"}


def export(
    experiment: Experiment,
    run_dir: pathlib.Path,
    *,
    destination: str,
    family: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    checkpoint: int | None = None,
) -> None:
    """Writes a run's checkpoint to the new directory `destination`: config.json, safetensors in shards of at most 5 GB
    and the tokenizer's files. What was written is read back, and its logits on a probe compared with the model's,
    before the directory gets its name.

    family: the model type to write ('llama', 'qwen2', ...); by default the first that expresses the network exactly.
    dtype: of the written weights. checkpoint: the step; by default the newest. Averaged weights are taken where the run
    keeps them, and what `layers.merging` can merge is merged. Refuses a network that no family expresses exactly, and
    names what differs.
    """
    target = pathlib.Path(destination).absolute()
    if target.exists():
        raise UserError(f"--destination {target} exists: name a new directory")
    if jax.process_count() > 1:
        raise UserError("export runs as one process: start it on one host")
    trained, experiment = experiment, merging.plain(experiment)
    net = Structure(experiment.bare())
    run = RunDirectory(run_dir, mode="read")
    chosen, config = describe(net, family)
    flat = _weights(trained, run, checkpoint)
    if experiment is not trained:
        flat = _merged(trained, experiment, flat)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write_config(partial, run, chosen, config, experiment, dtype)
        names = transfer.store(chosen, net, flat, directory=partial, dtype=dtype, shard_bytes=SHARD_BYTES)
        rounding = prove(experiment, flat, partial, dtype)
        partial.rename(target)
    except OSError as error:
        raise UserError(
            f"{target} could not be written ({error.strerror}): free some space, or name another"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(
        f"{target}: {chosen.architectures[0]}, {', '.join(names)}; read back, its logits are exactly the model's"
        + ("" if dtype == "float32" else f" in {dtype}; against float32 the largest difference is {rounding:.3g}")
    )


def describe(net: Structure, wanted: str | None = None) -> tuple[Family, dict[str, Any]]:
    """(family, config.json) that say exactly what a network computes. Raises Cannot, with the differences, where there
    is none."""
    reasons, modules = [], ahead.count(net)
    for family in families.FAMILIES if wanted is None else (families.named(wanted),):
        try:
            config = {"architectures": [family.architectures[0]], "model_type": family.model_type} | family.config(net)
            config |= {ahead.DEPTH: modules} if modules else {}
            exported = families.network(config, "the export", mtp=modules > 0)[1]
            table = difference(of(exported), net, ("as exported", "the model"))
            if table is None:
                expand(family.tensors, net)
                return family, config
            reasons.append((table.count("\n"), f"as {family.model_type} it would differ in\n{table}"))
        except Cannot as error:
            reasons.append((10**6, f"{family.model_type}: {error}"))
    nearest = min(reasons)
    shown = nearest[1] if wanted is None and nearest[0] < 10**6 else "\n".join(reason for _, reason in reasons)
    raise Cannot(f"no family expresses this network exactly, so it is not exported: change its knobs\n{shown}")


def prove(experiment: Experiment, flat: dict[str, jax.Array], directory: pathlib.Path, dtype: str) -> float:
    """Reads the directory as an importer would and compares logits: the largest difference to float32 weights.

    flat: {leaf: array} of the model; emptied on the way, so that two models are never in memory.
    Raises RuntimeError where they differ from those of the weights in the written dtype: that would be our bug.
    """
    model, net = experiment.abstract_model(), Structure(experiment.bare())
    tokens_BT = proof.probe(experiment.bare())

    def logits(leaves: dict[str, jax.Array]) -> np.ndarray:
        return proof.logits(model.graph, filled(model.params, leaves), filled(model.buffers, leaves), tokens_BT)

    family, factory, _ = families.read(directory, mtp=ahead.count(net) > 0)
    table = difference(of(factory), net, ("as written", "the model"))
    exact = logits(flat)
    abstract = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for path, x in flat.items()}
    tensors = expand(family.tensors, net).values()
    named = {slot.parameter.leaf for tensor in tensors for slot in tensor.slots}
    if dtype != "float32":
        rounded = named - {slot.parameter.leaf for tensor in tensors if tensor.exact for slot in tensor.slots}
        flat.update({path: flat[path].astype(dtype).astype(flat[path].dtype) for path in rounded})
    written = logits(flat)
    for path in named:
        del flat[path]
    worst = float(np.max(np.abs(logits(flat | transfer.load(TensorFiles(directory), family, net, abstract)) - written)))
    if table or not worst <= 1e-5 * max(1.0, float(np.max(np.abs(written)))):
        raise RuntimeError(f"what was exported is not the model: logits differ by {worst:.3g}\n{table or ''}")
    return float(np.max(np.abs(written - exact)))


def _weights(experiment: Experiment, run: RunDirectory, checkpoint: int | None) -> dict[str, jax.Array]:
    """{leaf: array} of the parameters and buffers of a checkpoint, without the optimizer's state."""
    store = experiment.checkpoints.open(run.checkpoints, read_only=True, say=print)
    if store.latest() is None:
        raise UserError(f"{run.path} holds no checkpoint yet: train or import first, with the same --run_dir")
    step = store.metadata(checkpoint)["next_step"]
    state = Program.of(experiment, experiment.mesh.open()).state
    source = run.checkpoints / str(step)
    tree = "ema" if "ema" in state else "params"
    params = load_parameters(source, state["params"], {"": ""}, tree=tree, say=print)
    buffers = state["buffers"]
    if jax.tree.leaves(buffers):
        buffers = load_parameters(source, buffers, {"": ""}, tree="buffers", say=print)
    return checkpoint_tree.flatten(params) | checkpoint_tree.flatten(buffers)


def _merged(trained: Experiment, plain: Experiment, flat: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """{leaf: array} of the merged network. Raises RuntimeError where its logits on a probe are others."""
    model, after, tokens_BT = trained.abstract_model(), plain.abstract_model(), proof.probe(plain.bare())
    state = filled(model.params, flat), filled(model.buffers, flat)
    expected = proof.logits(model.graph, *state, tokens_BT)
    shardings = Program.of(plain, plain.mesh.open()).shardings
    state = jax.device_put(merging.weights(trained, *state), (shardings["params"], shardings["buffers"]))
    worst = float(np.max(np.abs(proof.logits(after.graph, *state, tokens_BT) - expected)))
    if not worst <= 1e-4 * max(1.0, float(np.max(np.abs(expected)))):
        raise RuntimeError(f"the merged network is not the trained one: logits differ by {worst:.3g}")
    print(f"merged what only training needs; the largest difference of a logit is {worst:.3g}")
    return checkpoint_tree.flatten(state[0]) | checkpoint_tree.flatten(state[1])


def _write_config(
    target: pathlib.Path, run: RunDirectory, family: Family, config: dict, experiment: Experiment, dtype: str
) -> None:
    """config.json and the tokenizer's files. What an imported run came with and what changes no number is kept."""
    kept, tokenizer = run.file(KEPT), experiment.data.tokenizer
    inherited = read_json(kept / "config.json") if (kept / "config.json").is_file() else {}
    same_words = not inherited or _tokenizer_of(kept, tokenizer)
    if same_words:
        for name in COMPANIONS:
            if name != "config.json" and (kept / name).is_file():
                shutil.copyfile(kept / name, target / name)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": None}
    if not inherited or not same_words:
        inherited = {}
        _write_tokenizer(target, tokenizer)
    inherited = {key: value for key, value in inherited.items() if key in IRRELEVANT - OF_THE_FILE}
    lengths = {} if family.length_key is None else {family.length_key: experiment.sequence_length}
    body = lengths | ids | config | inherited | {"torch_dtype": dtype}
    (target / "config.json").write_text(json.dumps(body, indent=2) + "\n")


def _tokenizer_of(kept: pathlib.Path, tokenizer: Tokenizer) -> bool:
    """Whether the experiment's tokenizer is the one that was imported with the weights."""
    if not isinstance(tokenizer, HuggingFace | SentencePiece):
        return False
    content = files.expand(tokenizer.path, "tokenizer.path")[0]
    return any(
        (kept / name).is_file() and files.sha256(kept / name) == files.sha256(content)
        for name in ("tokenizer.json", "tokenizer.model")
    )


def _write_tokenizer(target: pathlib.Path, tokenizer: Tokenizer) -> None:
    """The files of a tokenizer that other libraries know; any other is told."""
    if isinstance(tokenizer, HuggingFace):
        shutil.copyfile(files.expand(tokenizer.path, "HuggingFace.path")[0], target / "tokenizer.json")
        names = {"eos_token": tokenizer.eos, "bos_token": tokenizer.eos if tokenizer.bos is None else tokenizer.bos}
        body = {"tokenizer_class": "PreTrainedTokenizerFast"} | names
        (target / "tokenizer_config.json").write_text(json.dumps(body, indent=2) + "\n")
    elif isinstance(tokenizer, SentencePiece):
        shutil.copyfile(files.expand(tokenizer.path, "SentencePiece.path")[0], target / "tokenizer.model")
    else:
        print(f"the tokenizer {type(tokenizer).__name__} has no file that other libraries know: none is written")
