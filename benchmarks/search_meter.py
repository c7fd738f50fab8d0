"""Settings of the bench world measured once and kept: what `bench_search.py` asks all its searches' questions of."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from prefvec_ray.evaluation import Evaluation
from prefvec_ray.scorers import TinyWorldScorer
from prefvec_ray.search import Task
from prefvec_ray.tiny_world import TinyWorld
from prefvec_ray.vectors import fingerprint

KEPT = ("helpful", "harmless", "polite", "valid")


class Meter:
    """Evaluations after each rung, by setting, from a live model in this process; kept in `<folder>/<name>.jsonl`."""

    def __init__(self, task: Task, rungs: tuple[float, ...], folder: Path, name: str) -> None:
        self.task, self.path, self._rungs, self._schedule = task, folder / f"{name}.jsonl", rungs, None
        self.answers = [sum(block.answers for block in rung) for rung in task.blocks(rungs)]
        self.measured = 0
        self._known: dict[tuple[float, ...], list[Evaluation]] = {}
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                rungs = [Evaluation.model_validate(row) for row in json.loads(line)]
                self._known[self._key(rungs[-1].coefficients)] = rungs

    def rungs(self, coefficients: Mapping[str, float]) -> list[Evaluation]:
        """What the setting scores after each rung, the last one being all of it."""
        key = self._key(coefficients)
        if key not in self._known:
            self._schedule = self._schedule or self.task.fidelity_schedule(self._rungs)
            named = dict(zip(self.task.vectors, key, strict=True))
            self._known[key] = [_small(evaluation) for evaluation in self._schedule.evaluate_rungs(named)]
            self.measured += 1
            with self.path.open("a") as file:
                file.write(json.dumps([evaluation.model_dump() for evaluation in self._known[key]]) + "\n")
        return [e.model_copy(update={"coefficients": dict(coefficients)}) for e in self._known[key]]

    def full(self, coefficients: Mapping[str, float]) -> Evaluation:
        return self.rungs(coefficients)[-1]

    def _key(self, coefficients: Mapping[str, float]) -> tuple[float, ...]:
        return tuple(coefficients.get(name, 0.0) for name in self.task.vectors)


def _small(evaluation: Evaluation) -> Evaluation:
    return evaluation.model_copy(
        update={
            "samples": [],
            "per_prompt": {name: evaluation.per_prompt[name] for name in KEPT},
            "metrics": {name: evaluation.metrics[name] for name in KEPT},
        }
    )


def grid_points(names: Sequence[str], steps: int) -> Iterator[dict[str, float]]:
    axis = [-1 + 2 * i / (steps - 1) for i in range(steps)]
    return (dict(zip(names, point, strict=True)) for point in itertools.product(axis, repeat=len(names)))


def meter(base: Path, vectors: dict[str, Path], preset: str, split: Literal["search", "report"], folder: Path) -> Meter:
    """The tiny world's prompts of a split; report prompts are measured in one rung."""
    world = TinyWorld(preset)
    task = Task(
        base=base,
        vectors=vectors,
        prompts=world.prompts(split),
        scorer=TinyWorldScorer(world),
        base_fingerprint=fingerprint(base),
    )
    return Meter(task, (0.25, 1.0) if split == "search" else (1.0,), folder, f"measured-{split}")
