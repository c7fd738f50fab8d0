"""Joining clusters, and room in them: what can never be scheduled is refused, what must wait says for what."""

import io
import os
import subprocess
import sys
import time

import pytest
from rich.console import Console

from prefvec_ray.common.errors import InputError

JOIN = "from prefvec_ray.common.cluster import connect; connect(); print('joined')"


def join(**environment: str) -> subprocess.CompletedProcess[str]:
    """What a process prints that joins a cluster; it never gets to start one."""
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", JOIN], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("127.0.0.1:1", "RAY_ADDRESS is '127.0.0.1:1', and nothing answers there"),
        ("http://127.0.0.1:8265", "set RAY_API_SERVER_ADDRESS to it for `ray job submit`"),
        ("ray://127.0.0.1:10001", "Ray Client is not supported"),
        ("somewhere", "expected host:port, such as 10.0.0.1:6379"),
        ("127.0.0.1:99999", "expected host:port"),
    ],
)
def test_an_address_that_leads_nowhere_is_one_line(address, says):
    done = join(RAY_ADDRESS=address)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("prefvec_ray.common.errors.InputError: ")
    assert says in last


FIND_ITSELF = """
import ray
from ray.util.state import get_actor
from prefvec_ray.common.cluster import connect

@ray.remote(num_cpus=0)
class Actor:
    def found(self):
        try:
            return get_actor(ray.get_runtime_context().get_actor_id()).state
        except ConnectionError as error:  # of several clusters on one machine, Ray takes none
            return "asked none" if "multiple active Ray instances" in str(error) else str(error)

connect()
print(ray.get(Actor.remote().found.remote()))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("started_here", "says"), [(False, "ALIVE"), (True, "asked none")])
def test_processes_never_ask_another_cluster_than_their_own(ray_cluster, new_cluster, monkeypatch, started_here, says):
    """Ray Train kills the workers of a run whose controller it does not find; it asked the cluster that a node's
    environment names."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", ray_cluster)
    with new_cluster(num_cpus=1, include_dashboard=True, dashboard_port=0) as second:
        where = "local" if started_here else second.address
        environment = {**os.environ, "RAY_ADDRESS": where}
        done = subprocess.run(
            [sys.executable, "-c", FIND_ITSELF], env=environment, capture_output=True, text=True, timeout=300
        )
    assert done.stdout.strip() == says, done.stderr


def test_what_a_submitted_job_says_of_its_environment_is_kept(monkeypatch):
    from prefvec_ray.common.cluster import _own_cluster

    assert _own_cluster("10.0.0.1:6379") == {"RAY_ADDRESS": "10.0.0.1:6379", "RAY_API_SERVER_ADDRESS": ""}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {"env_vars": {"RAY_ADDRESS": "head:6379"}}}')
    assert _own_cluster("10.0.0.1:6379") == {"RAY_API_SERVER_ADDRESS": ""}


def test_what_no_machine_can_hold_is_refused_at_once(ray_cluster):
    from prefvec_ray.common.scheduling import check_room

    check_room("a run", [{"CPU": 1}] * 4)
    with pytest.raises(InputError, match=r"a run needs 1 GPU, and this cluster can never give it: it has \d+ CPUs"):
        check_room("a run", [{"GPU": 1}])
    with pytest.raises(InputError, match="a run needs 64 CPUs"):
        check_room("a run", [{"CPU": 64}])
    with pytest.raises(InputError, match=r"a run needs 99 x \(1 CPU and 1 far\)"):
        check_room("a run", [{"CPU": 1, "far": 1}] * 99)


def test_a_wait_names_what_is_missing_and_who_holds_it(ray_cluster):
    import ray

    from prefvec_ray.common.scheduling import Waiting

    class Holder:
        def here(self) -> None:
            pass

    actor = ray.remote(Holder)

    free = ray.available_resources().get("CPU", 0.0)  # the cluster is shared with other tests
    holder = actor.options(num_cpus=free).remote()
    ray.get(holder.here.remote(), timeout=120)
    waits = actor.options(num_cpus=1).remote()
    shown = io.StringIO()
    wait = Waiting(Console(file=shown, width=400), "measuring", [{"CPU": 1}])
    wait.poll()
    assert not shown.getvalue(), "nothing in the first seconds"
    try:
        # Ray's own count of demands is some seconds old.
        deadline = wait.began + 120
        while not wait._starving() and time.monotonic() < deadline:
            time.sleep(0.2)
        wait.next = 0.0
        wait.poll()
    finally:
        ray.kill(holder)
        ray.kill(waits)
    assert "measuring waits for 1 CPU: the cluster has" in shown.getvalue()
    assert "free 0 CPUs" in shown.getvalue()
    assert "by this job" in shown.getvalue()
    assert "Holder" in shown.getvalue()


def test_bundles_are_placed_whole():
    from prefvec_ray.common.scheduling import _place, describe

    nodes = [{"CPU": 4.0}, {"CPU": 2.0, "GPU": 1.0}]
    assert _place([{"CPU": 4}, {"CPU": 2, "GPU": 1}], nodes)
    assert not _place([{"CPU": 3}, {"CPU": 3}], nodes), "6 CPUs, but not 3 and 3"
    assert not _place([{"CPU": 5}], nodes)
    assert describe([{"CPU": 1, "GPU": 1}] * 2 + [{"CPU": 3}]) == "2 x (1 CPU and 1 GPU) and 3 CPUs"
