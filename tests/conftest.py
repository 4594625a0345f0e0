"""Puts the test process into CPU mode before a kernel is imported: they choose at import time."""

import pytest

from parity import frameworks

frameworks.interpreters()


@pytest.fixture(autouse=True)
def _stay_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """No colours and a fixed width: what a command prints does not depend on who runs the tests."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
