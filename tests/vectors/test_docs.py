"""docs/vectors.md runs, from top to bottom, as a reader would run it."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_walkthrough_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / "vectors.md").read_text("utf-8"), re.M | re.S)
    assert len(blocks) > 8
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(blocks), "docs/vectors.md", "exec"), {"__name__": "walkthrough"})
    assert (tmp_path / "vectors.png").stat().st_size > 5000
