"""Starting and stopping an endpoint from Python: what `prefvec serve` and the demo call.

Several endpoints, and applications of others, can live on one cluster. Each endpoint is a Serve application under a
name, and what is started, failed or stopped here touches the application of that name and no other.
"""

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from prefvec_ray.cluster import connect
from prefvec_ray.errors import InputError, JobError
from prefvec_ray.registry.locate import THROUGH_RAY, join_ray
from prefvec_ray.serving.config import Name, ServingConfig

if TYPE_CHECKING:
    from prefvec_ray.serving.instance import RunningApp, ServeInstance
    from prefvec_ray.serving.lineup import Lineup

APP = "prefvec"
ASK_SECONDS = 15.0
"""for a running endpoint to say which config it serves"""
REACH_SECONDS = 60.0
"""for Serve's proxy to find the way to replicas that are ready"""
DELETE_SECONDS = 60.0
LOOK_SECONDS = 5.0
"""`serve_forever` looks this often whether its application still runs"""
POLL_SECONDS = 0.2

_deployed: dict[str, float] = {}
"""name -> time of the deployment that this process made"""
_started: set[str] = set()
"""the Serve instances that this process started"""


def start(
    config: ServingConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str = APP,
    replace: bool = False,
    console: Console | None = None,
) -> str:
    """Deploy as the Serve application `name` on the running Ray cluster (a local one is started where there is none)
    and wait until the endpoint answers. Returns its base URL for OpenAI clients, `http://<host>:<port>/v1`.

    The first endpoint of a cluster starts Serve on its port. Where Serve listens on another port already, the endpoint
    gets `port` for itself through an ingress (`ingress.py`).

    Raises InputError before anything is touched where the config, the base or the vectors are wrong, the port is taken,
    or an application of this name runs that is not of this very config and address, unless `replace`. Raises JobError
    where the replicas do not come up. Whatever is raised, the application `name` is deleted if its deployment had
    begun, and no other.
    """
    app = _build(config, name, port)
    connect(console)
    return _deploy(app or _build_app(config), config, host, port, name, replace)


def roll_out(config: ServingConfig, *, name: str = APP) -> "Lineup":
    """Bring the vectors that `config.vectors` names now to every replica of the running endpoint, or to none.

    Returns what is served from now on. Raises InputError where no endpoint of this name runs, where `config` differs
    from the running one in more than its vectors, and where a vector, a key or a replica does not take the new lineup:
    then the old one goes on.
    """
    import ray
    from ray import serve

    from prefvec_ray.serving.instance import inspect_serve

    join_ray()
    found = inspect_serve()
    if found is None or not _is_endpoint(found.apps.get(name)):
        raise InputError(f"no endpoint {name!r} runs: {_running(found)}; `prefvec serve --name {name}` starts one")
    try:
        lineup: Lineup = serve.get_deployment_handle("front", name).roll_out.remote(config.absolute()).result()
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise InputError(str(error.cause)) from None
        raise
    return lineup


def stop(name: str = APP) -> None:
    """Take the endpoint `name` down, and wait for it at most a minute. Does nothing where none runs, or where another
    process has deployed it anew since this one did.

    Serve itself ends too where this process started it and no other application runs.
    """
    from prefvec_ray.serving.ingress import close_ingress
    from prefvec_ray.serving.instance import inspect_serve, shut_down_serve

    found = inspect_serve()
    ours = _deployed.pop(name, None)
    if found is None:
        return
    app, others = found.apps.get(name), set(found.apps) - {name}
    if app is None or ours in (None, app.deployed):
        close_ingress(name)
        if app is not None:
            _delete(name)
    else:
        others.add(name)  # it is somebody else's now
    if found.controller in _started and not others:
        shut_down_serve()
        _started.discard(found.controller)


def serve_forever(
    config: ServingConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str = APP,
    replace: bool = False,
    console: Console | None = None,
) -> None:
    """`start`, wait for Ctrl-C or SIGTERM (`ray job stop`), and `stop`; returns then.

    Interrupted while it starts, it removes what it deployed and raises KeyboardInterrupt, or SystemExit(143) after
    SIGTERM. Raises JobError where the application was deleted or replaced by somebody else.
    """
    app = _build(config, name, port)
    connect(console)
    with _terminable():
        url = _deploy(app or _build_app(config), config, host, port, name, replace)
        try:
            print(f"serving {config.model} as {name!r} at {url} (Ctrl-C stops it)", flush=True)
            _wait_while_ours(name)
        except (KeyboardInterrupt, SystemExit):
            pass
        finally:
            stop(name)


