import html.parser
import io
import math

import numpy as np
import pytest
from PIL import Image

from maxlike.report.curves import CURVES, draw
from maxlike.report.records import read, running_mean, series
from maxlike.report.report import final_numbers, write_report
from maxlike.run_dir import RunDirectory
from maxlike.writers import MetricsWriter


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with RunDirectory(tmp_path_factory.mktemp("run")) as directory:
        writer = MetricsWriter(directory)
        noise = np.random.default_rng(0).normal(size=300)
        for step in range(1, 301):
            loss = 3 + 5 * math.exp(-step / 60) + 0.1 * noise[step - 1]
            train = {"loss": loss, "bits_per_byte": loss / 2, "tokens_per_second": 20_000 + 500 * noise[step - 1]}
            train |= {
                "learning_rate": 1e-3 * (1 - step / 300),
                "grad_norm": 40.0 if step == 50 else 1.0,
                "tokens": 2048 * step,
            }
            writer.write(step, "train", train)
            if step % 50 == 0:
                value = 4.0 + abs(step - 200) / 100
                writer.write(step, "validation", {"loss": value, "bits_per_byte": value / 2})
        writer.write(301, "train", {"loss": float("nan")})
        writer.close()
        directory.write_text("config.gin", "model.dim = 128  # <narrow> & quick\n")
        yield directory


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text, self.links = [], "", []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_the_page_holds_everything_and_needs_nothing_else(run):
    write_report(
        run,
        title="quick <start>",
        facts=[("parameters", "1.5 M"), ("data", "<b>Austen</b>")],
        samples=[("It was <i>", "a truth & more")],
        commands=[("Generate text", 'python -m launch --job generate --prompt "It is"')],
    )
    page = Page()
    page.feed(run.report.read_text())
    for text in (
        "quick <start>", "<b>Austen</b>", "It was <i>", "a truth & more", '--prompt "It is"', "<narrow> & quick",
        "validation bits per byte", "2.500", "best, at step 200", "2.000", "training loss, step 300",
    ):  # fmt: skip
        assert text in page.text, text
    assert page.tags.count("img") == len(CURVES)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not {"script", "link", "i"} & set(page.tags)
    for name in ("loss", "bits_per_byte", "throughput", "learning_rate"):
        image = Image.open(run.file(f"{name}.png"))
        assert image.width > 800 and len(image.convert("RGB").getcolors(1 << 24)) > 10


def test_a_run_without_metrics_has_a_report_all_the_same(tmp_path):
    with RunDirectory(tmp_path) as empty:
        write_report(empty, title="empty", facts=[])
        assert "empty" in empty.report.read_text() and "<img" not in empty.report.read_text()


def test_a_half_written_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "split": "train", "loss": 2}\n[]\n{"step": 2, "spl')
    assert read(path) == [{"step": 1, "split": "train", "loss": 2}]


def test_series_are_finite_and_in_order():
    records = [
        {"step": s, "split": "train", "loss": x} for s, x in ((3, 1), (1, 2.5), (2, None), (4, math.inf), (5, True))
    ]
    x, y = series(records, "train", "loss")
    assert x.tolist() == [1, 3] and y.tolist() == [2.5, 1]


def test_running_mean():
    assert running_mean(np.array([1.0, 3.0, 5.0, 7.0]), 2).tolist() == [1, 2, 4, 6]


def test_numbers_of_a_run_that_ended_at_its_best():
    records = [{"step": s, "split": "validation", "loss": x} for s, x in ((1, 3.0), (2, 2.0))]
    assert final_numbers(records) == [("validation loss", "2.0000")]


def test_a_long_run_and_a_single_point_are_drawn():
    many = [{"step": s, "split": "train", "loss": 1 / s} for s in range(1, 20_001)]
    for records in (many, many[:1]):
        assert Image.open(io.BytesIO(draw(CURVES[0], records))).width > 800
