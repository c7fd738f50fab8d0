"""The processes that measure. Each holds one model and takes several settings at once, whose answers share its batches.

One actor without a CPU of its own hands settings to them (`Pool`), so that trials of Ray Tune, which only wait, and
`measure` share them.
"""

import asyncio
import math
import os
import platform
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import ray

from prefvec_ray.artifacts.evaluation import Evaluation
from prefvec_ray.common.cluster import reason
from prefvec_ray.common.errors import InputError, JobError
from prefvec_ray.common.scheduling import actor_options, bundle_of
from prefvec_ray.evaluation.likelihood import margin_metrics
from prefvec_ray.search.options import Processes
from prefvec_ray.search.result import Tried
from prefvec_ray.search.rungs import joined
from prefvec_ray.search.trial import Task, in_a_line

DEATHS = 2
"""So often a setting is measured again whose process died, before it counts as failed."""


class _Process:
    """One model and one scorer. Its methods run in threads: as many settings at once as it is given."""

    def __init__(self, task: Task, rungs: Sequence[float]) -> None:
        self._task, self._rungs = task, rungs

    def load(self) -> None:
        """Apart from construction, so that what it raises arrives as it is."""
        self._schedule = self._task.fidelity_schedule(self._rungs)

    def measure(self, setting: Mapping[str, float], rung: int) -> tuple[str, list[str]]:
        """Node and pid, and what the setting scores on each block of the rung, as JSON."""
        found = self._schedule.evaluate_rung(setting, rung)
        return f"{platform.node()}:{os.getpid()}", [evaluation.model_dump_json() for evaluation in found]


@dataclass(eq=False)
class _Held:
    """A process that is up, and how many settings it has."""

    actor: Any
    running: int = 0
    alone: bool = False
    """it has a setting whose process has died before, and takes no other beside it"""
    hung: bool = False
    """it was killed for a setting that took too long"""


@dataclass
class _UnderWay:
    """What a setting has scored on its way up the rungs."""

    parts: list[Evaluation] = field(default_factory=list)
    rungs: list[Evaluation] = field(default_factory=list)
    began: float = field(default_factory=time.time)


class _SettingError(Exception):
    """A setting that could not be measured, in a line."""


