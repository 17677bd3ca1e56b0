import dataclasses
import io
import re

import pytest

from maxlike.console import Console, Start, cache_words, duration, quantity
from maxlike.decode.cache_size import CacheSize

START = Start(
    parameters=1_234_567_890,
    active=345_600_000,
    flops_per_token=7.4e9,
    mesh={"data": 1, "fsdp": 4, "tensor": 2},
    batch_tokens=524_288,
    memory=61.2e9,
    device_kind="NVIDIA H200",
    devices=8,
    idle=0,
    cache=CacheSize(a_token=3072.0, state=65_536.0),
    kernels=(("attention", "cudnn", "fastest here"), ("layers", "scan", "[not markup]")),
    sources=(("web", 1_200_000_000, 0.8), ("books", 30_000_000, 0.2)),
)
VALUES = {"loss": 2.34567, "bits_per_byte": 1.0, "tokens_per_second": 51234.0, "mfu": 0.4321, "input_wait": 0.004}


def test_devices_that_the_mesh_leaves_out_are_said():
    def shown(start):
        out = io.StringIO()
        Console(steps=1, file=out).start(start)
        return " ".join(out.getvalue().split())

    assert "idle" not in shown(START)
    alone = dataclasses.replace(START, mesh={"fsdp": 4}, devices=4, idle=4)
    assert "4 of 8 devices idle: `--overlay mesh/fsdp` uses all" in shown(alone)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_start_table_says_everything():
    file = io.StringIO()
    with Console(steps=10, file=file) as console:
        console.start(START)
    text = re.sub(r"\s+", " ", file.getvalue())
    for part in (
        "1.23 G, 346 M active for a token",
        "7.40 GFLOPs a token",
        "6N + attention, causal halved",
        "fsdp 4 x tensor 2 on 8 x NVIDIA H200 (peak 989 TFLOP/s each)",
        "524 k tokens a step",
        "61.2 GB a device, predicted",
        "cache 3.07 kB a token and 65.5 kB of state a row",
        "kernels attention: cudnn (fastest here)",
        "layers: scan ([not markup])",
        "data web: 1.20 G tokens, 80 % of the mixture",
        "books: 30 M tokens, 20 % of the mixture",
    ):
        assert part in text, text
    assert "data 1 " not in text


def test_a_network_without_a_cache_says_why():
    assert cache_words(CacheSize(refusal="only causal attention decodes")) == "none: only causal attention decodes"


def test_a_log_gets_a_plain_line_every_few_seconds_and_the_last_one():
    file, clock = io.StringIO(), Clock()
    with Console(steps=1000, file=file, plain=10.0, clock=clock) as console:
        for step in range(1, 1001):
            console.update(step, VALUES | {"loss": float(step)})
            if step == 500:
                console.say("something happened " * 20)
            clock.now += 0.125
    assert "\x1b" not in file.getvalue() and "\r" not in file.getvalue()
    lines = file.getvalue().splitlines()
    assert len([line for line in lines if line.startswith("something happened")]) == 1
    lines = [line for line in lines if line.startswith("step")]
    assert [line.split()[1] for line in lines] == [f"{step:,}/1,000" for step in (*range(1, 1000, 80), 1000)]
    assert lines[1] == (
        "step 81/1,000  loss 81.0000  1.000 bits/byte  51.2 k tokens/s  MFU 43.2 %  input wait 0.4 %  ETA 1 min 55 s"
    )
    assert "ETA" not in lines[-1]


def test_what_is_not_known_is_not_shown():
    file = io.StringIO()
    console = Console(steps=9, file=file)
    console.update(9, {"loss": 1.0, "mfu": None})
    assert file.getvalue() == "step 9/9  loss 1.0000\n"


def test_a_terminal_gets_one_live_line_and_sentences_stay_above_it(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    with Console(steps=100, file=file, redraw=1000.0) as console:
        console.update(1, VALUES)
        console.say("something happened")
        for step in range(2, 51):
            console.update(step, VALUES)
    shown = file.getvalue()
    assert "something happened" in shown
    assert shown.count("step ") <= 4  # the first, around the sentence, the last: not one a step
    assert "step 50/100" in shown.rpartition("something happened")[2]


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (0, "0"),
        (999, "999"),
        (999.6, "1.00 k"),
        (1000, "1 k"),
        (1234, "1.23 k"),
        (45_678, "45.7 k"),
        (1e9, "1 G"),
        (0.5, "0.50"),
    ],
)
def test_quantity(x, text):
    assert quantity(x) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (3599, "59 min 59 s"), (7500, "2 h 05 min"), (273_600, "3 d 4 h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
