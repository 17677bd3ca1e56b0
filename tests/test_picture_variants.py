"""Variants of the shipped pictures: what they are, and that the shipped file holds them."""

import numpy as np
import pyarrow.parquet
import pytest

from maxlike.data import files
from maxlike.data.mixed import BEGIN, END
from maxlike.data.pictures import PictureFiles
from maxlike.errors import UserError
from maxlike.picture_variants import PICTURES, Variants, varied

TOKENS = "package:experiments/data/clipart/tokens"


@pytest.fixture(scope="module")
def pictures():
    return PictureFiles(PICTURES, 32)


def texts(name: str) -> list[str]:
    return pyarrow.parquet.read_table(files.resolve(f"{TOKENS}/{name}.parquet", "test"))["text"].to_pylist()


def codes(text: str) -> str:
    return text[text.index(BEGIN) : text.index(END)]


def test_the_first_variant_is_the_picture_and_the_others_are_drawn_from_their_number(pictures):
    variants = Variants(pictures, 4)
    assert len(variants) == 4 * len(pictures) == len(variants.captions) == len(set(variants.names))
    np.testing.assert_array_equal(variants.picture(8, None), pictures.picture(2, None))
    assert variants.captions[8:12] == [pictures.captions[2]] * 4
    again = Variants(pictures, 9)
    for variant in range(4):
        np.testing.assert_array_equal(variants.picture(8 + variant, None), again.picture(18 + variant, None))
    different = {variants.picture(8 + variant, None).tobytes() for variant in range(4)}
    assert len(different) == 4


def test_a_variant_moves_mirrors_and_exchanges_colours_and_nothing_else():
    pixels = np.full((32, 32, 3), 255, np.uint8)
    pixels[10:20, 12:18] = (1, 2, 3)
    pixels[10, 12] = (1, 2, 9)
    seen = set()
    for seed in range(40):
        variant = varied(pixels, np.random.default_rng(seed))
        ink = np.argwhere((variant != 255).any(-1))
        assert len(ink) == 60 and np.abs(ink.min(0) - (10, 12)).max() <= 3 + 2  # mirrored, it begins at column 14
        corner = sorted(np.sort(variant[tuple(place)]).tolist() for place in ink)
        assert corner == [[1, 2, 3]] * 59 + [[1, 2, 9]]
        seen.add(variant.tobytes())
    assert len(seen) > 30


def test_the_shipped_variants_hold_every_picture_and_none_that_is_held_out(pictures):
    shipped = texts("variants")
    assert len(shipped) == 8 * len(pictures) and len({codes(text) for text in shipped}) > 8700
    assert [codes(text) for text in shipped[::8]] == [codes(text) for text in texts("train")]
    assert not {codes(text) for text in shipped} & {codes(text) for text in texts("validation")}
    for number in (0, 9, 777):
        assert pictures.captions[number // 8] in shipped[number]


def test_no_variants_are_refused(pictures):
    with pytest.raises(UserError, match="count=0"):
        Variants(pictures, 0)
