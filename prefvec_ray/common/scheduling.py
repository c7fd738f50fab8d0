"""Room in the cluster: whether work can ever be scheduled, and what it waits for.

check_room("a DPO run", [{"CPU": 1, "GPU": 1}] * 4)      # InputError where no machine can ever hold it
with waiting(console, "serving", [{"CPU": 1}], started=replica_is_up):
    ...                                                  # blocks; after ten seconds a line says what it waits for
"""

import json
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import ray
from rich.console import Console
from rich.markup import escape

from prefvec_ray.common.errors import InputError

Bundle = Mapping[str, float]
"""What one process needs, by Ray's names: {"CPU": 1, "GPU": 0.5}."""

FIRST_REPORT, NEXT_REPORTS = 9.0, 60.0
"""Seconds until a wait is reported, and from then on."""
MONITOR_SECONDS = 8.0
"""Ray's monitor writes its first status within so long after a cluster has started."""


def bundle_of(resources: Mapping[str, float] | None, *, default: Bundle | None = None) -> dict[str, float]:
    """`{"cpu": 1, "gpu": 1, "far": 1}`, as configs write it, by Ray's names and without zeros."""
    given = {"cpu": 1.0} if resources is None and default is None else dict(resources or default or {})
    names = {"cpu": "CPU", "gpu": "GPU"}
    return {names.get(name, name): float(amount) for name, amount in given.items() if amount}


