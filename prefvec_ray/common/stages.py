"""Stages of a long job, each done once: what finished is kept, what was interrupted runs again."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blake3 import blake3
from rich.console import Console

from prefvec_ray.common.atomic import write_whole
from prefvec_ray.common.files import read_json, taking_apart

ADVICE = "delete the file, and the stage runs again"


class Stages:
    """Runs named stages in order and remembers them as `<folder>/stages/<name>.json`.

    A stage is keyed by its own settings and by the stages before it: change a setting, and that stage and all after it
    run again. The record is written last and atomically, so a stage that was killed half-way is not done.
    """

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder = folder
        self.console = console
        self.seconds: dict[str, float] = {}
        self.results: dict[str, Any] = {}
        self.chain = ""

    def run(self, name: str, title: str, settings: Any, function: Callable[[], Any]) -> Any:
        """The JSON result of `function`, from this call or from the earlier one with the same key."""
        self.chain = blake3(json.dumps([self.chain, name, settings], sort_keys=True, default=str).encode()).hexdigest()
        number = len(self.seconds) + 1
        record = self.folder / "stages" / f"{name}.json"
        if record.is_file():
            done = read_json(record, ADVICE)
            with taking_apart(str(record), ADVICE):
                done = {"key": str(done["key"]), "seconds": float(done["seconds"]), "result": done["result"]}
            if done["key"] == self.chain:
                self.seconds[name] = done["seconds"]
                self.console.print(f"[dim]{number}. {title}: finished earlier ({done['seconds']:.0f} s)[/dim]")
                self.results[name] = done["result"]
                return done["result"]
        self.console.print(f"[bold]{number}. {title}[/bold]")
        start = time.perf_counter()
        result = function()
        self.seconds[name] = round(time.perf_counter() - start, 1)
        record.parent.mkdir(parents=True, exist_ok=True)
        write_whole(record, json.dumps({"key": self.chain, "seconds": self.seconds[name], "result": result}))
        self.console.print(f"   {self.seconds[name]:.1f} s")
        self.results[name] = result
        return result
