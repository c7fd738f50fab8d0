"""A short run of the fuzzer of bundles, records and vector files. `tests/fuzz/registry.py` has longer ones."""

import json
import subprocess
import sys
from pathlib import Path

FUZZER = Path(__file__).parents[1] / "fuzz" / "registry.py"


def test_mutated_inputs_are_taken_or_refused_in_one_line() -> None:
    command = [sys.executable, str(FUZZER), "--inputs", "240", "--seed", "13"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.stdout, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["failures"] == []
    assert result["inputs"] == 240
    assert all(
        f"{target} refused" in result["outcomes"] for target in ("import_bundle", "read_record", "publish_folder")
    )
    assert done.returncode == 0
