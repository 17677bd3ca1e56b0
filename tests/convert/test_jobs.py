"""`--job import` and `--job export` as a user runs them."""

import json
import sys

import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from launch import __main__ as command
from launch import environment
from maxlike import config
from maxlike.convert import pretrained
from maxlike.data.tokenizers import HuggingFace
from maxlike.errors import UserError
from tests import tiny
from tests.reference import checkpoint

WITHOUT = ["experiment.Experiment.hooks = ()", "experiment.Experiment.batch_size = 8", "steps = 2"]


@pytest.fixture
def main(monkeypatch, capsys):
    """The command line in this process: (exit code, what it printed)."""
    monkeypatch.setattr(environment, "prepare", lambda *_: None)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["launch", "--experiment", "quickstart", *map(str, arguments)])
        code = command.main()
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


@pytest.mark.large
def test_import_train_export(main, tmp_path):
    """The weights come back bit for bit, with their tokenizer and what config.json said besides; training starts from
    them."""
    source, run = checkpoint.write(tmp_path / "theirs"), tmp_path / "run"
    flags = [*tiny.flags("steps = 1"), "--run_dir", run]
    code, said = main(*flags, "--job", "import", "--source", source)
    assert code == 0 and "Qwen3ForCausalLM" in said and "step 0" in said
    code, said = main(*flags, "--job", "import", "--source", source)
    assert code == 2 and "has checkpoints already" in said

    code, said = main(*flags)
    assert code == 0 and "resuming" in said
    code, said = main(*flags, "--job", "export", "--destination", tmp_path / "ours", "--checkpoint", 0)
    assert code == 0 and "exactly the model's" in said
    written = safetensors.numpy.load_file(tmp_path / "ours/model.safetensors")
    assert written.keys() == checkpoint.tensors().keys()
    for name, value in checkpoint.tensors().items():
        np.testing.assert_array_equal(written[name], value)
    kept = json.loads((tmp_path / "ours/config.json").read_text())
    assert {key: kept[key] for key in checkpoint.CONFIG} == checkpoint.CONFIG  # its length of 77 too
    assert (tmp_path / "ours/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()

    code, said = main(*flags, "--job", "export", "--destination", tmp_path / "half", "--dtype", "bfloat16")
    assert code == 0 and "in bfloat16; against float32 the largest difference is" in said
    trained = safetensors.numpy.load_file(tmp_path / "half/model.safetensors")
    assert str(trained["model.norm.weight"].dtype) == "bfloat16"
    assert np.any(trained["model.embed_tokens.weight"].astype(np.float32) != written["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "bfloat16"
    code, said = main(*flags, "--job", "export", "--destination", tmp_path / "half")
    assert code == 2 and "exists" in said
    assert not list(tmp_path.glob("*.partial"))


def test_an_experiment_of_another_network_is_refused_with_its_knobs(main, tmp_path):
    source = checkpoint.write(tmp_path / "theirs")
    wrong = ["norm.RMSNorm.eps = 1e-3", "attention.Attention.window = 4"]
    code, said = main(*tiny.flags(*wrong), "--run_dir", tmp_path / "run", "--job", "import", "--source", source)
    assert code == 2 and "Attention.window" in said and "RMSNorm.eps" in said and "--overlay pretrained" in said
    assert not (tmp_path / "run").exists()


def test_the_overlay_takes_model_and_tokenizer_from_the_directory(main, tmp_path):
    source = checkpoint.write(tmp_path / "theirs", num_hidden_layers=1, weights=checkpoint.tensors(
        checkpoint.CONFIG | {"num_hidden_layers": 1}
    ))  # fmt: skip
    bindings = [f"source = '{source}'", "experiment.Experiment.optimizer = @adamw.AdamW()", *WITHOUT]
    experiment = config.load("quickstart", overlays=["pretrained"], bindings=bindings)
    assert experiment.bare().stack.repeats == 1 and experiment.bare().dim == 16
    assert experiment.data.tokenizer.path == f"{source}/tokenizer.json"
    flags = [
        "--overlay",
        "pretrained",
        *(word for b in bindings for word in ("--set", b)),
        "--run_dir",
        tmp_path / "run",
    ]
    assert main(*flags, "--job", "import")[0] == 0
    code, said = main(*flags, "--job", "generate", "--prompt", "Emma", "--max_new", 2)
    assert code == 0 and said.startswith("Emma")
    code, said = main(*tiny.flags(), "--run_dir", tmp_path / "other", "--job", "import")
    assert code == 2 and "--source DIR" in said


def test_the_tokenizer_of_a_directory(tmp_path):
    source = checkpoint.write(tmp_path / "a")
    found = pretrained.tokenizer(source=str(source))
    assert isinstance(found, HuggingFace) and found.eos == "<|endoftext|>" and found.bos is None
    (source / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<|endoftext|>"}}))
    with pytest.raises(UserError, match="does not say which token ends a text"):
        pretrained.tokenizer(source=str(source))
    (source / "config.json").write_text(json.dumps(checkpoint.CONFIG | {"eos_token_id": [found.eos_id]}))
    again = pretrained.tokenizer(source=str(source))
    assert (again.eos, again.bos) == ("<|endoftext|>", "<|endoftext|>")
    assert not again.opens_prompts  # the file puts nothing in front of a text
    model = tokenizers.Tokenizer.from_file(again.path)
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", again.bos_id)]
    )
    model.save(again.path)
    assert pretrained.tokenizer(source=str(source)).opens_prompts
    (source / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        pretrained.tokenizer(source=str(source))
