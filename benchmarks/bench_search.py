"""The coefficient search against a full grid and against random search, on the trained tiny world.

    make bench-search        # or: python benchmarks/bench_search.py [--seeds 5] [--methods gp,random] [--grids 2,3]

Two preferences against a 13 x 13 grid, three against 7 x 7 x 7, each search with a sixth of the grid's answers. The
world is trained once (about 4 minutes on 4 cores), and every setting is measured once and kept beside it, so that a
second run only searches. The searches run here in one process as `search()` runs them on Ray, four settings in
flight; what Ray, merging and proposing cost is measured by real searches at the end. All fronts are measured again on
the report prompts, which no search has seen. How many settings a minute one process measures, and by which way of
generating, is `search_rate.py`. The last line is JSON.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from search_meter import Meter, grid_points, meter
from search_overhead import overhead
from search_rate import rates
from search_world import PREFERENCES, build

from prefvec_ray.search import Explorer, Goal, SearchConfig, SearchResult, Tried, hypervolume
from prefvec_ray.search.space import Space
from prefvec_ray.tiny_world import TinyWorld

IN_FLIGHT = 4
GRIDS = {2: 13, 3: 7}
"""Preferences -> steps an axis."""
SHARE = 0.95


def drive(measured: Meter, config: SearchConfig, halving: bool) -> SearchResult:
    """A search without Ray: settings are proposed while up to four are in flight, and finish in that order."""
    costs = measured.answers if halving else [sum(measured.answers)]
    explorer = Explorer(config, measured.task.metrics, list(config.ranges), costs)
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


def volume_on(measured: Meter, goal: Goal, settings: Sequence[dict[str, float]], over_base: bool = False) -> float:
    """Hypervolume of the settings by these prompts, above the worst values or above the base."""
    base = measured.full({})
    points = [goal.point(evaluation) for evaluation in map(measured.full, settings) if goal.keeps_limits(evaluation)]
    return hypervolume(points, goal.point(base) if over_base else goal.reference(base))


def compare(
    names: Sequence[str], steps: int, methods: Sequence[str], seeds: int, search: Meter, report: Meter
) -> dict[str, Any]:
    """Every method at a sixth of the grid's answers, over the seeds; shares of the grid's hypervolume."""
    wanted = SearchConfig(
        objectives=list(names),
        limits={"valid": 0.9},
        ranges=dict.fromkeys(names, (-1.0, 1.0)),
        trials=10**6,
        patience=None,
    )
    goal = wanted.goal(search.task.metrics)
    points = list(grid_points(names, steps))
    for done, point in enumerate(points, start=1):
        search.rungs(point)
        if done % 50 == 0:
            print(f"  grid {steps}^{len(names)}: {done}/{len(points)}", flush=True)
    full = sum(search.answers)
    evaluations = [search.full(point) for point in points]
    grid = SearchResult(goal=goal, trials=evaluations)
    budget = len(points) * full // 6
    whole = {
        "search": volume_on(search, goal, points),
        "report": volume_on(report, goal, best_points(grid)),
        "over_base": volume_on(search, goal, points, over_base=True),
    }
    found: dict[str, Any] = {"grid_evaluations": len(points), "budget_answers": budget, "grid_hypervolume": whole}
    for method in methods:
        rows = []
        for seed in range(seeds):
            config = wanted.model_copy(update={"sampler": method, "answers": budget, "seed": seed})
            began = time.perf_counter()
            # Random search is the plain baseline: every setting in full, as peers do it.
            result = drive(search, config, halving=method != "random")
            best = best_points(result)
            reached = [
                s for s, v in zip(result.spent, result.hypervolume_history, strict=True) if v >= SHARE * whole["search"]
            ]
            rows.append(
                {
                    "search": result.hypervolume / whole["search"],
                    "report": volume_on(report, goal, best) / whole["report"],
                    "over_base": volume_on(search, goal, best, over_base=True) / whole["over_base"],
                    "to_95": reached[0] / full if reached else None,
                    "answers": result.answers,
                    "measured": len(result.trials),
                    "dropped": len(result.dropped),
                    "duplicates": duplicates(result, Space(config.ranges, seed)),
                }
            )
            print(
                f"  {method} seed {seed}: {rows[-1]['search']:.3f} of the grid's hypervolume, "
                f"{rows[-1]['report']:.3f} on report prompts, 95% after {rows[-1]['to_95']} settings' answers, "
                f"{time.perf_counter() - began:.0f} s",
                flush=True,
            )
        found[method] = {key: spread([row[key] for row in rows]) for key in rows[0]}
    return found


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
    options = parser.parse_args(argv)
    if not {"gp", "random"} <= set(options.methods.split(",")):
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
        found[str(count)] = compare(
            PREFERENCES[:count], GRIDS[count], options.methods.split(","), options.seeds, search, report
        )
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
