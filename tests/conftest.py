"""What all tests share: a Ray cluster, one finished micro demo, and an offline, quiet environment for every process.

`make test` runs the suite in two processes of pytest-xdist: most of its time goes into starting Ray's processes.
Tests that share what is dear stay together: those of one Ray cluster, those around the demo, else those of a file.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before torch, transformers or ray are imported by any test: their processes inherit it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # as on a cluster that the command starts itself
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")  # a machine that others fill is no reason to kill a worker
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # every worker would compile the project again
os.environ["RAY_ADDRESS"] = "local"  # a process that a test starts never joins another cluster of this machine

# A suite in the background ignores Ctrl-C, and so would every process that it starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis
import psutil
import pytest
import torch
from filelock import FileLock

ROOT = Path(__file__).parents[1]

torch.set_num_threads(1)
hypothesis.settings.register_profile("no limit of time", deadline=None)
hypothesis.settings.load_profile("no limit of time")


DEAREST_FIRST = ["demo", "training", "ray"]


def group(path: Path) -> str:
    """Which process of the suite a test file runs in, told by the dear things that it names."""
    text, folder = path.read_text(), path.parent.name
    cluster = "ray_cluster" in text or (folder == "serving" and "endpoint" in text)
    if "demo_run" in text or (cluster and folder == "tests"):
        return "demo"
    if cluster:
        return "training" if folder == "training" else "ray"
    return str(path)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="also what is too long for every suite; writes the tables that tests make"
    )
    parser.addoption("--quick", action="store_true", help="no cluster, no browser, nothing that is marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with what takes longest."""
    groups = {path: group(path) for path in {item.path for item in items}}
    if config.getoption("--quick"):
        far = {path for path in groups if "ray.init" in path.read_text()}
        kept = [
            item
            for item in items
            if groups[item.path] not in DEAREST_FIRST
            and item.path not in far
            and not {"new_cluster", "browser", "demo_run"} & set(item.fixturenames)  # type: ignore[attr-defined]
            and not item.get_closest_marker("slow")
        ]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept
    clusters = {"machine", "new_cluster", "blind_node"}
    slow = {item.path for item in items if clusters & set(item.fixturenames)}  # type: ignore[attr-defined]
    items.sort(key=lambda item: ((*DEAREST_FIRST, groups[item.path]).index(groups[item.path]), item.path not in slow))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the files of a group in one process."""
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(config.rootpath / nodeid.partition("::")[0])

    return Together(config, log)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """One cluster of 4 logical CPUs for all tests of a process, in namespace `prefvec`; the value: its dashboard's URL.

    Its job agent listens on a port of its own: another cluster of this machine may have the usual one.
    """
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()  # a command that a test ran in this process may have started one
    head = {"num_cpus": 4, "include_dashboard": True, "dashboard_port": 0, "dashboard_agent_listen_port": free_port()}
    head["include_log_monitor"] = False  # nobody reads what it forwards
    cluster = Cluster(initialize_head=True, head_node_args=head)
    context = ray.init(cluster.address, namespace="prefvec", log_to_driver=False)
    os.environ["RAY_API_SERVER_ADDRESS"] = f"http://{context.dashboard_url}"  # what a job is submitted to
    yield f"http://{context.dashboard_url}"
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="session")
def new_cluster() -> Callable[..., AbstractContextManager[Any]]:
    """`with new_cluster(num_cpus=1) as cluster`: a `ray.cluster_utils.Cluster` of a test's own, to lose nodes of."""

    @contextmanager
    def started(**head: Any) -> Iterator[Any]:
        import ray
        from ray.cluster_utils import Cluster
        from ray.experimental import internal_kv

        cluster = Cluster(initialize_head=True, head_node_args={"include_log_monitor": False, **head})
        try:
            yield cluster
        finally:
            cluster.shutdown()
            if ray.is_initialized():  # its end also cuts this process's tie to the cluster that all tests share
                internal_kv._initialize_internal_kv(ray._private.worker.global_worker.gcs_client)

    return started


BLIND = """
mount --make-rprivate / && mount -t tmpfs tmpfs "$2" && hostname blind
exec nice -n -10 "$0" -m ray.scripts.scripts start --address "$1" --num-cpus 1 --disable-usage-stats --block
"""


