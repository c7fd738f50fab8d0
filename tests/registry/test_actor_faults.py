"""Faults that need a cluster of their own: the scripts run as programs, the tests judge what they saw."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parent / "scripts"
KILLS = 100


def run(script: str, *arguments: object) -> dict[str, Any]:
    """The JSON object that a script prints last."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_ADDRESS")}
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))


@pytest.mark.slow
def test_an_actor_killed_a_hundred_times(tmp_path: Path) -> None:
    """kill -9 at random moments under 8 publishers: nothing acknowledged is lost, nothing torn is ever seen."""
    seen = run("kill_actor.py", tmp_path, KILLS)
    assert seen["kills"] == KILLS
    assert seen["acknowledged"] > KILLS
    assert seen["distinct"] == seen["acknowledged"]
    assert seen["lost"] == seen["torn"] == seen["harm"] == []


@pytest.mark.slow
def test_two_nodes_without_shared_storage(tmp_path: Path, make_vector: Callable[..., Path]) -> None:
    seen = run("two_nodes.py", tmp_path, make_vector(size=512))
    assert seen["equal"]
    assert not seen["reachable"]
    assert seen["moved"] == 1  # for six processes
    assert seen["findings"] == []
    assert seen["refs"] == ["from-afar@1", "helpful@1"]
