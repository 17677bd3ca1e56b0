"""A small Llama trained by us and by PyTorch with `transformers`: seconds a step and peak memory.

6 layers, 384 wide, 6 heads, 1024 feed-forward, vocabulary 4096, tied; batch 8 x 256, float32, AdamW. Every measurement
is a process of its own, ours and theirs in turn, so that what else the machine does falls on both alike.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
import types

from maxlike import config
from maxlike.bench.record import Quantity, Result, cores
from maxlike.bench.timed import step_seconds
from maxlike.errors import UserError
from maxlike.experiment import Experiment

LAYERS, WIDTH, HEADS, FFN, VOCAB, BATCH, LENGTH = 6, 384, 6, 1024, 4096, 8, 256
SHAPE = (
    f"vocab = {VOCAB}",
    f"dim = {WIDTH}",
    f"stack.Stack.depth = {LAYERS}",
    "stack.Stack.remat = 'none'",
    f"attention.Attention.heads = {HEADS}",
    f"attention.Attention.kv_heads = {HEADS}",
    f"mlp.GatedMLP.width = {FFN}",
    f"experiment.Experiment.batch_size = {BATCH}",
    f"experiment.Experiment.sequence_length = {LENGTH}",
    "step.Step.micro_batches = 1",
    "step.Step.clip_norm = None",
)


def measure(experiment: Experiment, repeats: int, steps: int) -> Result:
    """`repeats` pairs of processes; the experiment that the job was given does not matter here."""
    found: dict[str, list[dict]] = {"maxlike": [], "torch": []}
    for _ in range(repeats):
        for side in found:
            found[side].append(_child(side, steps))
            print(f"  {side}: {found[side][-1]['seconds']:.3f} s a step, {found[side][-1]['bytes'] / 1e9:.2f} GB")
    pairs = list(zip(found["maxlike"], found["torch"]))
    quantities = [
        Quantity("step time, ours / PyTorch", "", [a["seconds"] / b["seconds"] for a, b in pairs], "<= 1.0"),
        Quantity("peak memory, ours / PyTorch", "", [a["bytes"] / b["bytes"] for a, b in pairs], "<= 1.1"),
        Quantity("fastest step, ours / PyTorch", "", [a["least"] / b["least"] for a, b in pairs]),
        Quantity("step, ours", "s", [a["seconds"] for a, _ in pairs]),
        Quantity("step, PyTorch", "s", [b["seconds"] for _, b in pairs]),
        Quantity("peak memory, ours", "GB", [a["bytes"] / 1e9 for a, _ in pairs]),
        Quantity("peak memory, PyTorch", "GB", [b["bytes"] / 1e9 for _, b in pairs]),
    ]
    details = {"torch": found["torch"][0]["version"], "threads": cores(), "steps": steps, "processes": found}
    return Result("torch_llama", "cpu", quantities, details)


def _child(side: str, steps: int) -> dict:
    command = [sys.executable, "-m", "maxlike.bench.torch_llama", side, str(steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the {side} side failed; it needs `pip install -e '.[parity]'`:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def ours(steps: int) -> dict:
    """The whole train step as the training loop calls it, guard and metrics included."""
    experiment = config.load("llama_1b", overlays=["cpu"], bindings=SHAPE)
    return _told(step_seconds(experiment, steps))


def llama_config(transformers: types.ModuleType) -> object:
    """The shape in the words of `transformers`, which only this side imports."""
    return transformers.LlamaConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=FFN,
        vocab_size=VOCAB,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )


def theirs(steps: int) -> dict:
    """The usual training loop of PyTorch on all cores."""
    import torch
    import transformers

    torch.set_num_threads(cores())
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(llama_config(transformers))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, weight_decay=0.1)
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH))
    seconds = []
    for _ in range(steps + 2):
        began = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return _told(seconds[2:]) | {"version": torch.__version__}


def _told(seconds: list[float]) -> dict:
    """The fastest step beside the median: it hardly depends on what else the machine does."""
    return {"seconds": statistics.median(seconds), "least": min(seconds)}


if __name__ == "__main__":
    answer = {"maxlike": ours, "torch": theirs}[sys.argv[1]](int(sys.argv[2]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps(answer | {"bytes": peak * (1 if sys.platform == "darwin" else 1024)}))
