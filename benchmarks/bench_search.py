"""The coefficient search against a full grid and against random search, on the trained tiny world.

    make bench-search        # or: python benchmarks/bench_search.py [--seeds 5] [--methods gp,random] [--grids 2,3]
    python benchmarks/bench_search.py --made-up 10 --grids 3 --methods gp,optuna-gp     # needs no model

Two preferences against a 13 x 13 grid, three against 7 x 7 x 7, each search with a sixth of the grid's answers. The
world is trained once (about 4 minutes on 4 cores), and every setting is measured once and kept beside it, so that a
second run only searches. The searches run here in one process as `search()` runs them on Ray, four settings in
flight; what Ray, merging and proposing cost is measured by real searches at the end. All fronts are measured again on
the report prompts, which no search has seen. How many settings a minute one process measures, and by which way of
generating, is `search_rate.py`. `optuna-gp` is the sampler that `gp` was before it had processes of its own. The last
line is JSON.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import optuna
import torch
from rich.console import Console
from search_made_up import MadeUp
from search_meter import Meter, grid_points, meter
from search_overhead import overhead
from search_rate import rates
from search_world import PREFERENCES, build

from prefvec_ray.search import Explorer, Goal, SearchConfig, SearchResult, Tried, hypervolume
from prefvec_ray.search.explore import startup
from prefvec_ray.search.space import Space
from prefvec_ray.tiny_world import TinyWorld

IN_FLIGHT = 4
GRIDS = {2: 13, 3: 7}
"""Preferences -> steps an axis."""
SHARE = 0.95
OPTUNA_GP = "optuna-gp"


class OptunaGP(Explorer):
    """The `gp` sampler as it was: Optuna's, whose gains are over the raw means and above the worst of them."""

    def _best_expected(self, known: Sequence[dict[str, float]]) -> None:
        """Leave it to the study's sampler."""

    def _sampler(self) -> optuna.samplers.BaseSampler:
        return optuna.samplers.GPSampler(seed=self.config.seed, n_startup_trials=startup(len(self.bounds)))


def drive(
    measured: Meter | MadeUp, config: SearchConfig, halving: bool, kind: type[Explorer] = Explorer
) -> SearchResult:
    """A search without Ray: settings are proposed while up to four are in flight, and finish in that order."""
    costs = measured.answers if halving else [sum(measured.answers)]
    explorer = kind(config, measured.task.metrics, list(config.ranges), costs)
    flying = []
    while True:
        while len(flying) < IN_FLIGHT and (proposal := explorer.propose()):
            flying.append(proposal)
        if not flying:
            return explorer.result()
        proposal = flying.pop(0)
        evaluations = measured.rungs(proposal.coefficients)
        rungs = []
        for evaluation in evaluations if halving else evaluations[-1:]:
            rungs.append(evaluation)
            if not explorer.promising(rungs):
                break
        tried = Tried(rungs=rungs, complete=len(rungs) == len(costs), answers=sum(costs[: len(rungs)]))
        explorer.finish(proposal.number, tried)


def best_points(result: SearchResult) -> list[dict[str, float]]:
    """The settings whose means no other one's dominate, within the limits."""
    from moocore import is_nondominated

    kept = [trial for trial in result.trials if result.goal.keeps_limits(trial)]
    on = is_nondominated([result.goal.point(trial) for trial in kept], maximise=True)
    return [trial.coefficients for trial, is_on in zip(kept, on, strict=True) if is_on]


def volume_on(
    measured: Meter | MadeUp, goal: Goal, settings: Sequence[dict[str, float]], over_base: bool = False
) -> float:
    """Hypervolume of the settings by these prompts, above the worst values or above the base."""
    base = measured.full({})
    points = [goal.point(evaluation) for evaluation in map(measured.full, settings) if goal.keeps_limits(evaluation)]
    return hypervolume(points, goal.point(base) if over_base else goal.reference(base))


@dataclass(frozen=True)
class World:
    """Search prompts and report prompts of one world, and the seeds of the searches there."""

    search: Meter | MadeUp
    report: Meter | MadeUp
    seeds: Sequence[int]


def compare(names: Sequence[str], steps: int, methods: Sequence[str], worlds: Sequence[World]) -> dict[str, Any]:
    """Every method at a sixth of the grid's answers, over worlds and seeds; shares of the grid's hypervolume."""
    points = list(grid_points(names, steps))
    found: dict[str, Any] = {"grid_evaluations": len(points)}
    rows: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    for world in worlds:
        search, report = world.search, world.report
        full = sum(search.answers)
        wanted = SearchConfig(
            objectives=list(names),
            limits={"valid": 0.9},
            ranges=dict.fromkeys(names, (-1.0, 1.0)),
            trials=10**6,
            answers=len(points) * full // 6,
            patience=None,
        )
        goal = wanted.goal(search.task.metrics)
        for done, point in enumerate(points, start=1):
            search.rungs(point)
            if done % 50 == 0 and len(worlds) == 1:
                print(f"  grid {steps}^{len(names)}: {done}/{len(points)}", flush=True)
        grid = SearchResult(goal=goal, trials=[search.full(point) for point in points])
        whole = {
            "search": volume_on(search, goal, points),
            "report": volume_on(report, goal, best_points(grid)),
            "report_front": volume_on(report, goal, [trial.coefficients for trial in grid.front]),
            "over_base": volume_on(search, goal, points, over_base=True),
        }
        found |= {"budget_answers": wanted.answers, "grid_hypervolume": whole}
        for method, seed in itertools.product(methods, world.seeds):
            rows[method].append(searched(method, wanted.model_copy(update={"seed": seed}), search, report, whole))
    return found | {
        method: {key: spread([row[key] for row in each]) for key in each[0]} for method, each in rows.items()
    }


