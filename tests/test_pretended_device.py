"""What a device is asked for, without one: see `tests.pretended_device`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils import backend_registration

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_DummyBackendModule"), reason="needs torch 2.10"
)
WAITS = {"compute": 0, "KFAC cholesky": 2, "KFAC eigen": 14}
"""How often a call may wait for the device: torch's eigh asks for each matrix by itself."""


@pytest.fixture(scope="module")
def cases() -> dict[str, dict[str, Any]]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.pretended_device"]
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    return {case["name"]: case for case in found}


@pytest.mark.parametrize("name", WAITS)
def test_the_host_waits_seldom(cases: dict[str, dict[str, Any]], name: str) -> None:
    assert cases[name]["asked"] + cases[name]["moved"] <= WAITS[name]


@pytest.mark.parametrize("name", WAITS)
def test_results_lie_on_the_device(cases: dict[str, dict[str, Any]], name: str) -> None:
    assert cases[name]["on"] == ["gpu"]
