"""A Hub on this machine, and a process that knows no other."""

from collections.abc import Iterator

import pytest

from tests.hub.loopback import LoopbackHub
from tests.hub.shell import Shell


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        yield server


@pytest.fixture(scope="module")
def shell(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    shell = Shell(hub.url, tmp_path_factory.mktemp("home"))
    yield shell
    shell.close()
