"""Starting and stopping an endpoint from Python: what `prefvec serve` and the demo call.

Several endpoints, and applications of others, can live on one cluster. Each endpoint is a Serve application under a
name, and what is started, failed or stopped here touches the application of that name and no other.
"""

import contextlib
import logging
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from prefvec_ray.common.cluster import connect, end_by_sigterm, join, raise_cause
from prefvec_ray.common.errors import InputError, JobError, from_traceback
from prefvec_ray.common.names import Name
from prefvec_ray.common.scheduling import Waiting, bundle_of, check_room
from prefvec_ray.registry.names import THROUGH_RAY
from prefvec_ray.serving.config import ServingConfig

if TYPE_CHECKING:
    from prefvec_ray.serving.instance import RunningApp
    from prefvec_ray.serving.release.release import Release

APP = "prefvec"
REACH_SECONDS = 60.0
"""for Serve's proxy to find the way to replicas that are ready"""
DELETE_SECONDS = 60.0
LOOK_SECONDS = 5.0
"""`serve_forever` looks this often whether its application still runs"""
POLL_SECONDS = 0.2

_deployed: dict[str, "_Endpoint"] = {}
"""what this process deployed, by name"""
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
    where the replicas do not come up. Whatever is raised, KeyboardInterrupt and SystemExit included, the application
    `name` is deleted if its deployment had begun, and no other.
    """
    new = _Endpoint(config, name, host, port)
    new.check()
    console = console or Console(quiet=True)
    connect(console)
    return _deploy(new, replace, console)


def roll_out(config: ServingConfig, *, name: str = APP) -> "Release":
    """Bring the vectors that `config.vectors` names now to every replica of the running endpoint, or to none.

    Returns what is served from now on. Raises InputError where no endpoint of this name runs, where `config` differs
    from the running one in more than its vectors, and where a vector, a key or a replica does not take the new release:
    then the old one goes on.
    """
    from ray import serve

    from prefvec_ray.serving.instance import inspect_serve
    from prefvec_ray.serving.placement import endpoints

    join()
    found = inspect_serve()
    app = found.apps.get(name) if found else None
    if app is None or app.config is None:
        raise InputError(f"no endpoint {name!r} runs: {endpoints(found)}; `prefvec serve --name {name}` starts one")
    with raise_cause(InputError):
        release: Release = serve.get_deployment_handle("front", name).roll_out.remote(config.absolute()).result()
    return release


def stop(name: str = APP) -> None:
    """Take the endpoint `name` down, and wait for it at most a minute. Does nothing where none runs, or where another
    process has deployed it anew since this one did.

    Serve itself ends too where this process started it and no other application runs.
    """
    from prefvec_ray.serving.http.ingress import close_ingress
    from prefvec_ray.serving.instance import inspect_serve, shut_down_serve

    found = inspect_serve()
    ours = _deployed.pop(name, None)
    if found is None:
        return
    app, others = found.apps.get(name), set(found.apps) - {name}
    if app is None or ours is None or ours.deployment == app.deployment:
        close_ingress(name)
        if app is not None:
            _delete(name)
    else:
        others.add(name)  # it is somebody else's now
    if found.controller in _started and not others:
        shut_down_serve()
        _started.discard(found.controller)


def serve_forever(name: str = APP) -> None:
    """Keep the endpoint that this process started until Ctrl-C or SIGTERM (`ray job stop`), then `stop` it and return.

    Raises JobError where the application was deleted or replaced by somebody else.
    """
    ours = _deployed[name]
    try:
        end_by_sigterm()  # also where the caller has joined the cluster itself
        print(f"serving {ours.config.model} as {name!r} at {ours.url} (Ctrl-C stops it)", flush=True)
        _wait_while_ours(ours)
    except (KeyboardInterrupt, SystemExit):
        pass
    finally:
        stop(name)


@dataclass
class _Endpoint:
    """What is to be deployed. `release` is found before the cluster is joined, where that does without it."""

    config: ServingConfig
    name: str
    host: str
    port: int
    deployment: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    release: "Release | None" = None

    @property
    def bundles(self) -> list[dict[str, float]]:
        """What the replicas that it begins with need."""
        return [bundle_of(needs) for needs in self.config.bundles] * max(1, self.config.replicas.min)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}/v1"

    def check(self) -> None:
        """InputError for what is wrong with the name, the port or the config: before the seconds that a cluster takes,
        unless the registry is an actor there."""
        try:
            TypeAdapter(Name).validate_python(self.name)
        except ValidationError:
            raise InputError(
                f"name {self.name!r}: expected a letter or digit, then at most 63 letters, digits, '.', '_' or '-'"
            ) from None
        if not 0 < self.port < 65_536:
            raise InputError(f"port {self.port}: expected a number from 1 to 65535")
        if not self.config.registry.startswith(THROUGH_RAY):
            self.resolve()

    def resolve(self) -> "Release":
        from prefvec_ray.serving.http.app import checked

        self.release = self.release or checked(self.config, self.deployment)
        return self.release


def _deploy(new: _Endpoint, replace: bool, console: Console) -> str:
    """`start` on the cluster that this process is in."""
    from ray import serve
    from ray.serve.schema import LoggingConfig

    from prefvec_ray.serving.http.app import application
    from prefvec_ray.serving.http.ingress import Address, close_ingress, open_ingress
    from prefvec_ray.serving.instance import inspect_serve
    from prefvec_ray.serving.placement import choose_route, proxy_url

    app = application(new.config, new.resolve())
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # what Serve reports of starting, this function returns
    found = inspect_serve()
    route = choose_route(found, new.config, new.name, Address(new.host, new.port), replace)
    check_room(f"endpoint {new.name!r}", new.bundles)
    _deployed[new.name] = new
    try:
        if found is None:
            logs = LoggingConfig(log_level=new.config.logs.level, enable_access_log=new.config.logs.access)
            serve.start(http_options={"host": new.host, "port": new.port}, logging_config=logs)
            if started := inspect_serve():
                _started.add(started.controller)
        _deployed.pop(new.name)  # Serve shows the new deployment a moment late: what has the name now is to be deleted
        # The wait for replicas is `_await_running`, which can say what it waits for.
        serve.run_many([serve.RunTarget(app, new.name, route)], wait_for_applications_running=False)
        _await_running(new, console)
        _deployed[new.name] = new
        if route == "/":
            close_ingress(new.name)
        elif found is not None:
            open_ingress(new.name, Address(new.host, new.port), proxy_url(found), route)
        _await_answer(new.url, new.config.model)
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to see
            stop(new.name)
        raise
    return new.url


def _await_running(new: "_Endpoint", console: Console) -> None:
    """Until every deployment of the application has the replicas that it wants. JobError where one fails."""
    from prefvec_ray.serving.instance import app_status, inspect_serve

    name = new.name
    wait = Waiting(console, f"endpoint {name!r}", new.bundles)
    while (status := app_status(name)) != "RUNNING":
        if status in ("DEPLOY_FAILED", "NOT_STARTED", "DELETING", "UNHEALTHY"):
            found = inspect_serve()
            app = found.apps.get(name) if found else None
            raise JobError(f"the endpoint {name!r} did not start: {_why(app)}")
        wait.poll()
        time.sleep(POLL_SECONDS)


def _why(app: "RunningApp | None") -> str:
    """The last line of what Serve says of a failed application: of a traceback, the error."""
    if app is None:
        return "somebody deleted it meanwhile"
    messages = [message for message in app.deployments.values() if "Error" in message or "failed" in message]
    lines = [line.strip() for message in [app.message, *messages] for line in message.splitlines() if line.strip()]
    return from_traceback(lines[-1])[:1000] if lines else "no reason given"


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


def _wait_while_ours(ours: _Endpoint) -> None:
    """For as long as the application is the one that this process deployed."""
    from prefvec_ray.serving.instance import inspect_serve

    while True:
        time.sleep(LOOK_SECONDS)
        found = inspect_serve()
        app = found.apps.get(ours.name) if found else None
        if app is None or app.status == "DELETING":
            raise JobError(f"the endpoint {ours.name!r} was deleted by somebody else")
        if app.deployment != ours.deployment:
            raise JobError(f"the endpoint {ours.name!r} was deployed anew by somebody else, who stops it now")