def searched(
    method: str, wanted: SearchConfig, search: Meter | MadeUp, report: Meter | MadeUp, whole: dict[str, float]
) -> dict[str, Any]:
    """One search by `method`, beside the grid's hypervolumes."""
    sampler = "gp" if method == OPTUNA_GP else method
    config = wanted.model_copy(update={"sampler": sampler})
    full = sum(search.answers)
    began, cpu = time.perf_counter(), time.process_time()
    # Random search is the plain baseline: every setting in full, as peers do it.
    result = drive(search, config, halving=method != "random", kind=OptunaGP if method == OPTUNA_GP else Explorer)
    cpu = time.process_time() - cpu
    goal, best, front = result.goal, best_points(result), [trial.coefficients for trial in result.front]
    reached = [s for s, v in zip(result.spent, result.hypervolume_history, strict=True) if v >= SHARE * whole["search"]]
    row = {
        "search": result.hypervolume / whole["search"],
        "report": volume_on(report, goal, best) / whole["report"],
        "report_front": volume_on(report, goal, front) / whole["report_front"],
        "over_base": volume_on(search, goal, best, over_base=True) / whole["over_base"],
        "to_95": reached[0] / full if reached else None,
        "answers": result.answers,
        "measured": len(result.trials),
        "dropped": len(result.dropped),
        "front": len(result.front),
        "duplicates": duplicates(result, Space(config.ranges, config.seed)),
        "cpu_seconds": cpu,
    }
    print(
        f"  {method} seed {config.seed}: {row['search']:.3f} of the grid's hypervolume, {row['report']:.3f} on report "
        f"prompts ({row['report_front']:.3f} with what cannot be told from the front), 95% after {row['to_95']} "
        f"settings' answers, {time.perf_counter() - began:.0f} s",
        flush=True,
    )
    return row


def duplicates(result: SearchResult, space: Space) -> int:
    """Pairs of measured settings that no search can tell apart."""
    pairs = itertools.combinations((*result.trials, *result.dropped), 2)
    return sum(space.near(one.coefficients, [other.coefficients]) for one, other in pairs)


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Median and worst over the seeds; None counts as never."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return {"reached": f"{len(known)} of {len(values)}", "median": statistics.median(known) if known else None}
    return {"median": statistics.median(known), "min": min(known), "max": max(known)}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("bench-results/search-tiny"))
    parser.add_argument("--methods", default="gp,tpe,random")
    parser.add_argument("--grids", default="2,3", help="how many preferences to search")
    parser.add_argument("--fresh", action="store_true", help="measure every setting again")
    parser.add_argument("--made-up", type=int, default=0, help="so many made-up worlds instead; nothing is trained")
    parser.add_argument("--first", type=int, default=0, help="the first seed, and the first made-up world")
    options = parser.parse_args(argv)
    methods, seeds = options.methods.split(","), range(options.first, options.first + options.seeds)
    if options.made_up:
        torch.set_num_threads(1)
        numbers = range(options.first, options.first + options.made_up)
        made_up = [World(MadeUp("search", i, 64), MadeUp("report", i, 128), [i]) for i in numbers]
        counts = map(int, options.grids.split(","))
        print(json.dumps({n: compare(PREFERENCES[:n], GRIDS[n], methods, made_up) for n in counts}))
        return
    if not {"gp", "random"} <= set(methods):
        parser.error("--methods needs gp and random; the last line compares them")
    torch.set_num_threads(1)
    base, vectors = build(options.preset, options.out, Console())
    if options.fresh:
        for file in options.out.glob("measured-*.jsonl"):
            file.unlink()
    search, report = (meter(base, vectors, options.preset, split, options.out) for split in ("search", "report"))
    found: dict[str, Any] = {}
    for count in map(int, options.grids.split(",")):
        print(f"{count} preferences against a grid of {GRIDS[count]}^{count}", flush=True)
        found[str(count)] = compare(PREFERENCES[:count], GRIDS[count], methods, [World(search, report, seeds)])
        print(json.dumps(found[str(count)], indent=2), flush=True)
    print("settings measured a minute by one process", flush=True)
    minute = rates(base, vectors, TinyWorld(options.preset))
    print("real searches on Ray", flush=True)
    costs = overhead(search.task)
    first = next(iter(found.values()))
    last = {
        "evaluations_to_95pct": first["gp"]["to_95"]["median"],
        "grid_evaluations": first["grid_evaluations"],
        "vs_random": first["gp"]["search"]["median"] / first["random"]["search"]["median"],
        "settings_a_minute": minute,
        **costs,
        "preferences": found,
    }
    (options.out / "bench-search.json").write_text(json.dumps(last, indent=2))
    print(json.dumps(last))


if __name__ == "__main__":
    main(sys.argv[1:])
