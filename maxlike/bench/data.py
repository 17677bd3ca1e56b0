"""Megabytes of text a second and core into token and row layers; tokens a second and core out of rows."""

import collections
import json
import pathlib
import tempfile
import time

from maxlike.bench.record import Quantity, Result, cores
from maxlike.data.data import Data
from maxlike.data.sources import Jsonl
from maxlike.experiment import Experiment

TEXT_BYTES = 24_000_000
DOCUMENT_LETTERS = 4000
READ_SECONDS = 2.0  # at least so long are batches read


def measure(experiment: Experiment, repeats: int, steps: int) -> Result:
    """The experiment's own documents, repeated up to 24 MB in pieces of 4000 letters, with its tokenizer and packing.

    A core's second is a second of processor time of all threads of the process, so the rates are a core's whatever
    the machine has, and what else it does matters little.
    """
    build, load, load_elapsed = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        _write_documents(experiment, pathlib.Path(folder) / "documents.jsonl")
        for repeat in range(repeats):
            data = Data(
                sources=Jsonl(paths=str(pathlib.Path(folder) / "documents.jsonl")),
                tokenizer=experiment.data.tokenizer,
                packing=experiment.data.packing,
                cache=str(pathlib.Path(folder) / f"cache{repeat}"),
            )
            began = time.process_time()
            layers = data.layers("train", data.sources["train"], experiment.sequence_length)
            build.append(layers.tokens.bytes / 1e6 / (time.process_time() - began))
            rate, elapsed = _load(data, experiment, steps)
            load.append(rate)
            load_elapsed.append(elapsed)
    quantities = [
        Quantity("token and row layers", "MB of text/s a core", build, ">= 1.0"),
        Quantity("batches from rows", "tokens/s a core", load, ">= 3000000"),
        Quantity("batches from rows, elapsed", "tokens/s", load_elapsed),
    ]
    details = {"text_bytes": layers.tokens.bytes, "cores": cores(), "packing": experiment.data.packing, "workers": 0}
    return Result("data", "cpu", quantities, details)


def _write_documents(experiment: Experiment, path: pathlib.Path) -> None:
    text = "\n\n".join(_texts(experiment))
    written, place = 0, 0
    with open(path, "w", encoding="utf-8") as file:
        while written < TEXT_BYTES:
            piece = text[place : place + DOCUMENT_LETTERS]
            place = 0 if place + DOCUMENT_LETTERS >= len(text) else place + DOCUMENT_LETTERS
            file.write(json.dumps({"text": piece}) + "\n")
            written += len(piece.encode())


def _texts(experiment: Experiment) -> list[str]:
    """Documents of the experiment, as many as are needed."""
    texts, size = [], 0
    for source in experiment.data.sources.values():
        for part in range(len(source.parts())):
            for _, text in source.read(part, collections.Counter()):
                texts.append(text)
                size += len(text)
                if size >= TEXT_BYTES:
                    return texts
    return texts


def _load(data: Data, experiment: Experiment, steps: int) -> tuple[float, float]:
    """Tokens a second of processor time and of elapsed time."""
    batches = data.train(
        sequence_length=experiment.sequence_length, batch_size=experiment.batch_size, seed=experiment.seed
    )
    with batches.iterate(0) as reader:
        for _ in range(8):
            next(reader)
        count, began, elapsed = 0, time.process_time(), time.perf_counter()
        while count < steps or time.perf_counter() - elapsed < READ_SECONDS:
            count += next(reader)["inputs"].shape[0] > 0
        spent, elapsed = time.process_time() - began, time.perf_counter() - elapsed
    tokens = count * experiment.clock.tokens_per_step
    return tokens / spent, tokens / elapsed
