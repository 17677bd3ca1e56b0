"""The fake cluster of `tests.launch.cluster`, without what a test left running on its worker."""

import pytest

from tests.launch.cluster import World


@pytest.fixture
def world(tmp_path):
    (tmp_path / "world").mkdir()
    world = World(tmp_path / "world")
    yield world
    world.crash()
