"""What a layer, a rule or a mesh can only refuse when a step is traced reaches the user as one sentence too."""

import dataclasses
import sys

import pytest

from launch import __main__ as command
from launch import environment
from layers import remat
from maxlike.objectives import next_token
from tests import tiny

HEADER = """# A mistake.
from __gin__ import dynamic_registration
from layers import attention
from layers import block
from layers import dual_chunk
from layers import encoder_decoder
from layers import language_model
from layers import low_precision
from layers import mamba2
from layers import modality_moe
from layers import norm
from layers import pipeline
from layers import relative_attention
from layers import rope
from layers import stack
from maxlike import experiment
from maxlike import one_f_one_b
from maxlike import step

include 'quickstart.gin'
"""
MOMA = """
block.Block.ffn = @modality_moe.ModalityMoE
modality_moe.ModalityMoE.groups = (2, 2)
modality_moe.ModalityMoE.width = 8
"""
RELATIVE = """
block.Block.mixer = @relative_attention.RelativeAttention
relative_attention.RelativeAttention.heads = 2
relative_attention.RelativeAttention.bias = @own/relative_attention.RelativeBias
own/relative_attention.RelativeBias.heads = 2
own/relative_attention.RelativeBias.bidirectional = False
"""
MAMBA = """
block.Block.mixer = @mamba2.Mamba2
mamba2.Mamba2.head_dim = 8
mamba2.Mamba2.state = 8
"""
DUAL_CHUNK = """
block.Block.mixer = @dual_chunk.DualChunk
dual_chunk.DualChunk.heads = 2
dual_chunk.DualChunk.chunk = 8
dual_chunk.DualChunk.local = 4
dual_chunk.DualChunk.trained_length = 32
dual_chunk.DualChunk.rope = @rope.RoPE
"""
T5 = """
experiment.Experiment.model = @encoder_decoder.EncoderDecoder
encoder_decoder.EncoderDecoder.vocab = %vocab
encoder_decoder.EncoderDecoder.dim = %dim
encoder_decoder.EncoderDecoder.encoder = @stack.Stack
encoder_decoder.EncoderDecoder.decoder = @stack.Stack
encoder_decoder.EncoderDecoder.norm = @norm.RMSNorm
"""
FLOAT8 = "experiment.Experiment.products = @low_precision.Float8()"


@pytest.fixture
def train(monkeypatch, tmp_path, capsys):
    """`python -m launch` on a gin text over a tiny quickstart, in this process: (exit code, what stderr says)."""
    monkeypatch.setattr(environment, "prepare", lambda *given: None)

    def run(text, overlay, bindings):
        (tmp_path / "mine.gin").write_text(f"{HEADER}{text}\n")
        put_on = [] if overlay is None else ["--overlay", overlay]
        arguments = ["--experiment", str(tmp_path / "mine.gin"), *put_on, "--run_dir", str(tmp_path / "run")]
        monkeypatch.setattr(sys, "argv", ["launch", *arguments, *tiny.flags(*bindings)])
        return command.main(), capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("text", "overlay", "bindings", "message"),
    [
        (RELATIVE, "mesh/context", [], "mixer=RelativeAttention cannot work on rows cut over the mesh axis context"),
        (MAMBA, "mesh/context", ["experiment.Experiment.sequence_length = 16"], "ShortConv.width=4 reaches over more"),
        ("", "mesh/pipeline", ["stack.Stack.pipeline = None"], "Stack.pipeline=None on a mesh whose axes"),
        ("", "mesh/pipeline_repeats", [], "Circular.repeats=3: Stack.depth must be a multiple of 6"),
        ("", "mesh/pipeline", ["micro_batches = 3"], "Circular.micro_batches=3 does not divide the 8 rows"),
        ("", "mesh/pipeline_1f1b", ["sharding.Mesh.shape = {'fsdp': 8}"], "OneFOneB needs stages"),
        (FLOAT8, None, ["low_precision.Float8.smallest = 16"], "set Float8.emulate=True"),
        ("", "mesh/fsdp_tp", ["experiment.Experiment.sequence_length = 27"], "Experiment.sequence_length"),
        (
            "",
            "mesh/context",
            ["experiment.Experiment.sequence_length = 30"],
            "the batch: its dimension 'length' of size 30 does not divide over context=8; change Experiment.sequence_l",
        ),
        (
            "",
            "mesh/fsdp",
            ["step.Step.micro_batches = 2"],
            "a micro-batch of 4 rows (Experiment.batch_size / Step.micro_batches) does not divide over the 8 devices",
        ),
        (MOMA, None, [], "tokens have no modality ids: set LanguageModel.modality_starts"),
        (
            MOMA,
            None,
            ["language_model.LanguageModel.modality_starts = (2000,)", "modality_moe.ModalityMoE.routing_scope = 3"],
            "ModalityMoE.routing_scope=3 does not divide a batch of 8 rows",
        ),
        (T5, None, [], "plain text have none: give the batch the fields `sources`, `source_p"),
    ],
)
def test_what_is_refused_while_a_step_is_traced_is_one_sentence(train, text, overlay, bindings, message):
    code, error = train(text, overlay, bindings)
    assert code == 2, error
    assert message in error and error.startswith("maxlike: ") and "Traceback" not in error


def test_offloading_without_host_memory_is_one_sentence(train, monkeypatch):
    monkeypatch.setattr(remat, "host_memories", lambda device: ("device",))
    code, error = train("", None, ["stack.Stack.remat = 'offload'"])
    assert code == 2 and error.startswith("maxlike: Stack.remat='offload' needs ")


def test_a_prefix_that_a_mixer_cannot_see_is_one_sentence(train, monkeypatch):
    plain = next_token.context_of

    def with_prefix(batch, key):
        return plain(batch | {"prefix": batch["positions"] < 3}, key)

    monkeypatch.setattr(next_token, "context_of", with_prefix)
    code, error = train(DUAL_CHUNK, None, [])
    assert code == 2 and error.startswith("maxlike: DualChunk has no distance for a prefix")


def test_an_error_of_a_library_keeps_its_traceback(train, monkeypatch):
    def broken(batch, key):
        return dataclasses.replace(plain(batch, key), positions_BT=batch["positions"][:, :3])

    plain = next_token.context_of
    monkeypatch.setattr(next_token, "context_of", broken)
    with pytest.raises((ValueError, TypeError), match="shape"):
        train("", None, [])
