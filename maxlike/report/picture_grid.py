"""Pictures in a grid, as one PNG image."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

GAP = 2  # pixels between pictures
LONG_SIDE = 1200  # pixels at most: small pictures are enlarged by a whole number to be seen


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Pixels in [-1, 1] -> 0..255, what lies outside cut off."""
    return np.asarray(np.clip((np.asarray(pixels, np.float32) + 1.0) * 127.5 + 0.5, 0, 255), np.uint8)


def grid(rows: Sequence[Sequence[np.ndarray]]) -> bytes:
    """PNG of rows of pictures (uint8 [S, S, 3], all of one size) on grey."""
    side, columns = rows[0][0].shape[0], max(len(row) for row in rows)
    sheet = np.full((len(rows) * (side + GAP) + GAP, columns * (side + GAP) + GAP, 3), 160, np.uint8)
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            top, left = GAP + r * (side + GAP), GAP + c * (side + GAP)
            sheet[top : top + side, left : left + side] = picture
    factor = max(1, LONG_SIDE // max(sheet.shape))
    buffer = io.BytesIO()
    Image.fromarray(sheet.repeat(factor, 0).repeat(factor, 1)).save(buffer, "PNG")
    return buffer.getvalue()
