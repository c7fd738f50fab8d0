"""Joining a Ray cluster, or starting one on this machine; and bars that behave on terminals and in job logs."""

import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from prefvec_ray.common.errors import InputError, JobError, from_traceback, message_lines

if TYPE_CHECKING:
    from ray.exceptions import RayError

NAMESPACE = "prefvec"

SERVE_GRPC = "RAY_SERVE_USE_GRPC_BY_DEFAULT"
SERVE_SETTINGS = {
    # What guards the proxies; see serving/http/middleware.py.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "prefvec_ray.serving.http.middleware:middlewares",
    # Requests and tokens go straight to the other process. As Ray objects they cost twice the processor time.
    SERVE_GRPC: "1",
}
"""Variables that Ray Serve's processes read as they start; on a cluster of `ray start` they are set before that."""

DEFAULTS = {
    # Workers inherit these. Ray Train's print patch writes a line for every line, and forked tokenizers warn.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Ray Train starts workers again that are not up in time, by default 60 s: where imports take longer (a busy node, a
    # slow file system) they would never be up.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
    "TOKENIZERS_PARALLELISM": "false",
    # A thread that is still at work when its command ends must not start a second cluster.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    # Ray warns in every process that it will leave the GPUs of a task without GPUs visible one day.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    **SERVE_SETTINGS,
}
CONNECT_SECONDS = 5.0
"""to reach a port that answers"""
FIRST_WORD = 9.0
"""seconds until a start that takes long is reported, and between reports"""
START_SECONDS = 15.0
"""after which a local Ray that has no process left is given up"""


def connect(console: Console | None = None) -> None:
    """Join the cluster of RAY_ADDRESS or of `ray start` on this machine, or start one here; once a process.

    This is the project's only `ray.init`. Where the cluster asks for a token, the one of RAY_AUTH_TOKEN,
    RAY_AUTH_TOKEN_PATH, `~/.ray/auth_token`, or of a cluster that this package started, is used, whichever is right. A
    cluster started here is guarded by a token of this package's own where the user has none: `~/.ray/auth_token`, which
    would make every later `ray start` ask for it, is left alone.

    Raises:
        InputError: RAY_ADDRESS is no address, leads nowhere or to a cluster that this process cannot join: a token that
            is refused, another version of Ray or Python, no node on this machine. Within 20 seconds.
        JobError: Ray did not start on this machine.
    """
    if _is_connected():
        return

    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    address = _address()
    context = _start(console) if address is None else _join(address)
    end_by_sigterm()
    if console is not None:
        import ray

        resources = ray.cluster_resources()
        cpus = resources.get("CPU", 0)
        gpus = f" and {resources['GPU']:g} GPUs" if resources.get("GPU") else ""
        where = context.dashboard_url or "off"
        console.print(f"   [dim]Ray cluster with {cpus:g} CPU{'' if cpus == 1 else 's'}{gpus}, dashboard {where}[/dim]")


def join() -> None:
    """Join the cluster of RAY_ADDRESS or of this machine, unless this process is in one already; start none.

    Raises:
        InputError: as `connect`, and where no cluster runs.
    """
    if not _is_connected() and os.environ.get("RAY_ADDRESS", "") in ("", "auto"):
        from ray._private.services import find_gcs_addresses

        if not find_gcs_addresses():
            raise InputError("no Ray cluster runs on this machine; start one (`ray start --head`), or set RAY_ADDRESS")
        os.environ["RAY_ADDRESS"] = "auto"
    connect()


def _is_connected() -> bool:
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


@contextmanager
def raise_cause(*kinds: type[Exception]) -> Iterator[None]:
    """Where a task, an actor or a replica raised one of `kinds`, raise that one instead of Ray's error around it, which
    quotes the remote traceback."""
    import ray

    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, kinds):
            raise error.cause from None
        raise


