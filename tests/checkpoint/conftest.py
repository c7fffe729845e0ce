"""Fixtures of the tests of downloads."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hub_server import StandIn


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)
    with StandIn() as stand_in:
        thread = threading.Thread(target=stand_in.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield stand_in
        stand_in.shutdown()
        thread.join()
