"""Eleven mistakes of the kind that trains on without a word, each planted at one place of the library: the row that
should catch it does, and names the tensor, and the same row is green without it."""

import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import axes, balance, kernels, pipeline, rope, stack
from maxlike import checkpoint, config, program, step
from maxlike.check import check
from maxlike.convert import export_job
from maxlike.data import loader, reader
from maxlike.errors import Failed, UserError

ADAMW = "experiment.Experiment.optimizer = @adamw.AdamW()"  # compiles faster than Muon
DENSE = ("families/transformer", ADAMW)
SPARSE = (
    "families/moe",
    ADAMW,
    "stack.Stack.prefix = ()",
    "moe.MoE.losses = (@balance.LoadBalance,)",
    "balance.LoadBalance.coefficient = 1e-3",
)
DEEP = ("families/linear_attention", ADAMW)  # whose twin of 7 layers makes much of a bit
ROWS = {
    DENSE: ("packed", "accumulation", "placed/fsdp", "resume", "export", "mesh/context"),
    SPARSE: ("balance", "scan"),
    DEEP: ("mesh/pipeline_repeats",),
}


def rows_of(experiment: tuple[str, ...], folder: pathlib.Path, rows: tuple[str, ...]) -> dict:
    name, *bindings = experiment
    return {row.name: row for row in check.run(config.load(name, bindings=bindings), folder, rows)}


@functools.cache
def clean(experiment: tuple[str, ...], folder: pathlib.Path) -> dict:
    folder.mkdir()
    return rows_of(experiment, folder, ROWS[experiment])


def packing_leak(patch):
    """Attention no longer hears of segments."""
    attention = kernels.attention
    patch.setattr(kernels, "attention", lambda *args, **knobs: attention(*args, **knobs | {"segments_BT": None}))


def segment_ids_as_loss_weights(patch):
    """The second document of a row counts twice, the third three times."""
    shift = reader.shift

    def weighted(fields, bytes_per_token):
        batch = shift(fields, bytes_per_token)
        return batch | {"loss_weights": batch["segment_ids"].astype(np.float32)}

    patch.setattr(reader, "shift", weighted)


def aux_loss_lost_in_scan(patch):
    """A loop over layers keeps their metrics and forgets their losses."""
    run = stack.Stack.run_periods

    def forgetful(self, *args):
        x_BTD, aux = run(self, *args)
        if not self._scanned():
            return x_BTD, aux
        return x_BTD, tuple({name: x for name, x in one.items() if name != "loss"} for one in aux)

    patch.setattr(stack.Stack, "run_periods", forgetful)


def unsharded_moments(patch):
    """The optimizer's state is placed without a look at the parameters it mirrors."""
    shardings = program.state_shardings

    def replicated(state, params, names, layout):
        placed = shardings(state, params, names, layout)
        return placed | {"opt": jax.tree.map(lambda _: layout.replicated, placed["opt"])}

    patch.setattr(program, "state_shardings", replicated)


