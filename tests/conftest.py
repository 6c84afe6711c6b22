"""What the tests of several files take: a Hub on this machine, and a process that knows no other."""

from collections.abc import Iterator

import pytest
from hub_child import Child
from hub_server import LoopbackHub


@pytest.fixture(scope='module')
def served() -> Iterator[LoopbackHub]:
    server = LoopbackHub()
    yield server
    server.stop()


@pytest.fixture(scope='module')
def child(served: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    one = Child(tmp_path_factory.mktemp('home'), HF_ENDPOINT=served.url)
    yield one
    one.pool.shutdown()
