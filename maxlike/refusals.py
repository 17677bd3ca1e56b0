"""Refusals: what a layer, a rule or a job will not do, told from an error of a library or a mistake of ours.

layers/ cannot know `UserError`; its parts raise ValueError with a sentence, some of them only when a step is traced,
because no constructor knows the mesh, the device or the rows. Both are refusals, wherever they surface.
"""

import contextlib
import linecache
import traceback
from collections.abc import Iterator

from maxlike.errors import UserError


def is_refusal(error: BaseException) -> bool:
    """Whether an exception is a sentence for the user: a UserError, or a ValueError that a `raise` in layers/ raised.

    A library's ValueError is none, although jax hides its own frames, so that it also seems to end in a line of ours:
    that line is a call. Neither is a plain ValueError of maxlike/, which says UserError for what a user can mend.
    """
    if isinstance(error, UserError):
        return True
    frames = list(traceback.walk_tb(error.__traceback__))
    if type(error) is not ValueError or not frames:
        return False
    frame, number = frames[-1]
    line = linecache.getline(frame.f_code.co_filename, number, frame.f_globals).strip()
    return frame.f_globals["__name__"].partition(".")[0] == "layers" and line.startswith("raise ")


@contextlib.contextmanager
def as_user_errors() -> Iterator[None]:
    """Around a job: whatever a layer refuses in it leaves as a UserError with the layer's sentence, whether it was
    tracing a step, an evaluation, a decoding loop or a plan. Any other error passes as it is."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, UserError) or not is_refusal(error):
            raise
        raise UserError(str(error)) from error