def off_by_one_rope_under_context_parallel(patch):
    """The second device of a row begins to count a token late."""
    rotate = rope.RoPE.__call__

    def late(self, x, positions_BT):
        if axes.mesh_axes("length"):
            positions_BT = positions_BT + (jnp.arange(x.shape[1]) >= x.shape[1] // 2)
        return rotate(self, x, positions_BT)

    patch.setattr(rope.RoPE, "__call__", late)


def double_counted_loss_under_accumulation(patch):
    """The summed gradient is divided by the tokens of one micro-batch."""
    gradients = step.Step._gradients

    def double(self, *args):
        loss, *rest = gradients(self, *args)
        return type(loss)(loss.total, loss.weight / self.micro_batches), *rest

    patch.setattr(step.Step, "_gradients", double)


def micro_batches_summed_in_bfloat16_by_a_pipeline(patch):
    """Each micro-batch's gradient is rounded before it is added."""

    @jax.custom_vjp
    def narrow(p, wide):
        return p

    narrow.defvjp(
        lambda p, wide: (p, None), lambda _, g: (jnp.zeros_like(g), g.astype(jnp.bfloat16).astype(jnp.float32))
    )
    patch.setattr(pipeline, "_sum_widely", narrow)


def wrong_expert_bias_sign(patch):
    """The rule favours those who have most."""
    rule = balance.SignBias.__call__
    patch.setattr(balance.SignBias, "__call__", lambda self, bias, *rest: 2 * bias - rule(self, bias, *rest))


def dropped_last_partial_batch_on_resume(patch):
    """A run that resumes at the end of an epoch skips the batch in which the epoch ends."""
    iterate = loader.Batches.iterate

    def skipping(self, start_step=0, **hosts):
        epochs = [int(epoch) for epoch in (next(iter(self.epochs(s).values())) for s in (start_step, start_step + 1))]
        return iterate(self, start_step + (start_step > 0 and epochs[1] > epochs[0]), **hosts)

    patch.setattr(loader.Batches, "iterate", skipping)


def tied_head_untied_on_export(patch):
    """config.json says that the head has a matrix of its own."""
    describe = export_job.describe

    def untied(net, wanted=None):
        family, body = describe(net, wanted)
        return family, body | {"tie_word_embeddings": False}

    patch.setattr(export_job, "describe", untied)


def dtype_cast_on_restore(patch):
    """Float32 comes back from the disk by way of bfloat16."""
    read = checkpoint.files.read_leaves

    def rounded(*args):
        cast = {path: leaf.astype(jnp.bfloat16).astype(leaf.dtype) for path, leaf in read(*args).items()}
        return cast

    patch.setattr(checkpoint.files, "read_leaves", rounded)


# The bug, the experiment, the row that catches it, what the first tensor that departs is called.
BUGS = [
    (packing_leak, DENSE, "packed", "output: stack/0"),
    (segment_ids_as_loss_weights, DENSE, "packed", "metrics of step 1: loss"),
    (aux_loss_lost_in_scan, SPARSE, "scan", "metrics of step 1: layers/loss (missing here)"),
    (unsharded_moments, DENSE, "placed/fsdp", "opt/"),
    (off_by_one_rope_under_context_parallel, DENSE, "mesh/context", "output: stack/0"),
    (double_counted_loss_under_accumulation, DENSE, "accumulation", "metrics of step 1: grad_norm"),
    (micro_batches_summed_in_bfloat16_by_a_pipeline, DEEP, "mesh/pipeline_repeats", "gradients of step 1: "),
    (wrong_expert_bias_sign, SPARSE, "balance", "router/bias"),
    (dropped_last_partial_batch_on_resume, DENSE, "resume", "batch of step 3: inputs"),
    (tied_head_untied_on_export, DENSE, "export", "network: head/linear/kernel"),
    (dtype_cast_on_restore, DENSE, "resume", "restored: "),
]


# These compile for half a minute each.
SLOW = {
    packing_leak,
    segment_ids_as_loss_weights,
    aux_loss_lost_in_scan,
    double_counted_loss_under_accumulation,
    micro_batches_summed_in_bfloat16_by_a_pipeline,
    wrong_expert_bias_sign,
}


@pytest.mark.parametrize(
    ("bug", "experiment", "row", "tensor"),
    [pytest.param(*bug, id=bug[0].__name__, marks=pytest.mark.large if bug[0] in SLOW else ()) for bug in BUGS],
)
def test_a_planted_bug_is_caught_by_its_row(bug, experiment, row, tensor, tmp_path, tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.getbasetemp() / f"clean-{experiment[0].replace('/', '-')}"
    before = clean(experiment, folder)[row]
    assert before.verdict == "equal", f"without the bug: {before.note}"
    bug(monkeypatch)
    caught = rows_of(experiment, tmp_path, (row,))[row]
    assert caught.verdict == "DEPARTS", caught
    assert tensor in caught.note


def test_the_job_writes_a_table_and_fails_by_a_sentence(tmp_path, monkeypatch, capsys):
    name, *bindings = DENSE
    experiment = config.load(name, bindings=bindings)
    tied_head_untied_on_export(monkeypatch)
    with pytest.raises(Failed, match="1 of 2 rows do not hold: export"):
        check.check(experiment, tmp_path, rows="balance, export")
    rows = {row["row"]: row for row in json.loads((tmp_path / "check" / "table.json").read_text())}
    assert rows["balance"]["verdict"] == "left out" and "selection bias" in rows["balance"]["note"]
    assert rows["export"]["verdict"] == "DEPARTS" and rows["export"]["tolerance"] == 0.0
    assert "head/linear/kernel" in (tmp_path / "check" / "table.txt").read_text()
    printed = capsys.readouterr().out
    assert "DEPARTS" in printed
    assert re.search(r"^2 rows in \d+ s$", printed, re.MULTILINE)


def test_an_unknown_row_is_refused(tmp_path):
    with pytest.raises(UserError, match="'packt': did you mean 'packed'"):
        check.check(config.load(DENSE[0]), tmp_path, rows="packt")
