"""`--job import`: a checkpoint of another library becomes step 0 of a run."""

import inspect
import pathlib
import shutil
import time

import jax
import jax.numpy as jnp
from flax import nnx

from layers.axes import Buffer
from maxlike import checkpoint_tree, passport
from maxlike.convert import ahead, families, transfer
from maxlike.convert.pretrained import COMPANIONS, Pretrained, directory
from maxlike.convert.structure import Structure, difference, of
from maxlike.convert.tensor_files import TensorFiles, without
from maxlike.errors import UserError
from maxlike.experiment import Experiment
from maxlike.program import Program
from maxlike.revision import revision
from maxlike.run_dir import RunDirectory

KEPT = "pretrained"  # folder of a run with the files that came beside the weights


def import_weights(experiment: Experiment, run_dir: pathlib.Path, *, source: str | None = None) -> None:
    """Writes a checkpoint at step 0 of the run with the weights in `source`; generate, evaluate, train and export go on
    from it, and `warm_start.WarmStart` takes it into another experiment.

    source: a directory with config.json and *.safetensors, such as `save_pretrained` writes; by default the one that
    the experiment's model was read from (`--overlay pretrained`). Any experiment will do whose model computes what
    config.json describes; where it does not, the settings that differ are printed by name.
    """
    model = inspect.unwrap(experiment.model)
    source = model.source if source is None and isinstance(model, Pretrained) else source
    if source is None:
        raise UserError("which checkpoint? give --source DIR with config.json and *.safetensors")
    where, began = directory(source), time.monotonic()
    net = Structure(experiment.bare())
    family, factory, _ = families.read(where, mtp=ahead.count(net) > 0)
    table = difference(of(factory), net, ("config.json", "experiment"))
    if table:
        raise UserError(
            f"the experiment's model is not the network that {where / 'config.json'} describes: change these knobs, "
            f"or take its model from there with --overlay pretrained --set \"source='{source}'\"\n{table}"
        )
    files = TensorFiles(where)
    mode = "own" if jax.process_index() == 0 else "join"
    with RunDirectory(run_dir, mode=mode) as run:
        program = Program.of(experiment, experiment.mesh.open())
        store = experiment.checkpoints.open(run.checkpoints, say=print)
        if store.latest() is not None:
            raise UserError(f"{run.path} has checkpoints already: import into another --run_dir")
        state = _state(program, transfer.load(files, family, net, _leaves(program)))
        metadata = {
            "next_step": 0,
            "fingerprints": {"tokenizer": experiment.data.tokenizer.fingerprint},
            "config": experiment.config.operative if experiment.config else "",
            "code": revision(),
            "dropped": [],
            "passport": passport.imported(where, family.architectures[0], revision()),
        }
        store.save(0, state, metadata)
        store.close()
        if store.failures:
            raise UserError(f"the checkpoint could not be written to {run.path}: free some space and import again")
        if mode == "own":
            _keep(where, run)
            if experiment.config is not None:
                run.write_text("config.gin", experiment.config.text())
        left = sorted(set(files.leaves) - set(without(files.leaves, family.unused(net))))
        if left:
            print(f"no part of the network, left behind: {', '.join(left[:8])}{' ...' if len(left) > 8 else ''}")
    numbers = sum(leaf.size for leaf in jax.tree.leaves(program.model.params))
    print(
        f"{numbers:,} parameters ({family.architectures[0]}) from {where} are step 0 of {run.path} "
        f"after {time.monotonic() - began:.1f} s"
    )


def _leaves(program: Program) -> dict:
    """{leaf: abstract array} of parameters and buffers."""
    return checkpoint_tree.flatten(program.state["params"]) | checkpoint_tree.flatten(program.state["buffers"])


def _state(program: Program, loaded: dict[str, jax.Array]) -> dict:
    """The train state of step 0 with the loaded numbers; a buffer that the files do not know keeps its first value."""
    experiment, abstract, shardings = program.experiment, program.state, program.shardings

    def initial(seed: jax.Array) -> dict:
        network = experiment.network(rngs=nnx.Rngs(params=jax.random.key(seed)))
        return nnx.to_pure_dict(nnx.split(network, nnx.Param, Buffer)[2])

    def begin(params: dict, buffers: dict, seed: jax.Array) -> dict:
        return experiment.step.init(params, buffers, program.optimizer, seed)

    seed = jnp.asarray(experiment.seed, jnp.uint32)
    params = filled(abstract["params"], loaded)
    buffers = abstract["buffers"]
    if jax.tree.leaves(buffers):
        buffers = jax.jit(initial, out_shardings=shardings["buffers"])(seed)
        buffers = filled(buffers, {**checkpoint_tree.flatten(buffers), **loaded})
    return jax.jit(begin, donate_argnums=(0, 1), out_shardings=shardings)(params, buffers, seed)


def filled(tree: dict, leaves: dict[str, jax.Array]) -> dict:
    """`tree` with the arrays of these paths."""
    flat = checkpoint_tree.flatten(tree)
    return jax.tree.unflatten(jax.tree.structure(tree), [leaves[path] for path in flat])


def _keep(where: pathlib.Path, run: RunDirectory) -> None:
    """config.json and the tokenizer's files go along, for an export."""
    kept = run.file(KEPT)
    kept.mkdir(exist_ok=True)
    for name in COMPANIONS:
        if (where / name).is_file():
            shutil.copyfile(where / name, kept / name)