def _build(config: ServingConfig, name: str, port: int) -> Any:
    """The application, or None where building it needs the cluster: a mistake in the config is reported before the
    seconds that a cluster takes."""
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise InputError(
            f"name {name!r}: expected a letter or digit, then at most 63 letters, digits, '.', '_' or '-'"
        ) from None
    if not 0 < port < 65_536:
        raise InputError(f"port {port}: expected a number from 1 to 65535")
    return None if config.registry.startswith(THROUGH_RAY) else _build_app(config)


def _build_app(config: ServingConfig) -> Any:
    from prefvec_ray.serving.app import build_app

    return build_app(config)


def _deploy(app: Any, config: ServingConfig, host: str, port: int, name: str, replace: bool) -> str:
    from ray import serve
    from ray.serve.schema import LoggingConfig

    from prefvec_ray.serving.ingress import Address, close_ingress, open_ingress
    from prefvec_ray.serving.instance import inspect_serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # what Serve reports of starting, this function returns
    found = inspect_serve()
    route = _route(found, config, host, port, name, replace)
    url = f"http://{host}:{port}/v1"
    try:
        if found is None:
            proxy_logs = LoggingConfig(log_level=config.logs.level, enable_access_log=config.logs.access)
            serve.start(http_options={"host": host, "port": port}, logging_config=proxy_logs)
            if started := inspect_serve():
                _started.add(started.controller)
        # The wait for replicas is `_await_running`, which can say what it waits for.
        serve.run_many([serve.RunTarget(app, name, route)], wait_for_applications_running=False)
        if deployed := inspect_serve():
            _deployed[name] = deployed.apps[name].deployed
        _await_running(name)
        if route == "/":
            close_ingress(name)
        elif found is not None:
            open_ingress(name, Address(host, port), _target(found), route)
        _await_answer(url, config.model)
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to see
            stop(name)
        raise
    return url


def _route(found: "ServeInstance | None", config: ServingConfig, host: str, port: int, name: str, replace: bool) -> str:
    """The route that the application gets on Serve's port. InputError where something else is in the way."""
    from prefvec_ray.serving.ingress import PREFIX, Address, ingress_address

    if found is None:
        _check_free(host, port, found)
        return "/"
    at = _address(name, found)
    if name in found.apps and not replace:
        _check_same(found.apps[name], config, at, Address(host, port))
    if port == found.port:
        if host != found.host:
            raise InputError(
                f"Ray Serve listens at {found.host}:{port} on this cluster, not at {host}: give --host {found.host}, or"
                " another --port"
            )
        if (other := found.app_at("/")) not in (None, name):
            raise InputError(
                f"port {port} is Ray Serve's on this cluster, and the application {other!r} answers there; choose"
                " another --port"
            )
        return "/"
    route = f"{PREFIX}/{name}"
    if (other := found.app_at(route)) not in (None, name):
        raise InputError(f"the application {other!r} has the route {route}; choose another --name")
    if ingress_address(name) != Address(host, port):
        _check_free(host, port, found)
    _target(found)
    return route


def _check_same(app: "RunningApp", config: ServingConfig, at: Any, asked: Any) -> None:
    """InputError unless the running application is of this very config and address."""
    where = f" at {at.host}:{at.port}" if at else ""
    advice = "give another --name, or --replace to put this one in its place"
    if app.status == "DELETING":
        raise InputError(f"the application {app.name!r} is being deleted; try again when `serve status` has it no more")
    if not _is_endpoint(app):
        raise InputError(f"an application {app.name!r} of somebody else runs on this cluster; {advice}")
    if at != asked:
        raise InputError(f"the endpoint {app.name!r} runs already{where}; {advice}, or its own --host and --port")
    theirs = _served_config(app.name)
    if theirs is None:
        raise InputError(f"the endpoint {app.name!r} runs already{where} and does not say its config; {advice}")
    if theirs != config.absolute():
        ours = config.absolute().model_dump()
        other = ", ".join(field for field, value in theirs.model_dump().items() if value != ours[field])
        raise InputError(f"the endpoint {app.name!r} runs already{where} with another config ({other}); {advice}")


def _served_config(name: str) -> ServingConfig | None:
    """What a running endpoint was deployed with; None where it does not say."""
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        return serve.get_deployment_handle("front", name).served_config.remote().result(timeout_s=ASK_SECONDS)
    except (TimeoutError, RayServeException, ray.exceptions.RayError):
        return None


def _is_endpoint(app: "RunningApp | None") -> bool:
    """Was the application made by `build_app`?"""
    if app is None:
        return False
    return "front" in app.deployments and any(name.startswith("replica-") for name in app.deployments)


