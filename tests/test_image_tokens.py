"""An image tokenizer from training to documents and back to pictures, through the real loop and files."""

import io
import types

import jax
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from maxlike import catalog, config
from maxlike.data.mixed import TextAndPictures
from maxlike.data.tokenizers import Bytes
from maxlike.decode.generate import Continuation
from maxlike.errors import UserError
from maxlike.image_tokens import NPZ, TrainedImageTokenizer, tokenize_images
from maxlike.picture_hooks import Reconstructions, SamplePictures
from maxlike.program import Program
from maxlike.report.picture_grid import grid, to_uint8
from maxlike.train import train
from tests.tiny import losses

BINDINGS = (
    "width = 16",
    "steps = 4",
    "experiment.Experiment.batch_size = 8",
    "hooks.Validate.every = 4",
    "checkpoint.Checkpoints.every = 4",
    "picture_hooks.Reconstructions.every = 4",
    "pictures.Pictures.paths = 'package:experiments/data/clipart/validation.parquet'",
)
SHIPPED = "package:experiments/data/clipart/tokens"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(run, folder of documents) of a tokenizer trained for four steps."""
    folder = tmp_path_factory.mktemp("images")
    experiment = config.load("image_tokenizer", bindings=BINDINGS)
    validation = train(experiment, folder / "run")
    assert {"loss", "psnr", "perplexity", "codes_used"} <= set(validation)
    tokenize_images(experiment, folder / "run", destination=str(folder / "tokens"), batch_size=50)
    return folder / "run", folder / "tokens"


def test_a_run_shows_what_it_reconstructs(made):
    run, _ = made
    trained = losses(run)
    assert list(trained) == [1, 2, 3, 4] and trained[4] < trained[1]
    with Image.open(run / "reconstructions.png") as picture:
        assert picture.mode == "RGB" and picture.width > 500
    report = (run / "report.html").read_text()
    assert "each above what is decoded from its ids" in report and "--job generate" not in report


def test_documents_spell_the_pictures(made):
    _, folder = made
    tokenizer = TrainedImageTokenizer.load(str(folder))
    texts = pyarrow.parquet.read_table(folder / "validation.parquet")["text"].to_pylist()
    mixed = TextAndPictures(text=Bytes(), codes=tokenizer.vocab, image_tokenizer=tokenizer.fingerprint)
    source = config.load("image_tokenizer", bindings=BINDINGS).data.open(
        "package:experiments/data/clipart/validation.parquet"
    )
    ids = tokenizer.encode(np.stack([source.picture(number, None) for number in range(5)]))
    for text, codes, caption in zip(texts, ids, source.captions):
        encoded = mixed.encode(text)
        np.testing.assert_array_equal(mixed.pictures(encoded)[0], codes)
        assert mixed.decode(encoded).split("<image>") in ([f"{caption}\n", ""], ["", f"\n{caption}"])
    firsts = sum(mixed.decode(mixed.encode(text)).startswith("<image>") for text in texts)
    assert 40 < firsts < 86, "the picture comes first in about half of 126"


def test_a_changed_number_changes_the_fingerprint(made, tmp_path):
    _, folder = made
    before = TrainedImageTokenizer.load(str(folder)).fingerprint
    for name in ("image_tokenizer.gin", NPZ):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with np.load(tmp_path / NPZ, allow_pickle=False) as saved:
        params = dict(saved)
    params["params/encoder/code/bias"] = params["params/encoder/code/bias"] + np.float32(1e-6)
    np.savez(tmp_path / NPZ, **params)
    assert TrainedImageTokenizer.load(str(tmp_path)).fingerprint != before
    np.savez(tmp_path / NPZ, **{name: x for name, x in params.items() if "bias" not in name})
    with pytest.raises(UserError, match="does not fit"):
        TrainedImageTokenizer.load(str(tmp_path))
    (tmp_path / NPZ).write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(UserError, match="damaged"):
        TrainedImageTokenizer.load(str(tmp_path))
    (tmp_path / NPZ).unlink()
    with pytest.raises(UserError, match=r"holds no image_tokenizer\.npz"):
        TrainedImageTokenizer.load(str(tmp_path))


def test_the_shipped_documents_are_the_shipped_tokenizers():
    experiment = config.load("families/moma")
    tokenizer = TrainedImageTokenizer.load(SHIPPED)
    mixed = experiment.data.tokenizer
    assert mixed.image_tokenizer == tokenizer.fingerprint and mixed.codes == tokenizer.vocab
    assert mixed.vocab_size == experiment.bare().vocab
    assert experiment.bare().modality_starts == (mixed.first_code_id,)
    source = config.load("image_tokenizer").data.open("package:experiments/data/clipart/validation.parquet")
    pictures = np.stack([source.picture(number, None) for number in range(16)])
    decoded = tokenizer.decode(tokenizer.encode(pictures))
    error = np.mean((decoded.astype(np.float32) - pictures) ** 2) / 127.5**2
    assert error < 0.08
    texts = pyarrow.parquet.read_table(experiment.data.validation["pictures"].files()[0])["text"].to_pylist()
    spelled = np.stack([mixed.pictures(mixed.encode(text))[0] for text in texts[:16]])
    assert np.mean(spelled == tokenizer.encode(pictures)) > 0.999  # another machine may round a few the other way
    with pytest.raises(UserError, match="rows of 64 ids below 1000"):
        tokenizer.decode(np.full((1, 64), 1000))
    with pytest.raises(UserError, match="rows of 64 ids"):
        tokenizer.decode(np.zeros((1, 63), int))


def test_sampled_pictures_are_drawn(tmp_path):
    experiment = config.load("families/moma")
    said = []
    training = types.SimpleNamespace(
        experiment=experiment,
        program=types.SimpleNamespace(model=experiment.abstract_model(), trained=lambda state: state["params"]),
        run=types.SimpleNamespace(file=lambda name: tmp_path / name),
        log=types.SimpleNamespace(flush=lambda: None, say=said.append),
    )
    hook = SamplePictures(image_tokenizer=SHIPPED, captions=("cat", "dog"), count=2, every=10)
    hook.open(training)
    first = experiment.data.tokenizer.first_code_id
    whole, short = np.arange(64) + first, np.array([first, first, 5, *[first] * 61])
    prompts = []

    def generate(params, texts, **knobs):
        prompts.extend(texts)
        return [Continuation("", tokens, tokens, tokens, "length") for tokens in (whole, short, whole, whole)]

    hook.generator = types.SimpleNamespace(continuations=generate)
    hook(9, {"params": {}, "buffers": {}}, {})
    assert not prompts
    hook(10, {"params": {}, "buffers": {}}, {})
    assert said == ["step 10: 1 of 4 pictures are not whole"]
    assert [experiment.data.tokenizer.decode(experiment.data.tokenizer.encode(text)) for text in prompts] == [
        "cat\n<image>", "cat\n<image>", "dog\n<image>", "dog\n<image>",
    ]  # fmt: skip
    with Image.open(tmp_path / "samples.png") as picture:
        sheet = np.asarray(picture)
    scale = sheet.shape[0] // (2 * 34 + 2)
    second = sheet[2 * scale : 34 * scale, 36 * scale : 68 * scale]
    assert (second == 255).all() and not (sheet[2 * scale : 34 * scale, 2 * scale : 34 * scale] == 255).all()


def test_a_grid_keeps_the_pixels():
    rows = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 5, 3), np.uint8)
    with Image.open(io.BytesIO(grid(list(rows)))) as picture:
        sheet = np.asarray(picture)
    scale = sheet.shape[1] // (3 * 7 + 2)
    np.testing.assert_array_equal(sheet[::scale, ::scale][9:14, 16:21], rows[1, 2])
    np.testing.assert_array_equal(to_uint8(np.array([-2.0, -1.0, 0.0, 1.0, 3.0])), [0, 0, 128, 255, 255])


def test_refuses(made, tmp_path):
    run, _ = made
    with pytest.raises(UserError, match="data are Pictures"):
        tokenize_images(config.load("quickstart"), run, destination=str(tmp_path))
    with pytest.raises(UserError, match="Reconstructions"):
        Reconstructions(every=0)
    with pytest.raises(UserError, match="captions"):
        SamplePictures(image_tokenizer=SHIPPED, captions=())
    with pytest.raises(UserError, match="smaller than"):
        train(config.load("image_tokenizer", bindings=[*BINDINGS, "pictures.Pictures.size = 40"]), tmp_path / "run")


def with_quantizer(folder, name: str, *bindings: str) -> str:
    """The experiment image_tokenizer with another quantizer of codebooks.py, as a file."""
    text = catalog.find("experiment", "image_tokenizer").read_text()
    text = text.replace("from layers import quantizers", "from layers import codebooks")
    text = text.replace("@quantizers.FSQ", f"@codebooks.{name}")
    text = text.replace("quantizers.FSQ.levels = (8, 5, 5, 5)", "\n".join(f"codebooks.{name}.{b}" for b in bindings))
    (folder / f"{name}.gin").write_text(text)
    return str(folder / f"{name}.gin")


@pytest.mark.large
def test_a_plain_codebook_collapses_and_running_means_do_not(tmp_path):
    small = ["steps = 120", "width = 32", "experiment.Experiment.batch_size = 16"]
    used = {}
    for name, knobs in (("VQ", ("std = 0.004",)), ("VQEMA", ("restart_every = 20", "restart_until = 100"))):
        experiment = config.load(with_quantizer(tmp_path, name, "size = 256", "dim = 8", *knobs), bindings=small)
        program = Program.of(experiment, experiment.mesh.open())
        batches = experiment.data.train(sequence_length=64, batch_size=16, seed=0)
        step, state, allow = (
            program.lower_step(batches.batch(0)).compile(),
            program.init(),
            jax.device_put(np.bool_(True)),
        )
        for k in range(120):
            state, _ = step(state, program.put(batches.batch(k)), allow)
        used[name] = program.evaluate(state, experiment.open_validation())
    # of 256 codes, on 1,024 patches a batch
    assert used["VQ"]["codes_used"] < 26 and used["VQEMA"]["codes_used"] > 100
    assert used["VQEMA"]["loss"] < used["VQ"]["loss"]


@pytest.mark.large
def test_a_running_codebook_is_the_same_on_eight_devices(tmp_path):
    path = with_quantizer(tmp_path, "VQEMA", "size = 32", "dim = 4")
    seen = {}
    for mesh in ("mesh/single", "mesh/fsdp"):
        small = ["steps = 3", "width = 16", "experiment.Experiment.batch_size = 8", "codebooks.VQEMA.restart_every = 1"]
        experiment = config.load(path, overlays=[mesh], bindings=small)
        program = Program.of(experiment, experiment.mesh.open())
        batches = experiment.data.train(sequence_length=64, batch_size=8, seed=0)
        step, state = program.lower_step(batches.batch(0)).compile(), program.init()
        before = np.asarray(state["buffers"]["quantizer"]["state"])
        for k in range(3):
            state, metrics = step(state, program.put(batches.batch(k)), jax.device_put(np.bool_(True)))
        seen[mesh] = np.asarray(state["buffers"]["quantizer"]["state"]), float(metrics["loss"])
    (one, loss), (eight, same_loss) = seen.values()
    np.testing.assert_allclose(eight, one, rtol=1e-4, atol=1e-4)
    assert same_loss == pytest.approx(loss, rel=1e-4)
    assert not np.allclose(one[:, :4], before[:, :4]) and (one[:, -1] == 3).all(), "the codes moved, once a step"