def actor_options(bundle: Bundle) -> dict[str, Any]:
    """The bundle as options of `ray.remote`."""
    rest = {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU")}
    return {"num_cpus": bundle.get("CPU", 0), "num_gpus": bundle.get("GPU", 0), "resources": rest}


def check_room(what: str, bundles: Sequence[Bundle]) -> None:
    """Refuse what this cluster can never hold: all of `bundles` at once, one process each.

    Machines that an autoscaler may add count as room, since only it knows what it can add.

    Raises:
        InputError: says what is needed and what the largest machine has.
    """
    nodes = _nodes()
    if not bundles or _place(bundles, nodes) or _autoscaler() is not False:
        return
    raise InputError(
        f"{what} needs {describe(bundles)}, and this cluster can never give it: it has {_describe_cluster(nodes)}, and "
        "no autoscaler adds machines; ask for less in `resources`, or join a larger machine with `ray start`"
    )


def fits_now(bundles: Sequence[Bundle]) -> bool:
    """Whether the cluster has room for all of `bundles` at this moment."""
    from ray._private.state import available_resources_per_node

    return _place(bundles, list(available_resources_per_node().values()))


class Waiting:
    """Reports what work waits for: after ten seconds, then every minute. `poll` it from the loop that waits.

    Args:
        starts: also report that room was found and a process is starting. Without it only a lack of room is reported,
            for work that does not say when it has begun.
    """

    def __init__(self, console: Console, what: str, bundles: Sequence[Bundle], *, starts: bool = True) -> None:
        self.console, self.what, self.bundles, self.starts = console, what, list(bundles), starts
        self.began = time.monotonic()
        self.next = self.began + FIRST_REPORT

    def poll(self, started: bool = False) -> None:
        """Report if it is time. `started`: the work is under way; a wait that follows begins anew."""
        now = time.monotonic()
        if started:
            self.began, self.next = now, now + FIRST_REPORT
        elif now >= self.next:
            if not self.starts and not self._starving():
                self.began, self.next = now, now + FIRST_REPORT
                return
            self.next = now + NEXT_REPORTS
            self.console.print(f"   [dim]{escape(self.line())}[/dim]", soft_wrap=True)

    def line(self) -> str:
        """What is needed, what the cluster has, what is free and who holds the rest."""
        passed = f"{time.monotonic() - self.began:.0f} s"
        if not self._starving():
            return f"{self.what} is starting: it has its {describe(self.bundles)} ({passed})"
        nodes = _nodes()
        free = _sum(ray.available_resources(), self._names())
        holders = _holders(self._names())
        held = f"; in use: {'; '.join(holders)}" if holders else ""
        grows = "; an autoscaler was asked for more" if _autoscaler() else ""
        return (
            f"{self.what} waits for {describe(self.bundles)}: the cluster has {_describe_cluster(nodes)}, free "
            f"{_amounts(free) or 'nothing'}{held}{grows} ({passed}; Ctrl-C ends the wait)"
        )

    def _names(self) -> list[str]:
        return sorted({name for bundle in self.bundles for name in bundle})

    def _starving(self) -> bool:
        """Whether the cluster lacks room, as opposed to a process that has its room and is starting."""
        if fits_now(self.bundles):
            return False
        demand = _status().get("load_metrics_report")
        if demand is None:
            return True
        wanted = [dict(bundle) for bundle in self.bundles]
        single = [_plain(bundle) for bundle, _ in demand["resource_demand"]]
        groups = [_plain(bundle) for group, _ in demand["pg_demand"] for bundle, _ in group["bundles"]]
        return any(bundle in [*single, *groups] for bundle in wanted)


@contextmanager
def waiting(
    console: Console, what: str, bundles: Sequence[Bundle], started: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Report, from a thread, what the block waits for until `started()`."""
    over, wait = threading.Event(), Waiting(console, what, bundles)

    def watch() -> None:
        while not over.wait(1.0):
            if started():
                return
            with suppress(ray.exceptions.RayError, RuntimeError, OSError):  # the cluster goes down: the block will say
                wait.poll()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=5)


def describe(bundles: Sequence[Bundle]) -> str:
    """`2 x (1 CPU and 1 GPU)`."""
    counts = Counter(tuple(sorted(bundle.items())) for bundle in bundles)
    parts = []
    for items, count in counts.items():
        text = _amounts(dict(items)) or "no CPU"
        parts.append(text if count == 1 else f"{count} x {text}" if len(items) < 2 else f"{count} x ({text})")
    return " and ".join(parts) or "nothing"


def _amounts(amounts: Bundle) -> str:
    def one(name: str, amount: float) -> str:
        plural = "s" if name in ("CPU", "GPU") and amount != 1 else ""
        return f"{amount:g} {name}{plural}"

    order = sorted(amounts, key=lambda name: (name not in ("CPU", "GPU"), name))
    return " and ".join(one(name, amounts[name]) for name in order)


def _describe_cluster(nodes: Sequence[Bundle]) -> str:
    names = sorted({name for node in nodes for name in node if _is_resource(name)} | {"CPU"})
    total = {name: sum(node.get(name, 0.0) for node in nodes) for name in names}
    if "GPU" not in total:
        total["GPU"] = 0.0
    largest = max(nodes, key=lambda node: (node.get("GPU", 0.0), node.get("CPU", 0.0)), default={})
    size = {name: largest.get(name, 0.0) for name in ("CPU", "GPU") if name == "CPU" or largest.get(name)}
    where = "on one node" if len(nodes) == 1 else f"on {len(nodes)} nodes, {_amounts(size)} on the largest"
    return f"{_amounts(total)} {where}"


def _is_resource(name: str) -> bool:
    """Not Ray's own: memory, a node's address, the resources of a placement group, a kind of accelerator."""
    return (
        name not in ("memory", "object_store_memory")
        and not any(name.startswith(prefix) for prefix in ("node:", "bundle", "accelerator_type:"))
        and "_group_" not in name
    )


def _plain(bundle: Mapping[str, float]) -> dict[str, float]:
    return {name: float(amount) for name, amount in bundle.items() if _is_resource(name)}


def _nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _sum(amounts: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    return {name: amounts.get(name, 0.0) for name in names}


def _place(bundles: Sequence[Bundle], nodes: Sequence[Mapping[str, float]]) -> bool:
    """Whether every bundle finds a node, largest bundle first, emptiest node last."""
    room = [dict(node) for node in nodes]
    for bundle in sorted(bundles, key=lambda one: (-one.get("GPU", 0.0), -one.get("CPU", 0.0))):
        fitting = [
            node for node in room if all(node.get(name, 0.0) >= amount - 1e-9 for name, amount in bundle.items())
        ]
        if not fitting:
            return False
        chosen = min(fitting, key=lambda node: (node.get("GPU", 0.0), node.get("CPU", 0.0)))
        for name, amount in bundle.items():
            chosen[name] = chosen.get(name, 0.0) - amount
    return True


def _status() -> dict[str, Any]:
    """What Ray's monitor wrote last, some seconds ago; empty where there is no monitor."""
    from ray.experimental import internal_kv

    text = internal_kv._internal_kv_get("__autoscaling_status")
    return json.loads(text) if text else {}


def _autoscaler() -> bool | None:
    """Whether an autoscaler may add machines; None where that cannot be told (a head without a monitor).

    The monitor of a cluster without one names each node's type after the node.
    """
    from ray._private.state import state
    from ray.experimental import internal_kv

    if state.get_cluster_config() is not None or internal_kv._internal_kv_get("__autoscaler_v2_enabled") == b"1":
        return True
    until = time.monotonic() + MONITOR_SECONDS
    while "autoscaler_report" not in (status := _status()):
        if time.monotonic() > until:
            return None
        time.sleep(0.2)
    report = status["autoscaler_report"]
    ids = {f"node_{node['NodeID']}" for node in ray.nodes()}
    types = {*report["active_nodes"], *(report.get("idle_nodes") or {})}
    return bool(types - ids)


def _holders(names: Sequence[str]) -> list[str]:
    """Who holds these resources, a phrase for each job, as far as Ray's state API says; empty without it."""
    from ray.util import state

    options: dict[str, Any] = {"detail": True, "timeout": 5, "raise_on_missing_output": False, "limit": 1000}
    held: dict[str, Counter[str]] = defaultdict(Counter)
    sums: dict[str, Counter[str]] = defaultdict(Counter)
    try:
        for kind, found in (
            ("actor", state.list_actors(filters=[("state", "=", "ALIVE")], **options)),
            ("task", state.list_tasks(filters=[("state", "=", "RUNNING"), ("type", "=", "NORMAL_TASK")], **options)),
        ):
            for one in found:
                amounts = _plain(one.required_resources or {})
                if any(amounts.get(name) for name in names):
                    held[one.job_id][f"{kind} {one.name or one.class_name}"] += 1
                    sums[one.job_id].update({name: amounts.get(name, 0) for name in names})
        for group in state.list_placement_groups(filters=[("state", "=", "CREATED")], **options):
            for bundle in group.bundles or []:
                amounts = _plain(bundle.get("unit_resources", bundle))
                held[group.creator_job_id][f"placement group {group.name or group.placement_group_id[:8]}"] += 1
                sums[group.creator_job_id].update({name: amounts.get(name, 0) for name in names})
        jobs = {job.job_id: job.entrypoint for job in state.list_jobs(**options) if job.job_id}
    except Exception:  # no dashboard, or one that is still starting: the amounts alone must do
        return []
    own = ray.get_runtime_context().get_job_id()
    phrases = []
    for job, things in held.items():
        who = f"this job (pid {os.getpid()})" if job == own else f"job {job} ({jobs.get(job) or 'unknown'})"
        what = ", ".join(name if count == 1 else f"{name} x {count}" for name, count in things.most_common(4))
        used = {name: amount for name, amount in sums[job].items() if amount}
        if used:
            phrases.append(f"{_amounts(used)} by {who}: {what}"[:300])
    return phrases