@pytest.fixture(scope="session")
def blind_node() -> Callable[[Any, Path], AbstractContextManager[None]]:
    """`with blind_node(cluster, folder)`: a node of one CPU, host name `blind`, on which `folder` is empty.

    Its raylet runs in a mount namespace of its own, as on a machine where the shared storage is not mounted. It comes
    first for the processors: Ray gives a raylet half a minute, also where other programs are at work.
    """

    @contextmanager
    def started(cluster: Any, folder: Path) -> Iterator[None]:
        unshare = ["unshare", "--mount", "--uts"]
        tried = subprocess.run([*unshare, "mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, text=True)
        if tried.returncode:
            pytest.skip(f"a mount namespace is not permitted here: {tried.stderr.strip()}")
        before = len(cluster.global_state.node_table())
        command = [*unshare, "bash", "-c", BLIND, sys.executable, cluster.address, str(folder)]

        def start() -> "subprocess.Popen[str]":
            pipe = subprocess.PIPE
            return subprocess.Popen(command, start_new_session=True, text=True, stdout=pipe, stderr=subprocess.STDOUT)

        raylet = start()
        try:
            until = time.monotonic() + 180
            while len(cluster.global_state.node_table()) == before:
                if time.monotonic() > until:
                    pytest.fail("no second node within three minutes")
                if raylet.poll() is not None:  # on a busy machine it may miss Ray's own limit of 30 s
                    raylet = start()
                time.sleep(0.2)
            yield
        finally:
            with suppress(ProcessLookupError):
                os.killpg(raylet.pid, signal.SIGKILL)
            raylet.wait()

    return started


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium. Where none is installed its tests are skipped; in CI (`CI` is set) they fail.

    One a file: while Playwright runs it keeps an event loop running in this thread, in which no test can start its own.
    """
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    path = next(filter(None, found), None)
    if path is None:
        words = "no Chromium is installed: apt-get install chromium"
        pytest.fail(words) if os.environ.get("CI") else pytest.skip(words)
    from playwright.sync_api import sync_playwright

    # Without these, Chromium asks Google's hosts at every start.
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=path, args=[*quiet, "--no-sandbox", "--disable-gpu", "--disable-quic"]
        )
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> dict[str, Any]:
    """The micro demo as its user runs it, in a process of its own: killed in the middle with SIGKILL, run again, and
    run a third time when it was finished.

    {"cwd", "folder", "killed", "resumed", "again"}: the folders, and what the three runs printed. All processes of the
    suite share one.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent
    told = shared / "demo_run.json"
    with FileLock(f"{told}.lock"):
        if not told.is_file():
            (shared / "demo").mkdir()
            told.write_text(json.dumps(_run_demo(shared / "demo")))
    run = json.loads(told.read_text())
    return run | {"cwd": Path(run["cwd"]), "folder": Path(run["folder"])}


def _run_demo(cwd: Path) -> dict[str, str]:
    command = [sys.executable, "-m", "prefvec_ray.cli", "demo", "--world", "micro"]
    folder = cwd / "runs" / "demo-micro"
    environment = {**os.environ, "COLUMNS": "150"}

    def run() -> str:
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    with (cwd / "killed.txt").open("w") as output:
        process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=output, stderr=output)
        until = time.monotonic() + 600
        while not (folder / "dpo").is_dir() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.2)
        process.kill()
        process.wait()
    killed = (cwd / "killed.txt").read_text()
    assert (folder / "dpo").is_dir(), killed
    return {"cwd": str(cwd), "folder": str(folder), "killed": killed, "resumed": run(), "again": run()}


@dataclass
class Machine:
    """A namespace to type commands in. `pid`: of a process inside; `project`: the folder to type them in."""

    pid: int
    home: Path
    project: Path

    def command(self, script: str) -> list[str]:
        enter = ["nsenter", "--target", str(self.pid), "--pid", "--net", "--mount"]
        path = f"{self.project / '.venv' / 'bin'}:/usr/sbin:/usr/bin:/sbin:/bin"
        quiet = ["HF_HUB_OFFLINE=1", "OMP_WAIT_POLICY=PASSIVE", "RAY_memory_monitor_refresh_ms=0", "COLUMNS=200"]
        alone = ["env", "-i", f"HOME={self.home}", f"PATH={path}", *quiet]
        return [*enter, f"--wd={self.project}", *alone, "bash", "-ec", script]

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(script), capture_output=True, text=True, timeout=600)

    def succeeds(self, script: str) -> str:
        done = self.run(script)
        assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
        return done.stdout

    def prints(self, script: str, wanted: str) -> None:
        """Run it until it prints `wanted`: an endpoint that was deployed takes a while to answer."""
        until = time.monotonic() + 180
        while wanted not in (done := self.run(script)).stdout:
            assert time.monotonic() < until, done.stdout + done.stderr
            time.sleep(1)


@pytest.fixture(scope="session")
def machine(demo_run: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine that has never seen Ray: a namespace of processes, network and mounts with a home folder of its own, so
    that `ray start`, its ports and `ray stop` touch no other cluster here. Its project holds a finished micro demo as
    `runs/demo`, and the project's configs with the micro world for the tiny one."""
    folder = tmp_path_factory.mktemp("machine")
    home, project, scratch = folder / "home", folder / "project", folder / "ray"
    for path in (home, project / "runs", scratch):
        path.mkdir(parents=True)
    (project / ".venv").symlink_to(sys.prefix)
    shutil.copy(ROOT / ".gitignore", project)
    for name in ("jobs", "serve_configs"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("demo", "demo-micro"):
        shutil.copytree(demo_run["folder"], project / "runs" / name)
    for path in (project / "jobs" / "configs").glob("tiny_*.yaml"):
        text = path.read_text().replace("tiny-world:tiny:", "tiny-world:micro:").replace("trials: 24", "trials: 6")
        path.write_text(text.replace("preferences.jsonl}", "preferences.jsonl, rows: 64}"))

    new = ["unshare", "--pid", "--net", "--mount", "--uts", "--fork", "--mount-proc", "--kill-child"]
    set_up = 'ip link set lo up && mkdir -p /tmp/ray && mount --bind "$0" /tmp/ray && echo up && exec sleep infinity'
    process = subprocess.Popen([*new, "bash", "-c", set_up, str(scratch)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if process.stdout.readline() != "up\n":
        pytest.skip("namespaces are not permitted here")
    (inside,) = psutil.Process(process.pid).children()
    yield Machine(inside.pid, home, project)
    process.kill()
    process.wait()
