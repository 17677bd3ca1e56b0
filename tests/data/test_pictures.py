"""Pictures as data: a batch depends on (seed, step) alone, hosts share it, the last validation batch is filled up."""

import io

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from maxlike.data.pictures import Pictures
from maxlike.errors import UserError

COUNT = 10


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (COUNT, 6, 6, 3), np.uint8)


@pytest.fixture
def path(tmp_path, images):
    rows = {"image": [png(image) for image in images], "caption": [f"picture {i}" for i in range(COUNT)]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "p.parquet")
    return str(tmp_path / "p.parquet")


def train(path, **knobs):
    return Pictures(**({"paths": path, "size": 6} | knobs)).train(sequence_length=9, batch_size=5, seed=3)


def test_an_epoch_has_every_picture_once(path, images):
    batches = train(path)
    seen = np.concatenate([batches.batch(0)["pictures"], batches.batch(1)["pictures"]])
    assert sorted(map(bytes, seen)) == sorted(map(bytes, images))
    assert not np.array_equal(seen, np.concatenate([batches.batch(2)["pictures"], batches.batch(3)["pictures"]]))
    assert batches.text(0) == [f"picture {piece.document.split(':')[1]}" for piece in batches.documents(0)]
    np.testing.assert_array_equal(images[int(batches.text(1)[2].split()[1])], batches.batch(1)["pictures"][2])


def test_a_batch_is_a_function_of_the_step(path):
    knobs = {"size": 4, "flip": True}
    batches, again = train(path, **knobs), train(path, **knobs)
    with again.iterate(2) as rows:
        ahead = [next(rows) for _ in range(2)]
    for step, batch in zip((2, 3), ahead):
        np.testing.assert_array_equal(batch["pictures"], batches.batch(step)["pictures"])
    whole = batches.batch(2)["pictures"]
    with pytest.raises(UserError, match="cannot be shared"):
        batches.batch(2, host=0, hosts=2)
    np.testing.assert_array_equal(
        np.concatenate([batches.batch(2, host=h, hosts=5)["pictures"] for h in range(5)]), whole
    )


def test_training_cuts_and_mirrors(path, images):
    batches = train(path, size=4, flip=True)
    mirrored = set()
    for step in range(6):
        for picture, text in zip(batches.batch(step)["pictures"], batches.text(step)):
            original = images[int(text.split()[1])]
            cuts = {(i, j): original[i : i + 4, j : j + 4] for i in range(3) for j in range(3)}
            found = [
                flip for cut in cuts.values() for flip in (0, 1) if np.array_equal(cut[:, :: 1 - 2 * flip], picture)
            ]
            assert len(found) == 1
            mirrored.add(found[0])
    assert mirrored == {0, 1}


def test_validation_has_every_picture_once(path, images):
    batches = Pictures(paths=path, size=4, validation=path).open_validation(sequence_length=4, batch_size=4)
    assert len(batches) == 3
    pictures, weights = (np.concatenate([batch[name] for batch in batches]) for name in ("pictures", "loss_weights"))
    np.testing.assert_array_equal(weights, [1] * COUNT + [0, 0])
    np.testing.assert_array_equal(pictures[:COUNT], images[:, 1:5, 1:5])


def test_fingerprints(path):
    base = train(path).identity()
    assert train(path).identity() == base
    changed = {name for name, value in train(path, flip=True).identity().items() if base[name] != value}
    assert changed == {"transforms"}
    changed = {name for name, value in train(path, size=5).identity().items() if base[name] != value}
    assert changed == {"source pictures"}


def test_transparent_places_are_white(tmp_path):
    clear = np.zeros((6, 6, 4), np.uint8)
    clear[0, 0] = [10, 20, 30, 255]
    table = pyarrow.table({"image": [png(clear)], "caption": [None]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    picture = Pictures(paths=str(tmp_path / "c.parquet"), size=6).open(str(tmp_path / "c.parquet")).picture(0, None)
    assert picture[0, 0].tolist() == [10, 20, 30] and (picture[1:] == 255).all()


def test_refuses(path, tmp_path):
    with pytest.raises(UserError, match=r"p\.parquet:\d+ is 6 x 6 pixels, smaller"):
        train(path, size=7).batch(0)
    with pytest.raises(UserError, match="no column 'jpeg'"):
        train(path, image="jpeg")
    with pytest.raises(UserError, match="validation is not set"):
        Pictures(paths=path, size=6).open_validation(sequence_length=4, batch_size=4)
    with pytest.raises(UserError, match=r"Pictures\.size=0"):
        Pictures(paths=path, size=0)
    (tmp_path / "no.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        train(str(tmp_path / "no.parquet"))
    pyarrow.parquet.write_table(pyarrow.table({"image": [b"\x89PNG broken"], "caption": ["x"]}), tmp_path / "b.parquet")
    broken = Pictures(paths=str(tmp_path / "b.parquet"), size=6)
    with pytest.raises(UserError, match=r"picture b\.parquet:0 cannot be decoded"):
        broken.verify(sequence_length=4)
    assert Pictures(paths=path, size=6).verify(sequence_length=4) == 1


def test_the_shipped_pictures_are_whole():
    for name, count in (("train", 1112), ("validation", 126)):
        path = f"package:experiments/data/clipart/{name}.parquet"
        source = Pictures(paths=path, size=32).open(path)
        assert len(source) == count and all(source.captions)
        assert source.picture(count - 1, None).shape == (32, 32, 3)
