"""Worker processes shared by the tests of layouts."""

from __future__ import annotations

import pytest
from layouts import Pool


@pytest.fixture(scope="session")
def pools(tmp_path_factory):
    """Workers by their number, started when they are first needed."""
    folder = tmp_path_factory.mktemp("pools")
    started: dict[int, Pool] = {}

    def pool(size: int) -> Pool:
        if size not in started or not started[size].alive:
            started[size] = Pool(size, folder)
        return started[size]

    yield pool
    for one in started.values():
        one.close()