def end_by_sigterm() -> None:
    """Let SIGTERM (what `ray job stop` sends) raise SystemExit(143) in the main thread, as Ctrl-C raises
    KeyboardInterrupt: what was begun is ended. Ray's own handler prints a C++ trace and ends the process at once."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def _address() -> str | None:
    """`host:port` of the cluster to join; None to start one here."""
    given = os.environ.get("RAY_ADDRESS", "")
    if given == "local":
        return None
    if given not in ("", "auto"):
        return given
    from ray._private.services import find_bootstrap_address, find_gcs_addresses

    # What `ray start` left behind may be of a cluster that was killed, or lost with its machine.
    started = find_bootstrap_address(None)
    if started is not None and _unreachable(started) is None:
        return started
    if given == "auto":
        running = next(iter(find_gcs_addresses()), None)
        if running is None:
            raise InputError(
                "RAY_ADDRESS is 'auto', and no Ray cluster runs on this machine: start one with `ray start --head`, or "
                "unset RAY_ADDRESS"
            )
        return running
    return None


def _join(address: str) -> Any:
    import ray
    from ray._private.services import find_node_ids

    _check_address(address)
    _choose_token(address)
    if not find_node_ids():
        raise InputError(
            f"this machine runs no node of the Ray cluster at {address}: run the command on one of its nodes, submit "
            f"it with `ray job submit`, or join with `ray start --address={address}`"
        )
    own = {"env_vars": _own_cluster(address)}
    try:
        return ray.init(address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR", runtime_env=own)
    except RuntimeError as error:
        if "ersion mismatch" not in str(error):
            raise InputError(f"the Ray cluster at {address} cannot be joined: {_one_line(error)}") from None
        raise InputError(
            f"the Ray cluster at {address} has other versions than this process: {_one_line(error)[:400]}; use the "
            "environment that the cluster was started from"
        ) from None
    except (ConnectionError, ValueError, ray.exceptions.RayError) as error:
        raise InputError(f"the Ray cluster at {address} cannot be joined: {_one_line(error)}") from None


def _own_cluster(address: str) -> dict[str, str]:
    """Environment variables of this job's processes, by which they ask the API of the cluster that they run on.

    Ray Train asks it whether the controller of a run lives, and kills the run's workers where it does not. A node that
    was started in a shell with RAY_API_SERVER_ADDRESS or RAY_ADDRESS of another cluster asked that one, and so did the
    nodes of a second cluster on one machine. What the submitter of a job has set is kept.
    """
    from ray._private.services import canonicalize_bootstrap_address

    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("runtime_env", {})
    given = submitted.get("env_vars") or {}
    own = {"RAY_ADDRESS": canonicalize_bootstrap_address(address) or address, "RAY_API_SERVER_ADDRESS": ""}
    return {name: value for name, value in own.items() if name not in given}


def _check_address(address: str) -> None:
    what = f"RAY_ADDRESS is {address!r}" if os.environ.get("RAY_ADDRESS") == address else f"Ray cluster {address!r}"
    if address.startswith("ray://"):
        raise InputError(
            f"{what}: Ray Client is not supported; submit a job, or give host:6379 on a node of the cluster"
        )
    if address.startswith(("http://", "https://")):
        raise InputError(
            f"{what}, where jobs are submitted to: set RAY_API_SERVER_ADDRESS to it for `ray job submit`, and "
            "RAY_ADDRESS to host:6379 or nothing"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f"{what}: expected host:port, such as 10.0.0.1:6379")
    why = _unreachable(address)
    if why is not None:
        raise InputError(f"{what}, and nothing answers there ({why}): start the cluster, correct it, or unset it")


def _unreachable(address: str) -> str | None:
    """Why no connection can be opened to `host:port`; None where one can."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS):
            return None
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)


def own_token() -> Path:
    """The file of the token that guards clusters started by this package."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefvec-ray" / "ray_auth_token"


def _choose_token(address: str) -> None:
    """Set Ray's environment variables so that the cluster's token, where it asks for one, is used."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled" or _accepts(address, None):
        return
    tried = []
    for where, token in _tokens():
        if _accepts(address, token):
            os.environ["RAY_AUTH_MODE"] = "token"
            os.environ.pop("RAY_AUTH_TOKEN", None)
            os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
            name = "RAY_AUTH_TOKEN" if where == "RAY_AUTH_TOKEN" else "RAY_AUTH_TOKEN_PATH"
            os.environ[name] = token if where == "RAY_AUTH_TOKEN" else where
            _reload_authentication()
            return
        tried.append(where)
    found = f"refuses the one of {', '.join(tried)}" if tried else "none was found here"
    raise InputError(
        f"the Ray cluster at {address} asks for a token, and {found}: copy ~/.ray/auth_token from its head node, or "
        "set RAY_AUTH_TOKEN_PATH to a copy"
    )


