"""`--job generate`: continue prompts with a trained model."""

import pathlib

from maxlike.decode.generate import Generator
from maxlike.decode.sampling import Sampling
from maxlike.experiment import Experiment
from maxlike.restore import restore


def generate(
    experiment: Experiment,
    run_dir: pathlib.Path,
    *,
    prompt: tuple[str, ...] = ("",),
    max_new: int = 128,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: tuple[str, ...] = (),
    seed: int = 0,
    checkpoint: int | None = None,
) -> list[str]:
    """Prints each prompt with its continuation. Prompt and continuation together fit the experiment's sequence_length.

    prompt, stop: repeatable; a stop string ends the text. max_new: tokens at most. temperature 0 is greedy; top_k,
    top_p, min_p, repetition_penalty: see maxlike.decode.sampling. seed: of the noise. checkpoint: the step to use; by
    default the newest.
    """
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    program, state, _ = restore(experiment, run_dir, checkpoint)
    generator = Generator(program.model.graph, experiment.data.tokenizer, max_length=experiment.sequence_length)
    texts = generator(
        program.trained(state), prompt, buffers=state["buffers"], max_new=max_new, sampling=sampling, stop=stop
    )
    for start, text in zip(prompt, texts):
        print(f"{start}{text}\n")
    return texts
