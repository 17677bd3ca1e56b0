"""Which rows of a batch a process reads, for every way in which its devices may lie on the mesh."""

import collections

import pytest

from maxlike.errors import UserError
from maxlike.program import share_rows

Device = collections.namedtuple("Device", "id process_index")


def shared(*rows_of_processes: tuple[slice, ...], batch_size: int = 8):
    return share_rows(
        {
            Device((process, i), process): rows
            for process, all_rows in enumerate(rows_of_processes)
            for i, rows in enumerate(all_rows)
        },
        batch_size,
    )


def test_devices_that_cut_the_batch_give_each_process_its_part():
    assert shared((slice(0, 2), slice(2, 4)), (slice(4, 6), slice(6, 8))) == {0: (0, 2), 1: (1, 2)}
    assert shared((slice(4, 8),), (slice(0, 4),)) == {0: (1, 2), 1: (0, 2)}


def test_processes_that_lie_apart_along_another_axis_read_the_same_rows():
    assert shared((slice(None),), (slice(None),)) == {0: (0, 1), 1: (0, 1)}
    pairs = shared((slice(0, 4),), (slice(0, 4),), (slice(4, 8),), (slice(4, 8),))
    assert pairs == {0: (0, 2), 1: (0, 2), 2: (1, 2), 3: (1, 2)}


def test_rows_that_are_no_parts_are_refused():
    with pytest.raises(UserError, match=r"\(0, 6\), \(2, 8\).* order the axes of Mesh.shape"):
        shared((slice(0, 2), slice(4, 6)), (slice(2, 4), slice(6, 8)))