def _tokens() -> Iterator[tuple[str, str]]:
    """Where a token was found, and the token, best guess first."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        yield "RAY_AUTH_TOKEN", token
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    for path in [Path(given)] if given else [], [Path.home() / ".ray" / "auth_token", own_token()]:
        for file in path:
            with suppress(OSError, UnicodeDecodeError):
                if token := file.read_text().strip():
                    yield str(file), token


def _accepts(address: str, token: str | None) -> bool:
    """Whether the cluster answers to this token. True also where that cannot be told: joining it will show."""
    try:
        import grpc
        from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
    except ImportError:
        return True
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        ask = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).GetAllNodeInfo
        try:
            ask(gcs_service_pb2.GetAllNodeInfoRequest(limit=1), timeout=CONNECT_SECONDS, metadata=metadata)
        except grpc.RpcError as error:
            return error.code() != grpc.StatusCode.UNAUTHENTICATED
    return True


def _reload_authentication() -> None:
    """Let a Ray that is already imported read its authentication variables again."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _guard_with_own_token() -> None:
    """Let a cluster that starts now ask for this package's token, unless the user has a token or has decided."""
    decided = any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if decided or (Path.home() / ".ray" / "auth_token").exists():
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    path = own_token()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            suppress(FileExistsError),
            os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as new,
        ):
            new.write(secrets.token_hex(32))
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
    except OSError:  # a home that cannot be written: nobody else will join this cluster
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    _reload_authentication()


def _start(console: Console | None) -> Any:
    """Start a cluster of this process, with the CPUs that this process may use."""
    import ray

    _guard_with_own_token()
    os.environ.pop("RAY_API_SERVER_ADDRESS", None)  # of another cluster: see _own_cluster
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process a run; this machine is all there is
    allowed, all_of_them = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    cpus = {"num_cpus": allowed} if allowed < all_of_them else {}
    try:
        with _watched_start(console):
            return ray.init("local", namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR", **cpus)
    except JobError:
        raise
    except Exception as error:  # Ray raises bare ones here
        logs = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "session_latest" / "logs"
        raise JobError(
            f"Ray did not start on this machine: {_one_line(error)[:400]}; look at {logs}, and at free memory, disk "
            f"space in {logs.parents[2]} and `ulimit -a`"
        ) from None


@contextmanager
def _watched_start(console: Console | None) -> Iterator[None]:
    """Says after ten seconds that Ray is still starting, and gives up when none of its processes is left."""
    import psutil

    over, given_up = threading.Event(), threading.Event()
    began = time.monotonic()
    out = console or Console(stderr=True, highlight=False)
    main = threading.current_thread() is threading.main_thread()

    def watch() -> None:
        import _thread

        said = began
        while not over.wait(1.0):
            now = time.monotonic()
            names = {child.name() for child in psutil.Process().children(recursive=True)}
            if main and now - began > START_SECONDS and not names & {"gcs_server", "raylet"}:
                given_up.set()
                _thread.interrupt_main()
                return
            if now - said > FIRST_WORD:
                said = now
                out.print(f"   [dim]Ray is starting on this machine ({now - began:.0f} s)[/dim]")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if given_up.is_set():
            raise RuntimeError("its processes ended while they started") from None
        raise
    finally:
        over.set()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def reason(error: "RayError") -> str:
    """In a line, why a task or an actor failed: what its own code raised, else what Ray says first."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, InputError | JobError):
        return str(cause)
    if cause is not None:
        return f"{type(cause).__name__}: {' '.join(str(cause).split())}"[:1000]
    lines = message_lines(error)
    if lines and "creation task" in lines[0]:  # of an actor that could not be made Ray shows the traceback
        return from_traceback(lines[-1])
    return f"{type(error).__name__}: {lost_because(error) if lines else 'no reason given'}"


def lost_because(error: BaseException) -> str:
    """In a line, why a process was lost: what Ray knows of its end, where it says that; else its first line."""
    lines = message_lines(error) or [type(error).__name__]
    known = next((line for line in lines if line.startswith("The actor is dead because ")), lines[0])
    return known.removeprefix("The actor is dead because ")[:300]


@contextmanager
def progress_bar(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A function to call with (done, total): a bar on a terminal, a line every ten seconds elsewhere."""
    if not console.is_terminal:
        last = time.monotonic()

        def line(done: int, total: int) -> None:
            nonlocal last
            if done == total or time.monotonic() - last > 10:
                last = time.monotonic()
                console.print(f"   {done}/{total} {what}")

        yield line
        return
    columns = TextColumn("   {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
