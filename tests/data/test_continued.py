"""A continued mixture gives what another run would have read next."""

import numpy as np
import pytest

from maxlike.data.continued import Continued
from maxlike.data.mixture import Mixture
from maxlike.errors import UserError

WEIGHTS = {"a": 3, "b": 5, "c": 1}
BATCH = 4


@pytest.mark.parametrize("skip", [0, 1, 7, 250])
def test_it_goes_on_where_the_first_run_stopped(skip):
    whole = Mixture(phases=((0, WEIGHTS),)).interleave(list(WEIGHTS), BATCH)
    later = Continued(weights=WEIGHTS, skip_steps=skip).interleave(list(WEIGHTS), BATCH)
    examples = np.arange(120)
    for one, other in zip(later.locate(examples), whole.locate(examples + skip * BATCH), strict=True):
        np.testing.assert_array_equal(one, other)
    sources, _ = later.locate(examples)
    np.testing.assert_array_equal(later.counts(120), np.bincount(sources, minlength=3))
    np.testing.assert_allclose(later.expected(120), 120 * np.array([3, 5, 1]) / 9)


def test_what_was_skipped_is_part_of_its_identity():
    histories = {
        Continued(weights=WEIGHTS, skip_steps=s).interleave(list(WEIGHTS), BATCH).history(40) for s in (0, 1, 2)
    }
    assert len(histories) == 3


def test_it_refuses_to_go_back():
    with pytest.raises(UserError, match="skip_steps=-1"):
        Continued(weights=WEIGHTS, skip_steps=-1)
