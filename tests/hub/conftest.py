"""A finished run, and a Hub on the loopback for tests of uploads."""

import finished as runs
import pytest
from hubserver import HubServer
from huggingface_hub import constants

from chainforge.hub import upload


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A finished run, moved since: the paths in its manifests lead nowhere."""
    folder = tmp_path_factory.mktemp("made")
    runs.chain(folder / "runs/full", runs.base(folder / "models/begin", "apache-2.0"))
    return (folder / "runs").rename(folder / "moved") / "full"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that this very process takes for the Hub."""
    with HubServer() as server:
        files = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(upload, "WAITS", (0.01, 0.01))
        monkeypatch.setenv("HF_TOKEN", server.secret)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server