class Pool:
    """An actor: starts processes, hands each setting to the one that has fewest, and replaces those that die.

    A setting whose process died is measured again by a process that has no other: if that dies too, it is to blame.
    """

    def __init__(self, task: Task, rungs: Sequence[float], options: Processes, timeout: float | None) -> None:
        self._blocks, self._of_pairs = task.blocks(rungs), set(margin_metrics(task.pairs))
        self._bundle, self._timeout, self._actors = bundle_of(options.resources), timeout, options.actors
        self._most = math.ceil(options.in_flight / options.actors)
        self._given = ray.put(task), rungs
        self._up: list[_Held] = []
        self._under_way: dict[int, _UnderWay] = {}
        self._unfit: Exception | None = None
        self._changed = asyncio.Condition()
        self._starting: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start the processes, without waiting for them; one without room waits until there is some."""
        for _ in range(self._actors):
            self._start_one()

    async def up(self) -> bool:
        """Whether a process is there to measure, or none will ever be."""
        return bool(self._up or self._unfit)

    async def step(self, number: int, setting: Mapping[str, float], rung: int) -> dict[str, Any]:
        """Measure the next rung of a setting, under a number of its own.

        Returns `tried`, a `Tried` as JSON, and `done`; or `error` in a line, with `unfit` where no process can be set
        up, and `refused` where it is a message of ours.
        """
        state = self._under_way.setdefault(number, _UnderWay()) if rung else _UnderWay()
        self._under_way[number] = state
        try:
            process, parts = await self._measure(setting, rung)
        except (InputError, JobError) as error:
            return {"error": str(error), "refused": type(error).__name__, "unfit": error is self._unfit, "done": True}
        except _SettingError as error:
            return {"error": str(error), "done": True}
        state.parts += parts
        state.rungs = [*(earlier.model_copy(update={"samples": []}) for earlier in state.rungs)]
        state.rungs.append(joined(self._blocks, state.parts, self._of_pairs))
        tried = Tried(
            rungs=state.rungs,
            complete=len(state.rungs) == len(self._blocks),
            answers=sum(block.answers for blocks in self._blocks[: len(state.rungs)] for block in blocks),
            process=process,
            began=state.began,
            ended=time.time(),
        )
        if tried.complete:
            del self._under_way[number]
        return {"tried": tried.model_dump_json(), "done": tried.complete}

    async def _measure(self, setting: Mapping[str, float], rung: int) -> tuple[str, list[Evaluation]]:
        deaths = 0
        while True:
            async with self._process(alone=deaths > 0) as held:
                try:
                    process, parts = await asyncio.wait_for(held.actor.measure.remote(setting, rung), self._timeout)
                    return process, [Evaluation.model_validate_json(part) for part in parts]
                except ray.exceptions.RayTaskError as error:  # first: what a scorer raised may be a TimeoutError
                    if isinstance(error.cause, InputError | JobError):
                        raise error.cause from None
                    raise _SettingError(in_a_line(error.cause)) from None
                except TimeoutError:
                    held.hung = True
                    self._replace(held)
                    ray.kill(held.actor)
                    message = f"no result within {self._timeout:g} s of a rung; its process was killed"
                    raise _SettingError(message) from None
                except ray.exceptions.RayActorError as error:  # its process or node was lost
                    self._replace(held)
                    deaths += not held.hung
                    if deaths > DEATHS:
                        raise _SettingError(f"its process died {deaths} times; {reason(error)}") from None

    @asynccontextmanager
    async def _process(self, alone: bool) -> AsyncIterator[_Held]:
        """A process for one more setting, once one has room. Raises why there will never be one."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._unfit or self._free(alone))
            if self._unfit:
                raise self._unfit
            held = min(self._free(alone), key=lambda each: each.running)
            held.running += 1
            held.alone = alone
        try:
            yield held
        finally:
            async with self._changed:
                held.running -= 1
                held.alone = False
                self._changed.notify_all()

    def _free(self, alone: bool) -> list[_Held]:
        most = 1 if alone else self._most
        return [each for each in self._up if each.running < most and not each.alone]

    def _replace(self, held: _Held) -> None:
        if held in self._up:
            self._up.remove(held)
            self._start_one()

    def _start_one(self) -> None:
        starting = asyncio.get_running_loop().create_task(self._load())
        self._starting.add(starting)
        starting.add_done_callback(self._starting.discard)

    async def _load(self) -> None:
        """One more process, or the reason why there can be none."""
        unfit: Exception = JobError("")
        for _ in range(1 + DEATHS):
            # What dies is replaced here, not by Ray, whose restart would hold its settings until there is room again.
            options = {**actor_options(self._bundle), "max_restarts": 0, "max_concurrency": self._most + 1}
            actor = ray.remote(_Process).options(**options).remote(*self._given)
            try:
                await actor.load.remote()
            except ray.exceptions.RayTaskError as error:
                known = isinstance(error.cause, InputError | JobError)
                unfit = error.cause if known else JobError(in_a_line(error.cause))
                break
            except ray.exceptions.RayError as error:
                unfit = JobError(reason(error))
                continue
            async with self._changed:
                self._up.append(_Held(actor))
                self._changed.notify_all()
            return
        async with self._changed:
            self._unfit = self._unfit or unfit
            self._changed.notify_all()


def start_pool(task: Task, rungs: Sequence[float], options: Processes, *, timeout: float | None = None) -> Any:
    """The handle of a `Pool` that starts its processes. They end with it: `ray.kill` it."""
    actor: Any = ray.remote(Pool).options(num_cpus=0, max_concurrency=10_000)
    pool = actor.remote(task, rungs, options, timeout)
    pool.start.remote()
    return pool
