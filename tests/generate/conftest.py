"""A chat server on the loopback whose script a test sets, with keys and short pauses."""

import pytest
from server import Server

from chainforge.generate import api


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setattr(api, "RETRY_SECONDS", 0.01)
    for name in ("DEEPSEEK_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "sk-CANARY-0123456789")
    return "sk-CANARY-0123456789"


@pytest.fixture
def server(key):
    with Server() as server:
        yield server
