"""First of all the process enters CPU mode, and from then on types are checked as code runs.

Kernels choose between interpreter and compiler when they are imported, and beartype checks what is
imported after it.
"""

import pytest
from beartype import BeartypeConf
from beartype.claw import beartype_packages
from hypothesis import settings

# An int is a float to a reader. Triton's jit wants its functions undecorated.
conf = BeartypeConf(is_pep484_tower=True, claw_skip_package_names=("parity.frameworks",))
beartype_packages(("parity", "puzzles", "packing"), conf=conf)

# An example that takes long is no failure: the machine is busy with the other tests.
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")

from parity import frameworks  # noqa: E402

frameworks.interpreters()


@pytest.fixture(autouse=True)
def _same_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """No colours and a fixed width: what a command prints does not depend on who runs the tests."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
