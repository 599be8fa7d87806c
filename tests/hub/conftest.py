"""One Hub and one set of processes for all tests of sharing."""

import pytest

from tests.hub.fake_hub import FakeHub
from tests.hub.processes import HubProcess


@pytest.fixture(scope="session")
def hub():
    with FakeHub() as hub:
        yield hub


@pytest.fixture(scope="session")
def client(hub, tmp_path_factory) -> HubProcess:
    return HubProcess(tmp_path_factory.mktemp("hub"), hub.url)