def _address(name: str, found: "ServeInstance") -> Any:
    """Where an application answers; None where it has no address of its own."""
    from prefvec_ray.serving.ingress import Address, ingress_address

    app = found.apps.get(name)
    if app is not None and app.route == "/":
        return Address(found.host, found.port)
    return ingress_address(name)


def _running(found: "ServeInstance | None") -> str:
    """The endpoints of the cluster, for an error message."""
    names = [name for name, app in found.apps.items() if _is_endpoint(app)] if found else []
    return f"those that run are {', '.join(names)}" if names else "there is no endpoint on this cluster"


def _check_free(host: str, port: int, found: "ServeInstance | None") -> None:
    """InputError where the address is taken on this node; names the endpoint that has it, if it is one."""
    from prefvec_ray.serving.ingress import Address, bind

    for name in found.apps if found else ():
        if found and _address(name, found) == Address(host, port):
            raise InputError(f"port {port} on {host} belongs to the endpoint {name!r}; choose another --port")
    bind(host, port).close()


def _target(found: "ServeInstance") -> str:
    """`http://host:port` of a proxy of Serve, as this node reaches it."""
    import ray

    everywhere = found.host in ("0.0.0.0", "::", "")
    local = found.host.startswith("127.") or found.host in ("localhost", "::1")
    address = "127.0.0.1" if everywhere else found.host
    if ray.get_runtime_context().get_node_id() not in found.proxies:
        if local or not found.proxies:
            nodes = ", ".join(found.proxies.values()) or "no node"
            raise InputError(f"Ray Serve listens on {found.host} of {nodes} only; run this command there")
        address = next(iter(found.proxies.values())) if everywhere else found.host
    return f"http://[{address}]:{found.port}" if ":" in address else f"http://{address}:{found.port}"


def _await_running(name: str) -> None:
    """Until every deployment of the application has the replicas that it wants. JobError where one fails."""
    from prefvec_ray.serving.instance import app_status, inspect_serve

    while (status := app_status(name)) != "RUNNING":
        if status in ("DEPLOY_FAILED", "NOT_STARTED", "DELETING", "UNHEALTHY"):
            found = inspect_serve()
            app = found.apps.get(name) if found else None
            raise JobError(f"the endpoint {name!r} did not start: {_why(app)}")
        time.sleep(POLL_SECONDS)


def _why(app: "RunningApp | None") -> str:
    """The last line of what Serve says of a failed application: of a traceback, the error."""
    if app is None:
        return "somebody deleted it meanwhile"
    messages = [message for message in app.deployments.values() if "Error" in message or "failed" in message]
    lines = [line.strip() for message in [app.message, *messages] for line in message.splitlines() if line.strip()]
    return lines[-1][:1000] if lines else "no reason given"


def _await_answer(url: str, model: str) -> None:
    """Until the endpoint itself answers at its URL. JobError where it does not."""
    import httpx

    until, said = time.monotonic() + REACH_SECONDS, ""
    with httpx.Client(timeout=30) as client:
        while time.monotonic() < until:
            try:
                response = client.get(f"{url}/models/{model}")
            except httpx.TransportError as error:
                said = str(error)
            else:
                if response.is_success or response.status_code == httpx.codes.UNAUTHORIZED:
                    return
                said = f"status {response.status_code}"
            time.sleep(POLL_SECONDS)
    raise JobError(f"the endpoint is deployed, but does not answer at {url} ({said}); is the port taken on that node?")


def _delete(name: str) -> None:
    """Delete an application. The order is given at once, since `ray job stop` leaves few seconds; then wait until it is
    gone."""
    from ray import serve

    from prefvec_ray.serving.instance import app_status

    serve.delete(name, _blocking=False)
    until = time.monotonic() + DELETE_SECONDS
    while app_status(name) != "NOT_STARTED":
        if time.monotonic() > until:
            print(f"{name!r} still ends the answers that it has begun; Serve deletes it then", flush=True)
            return
        time.sleep(POLL_SECONDS)


def _wait_while_ours(name: str) -> None:
    """For as long as the application is the one that this process deployed."""
    from prefvec_ray.serving.instance import inspect_serve

    while True:
        time.sleep(LOOK_SECONDS)
        found = inspect_serve()
        app = found.apps.get(name) if found else None
        if app is None or app.status == "DELETING":
            raise JobError(f"the endpoint {name!r} was deleted by somebody else")
        if app.deployed != _deployed.get(name):
            raise JobError(f"the endpoint {name!r} was deployed anew by somebody else, who stops it now")


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises SystemExit(143) in the main thread, so that what was deployed is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
