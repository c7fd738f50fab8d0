"""The Ray Serve instance of the cluster: where it listens, what runs on it, and its end.

The one place that uses Serve's own client. Its public API tells neither the port nor the routes, and its `shutdown`
waits for an actor that ends meanwhile, which Ray reports as a failed task.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.context import _disconnect, _get_global_client
from ray.serve.schema import ApplicationDetails, ServeInstanceDetails

SHUTDOWN_SECONDS = 60.0
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class RunningApp:
    """One application. `config` and `deployment` (its identity) are None where it is not one of `build_app`."""

    name: str
    route: str | None
    status: str
    message: str
    config: Mapping[str, Any] | None
    deployment: str | None
    deployments: Mapping[str, str]
    """name -> what Serve says of it, empty where all is well"""


@dataclass(frozen=True)
class ServeInstance:
    """`controller` is the identity of this instance; `proxies` maps nodes with an HTTP proxy to their addresses."""

    controller: str
    host: str
    port: int
    proxies: Mapping[str, str]
    apps: Mapping[str, RunningApp]

    def app_at(self, route: str) -> str | None:
        """The application under exactly this route."""
        return next((name for name, app in self.apps.items() if app.route == route), None)


def inspect_serve() -> ServeInstance | None:
    """What runs on the cluster now; None where Serve does not."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return None
    details = ServeInstanceDetails(**client.get_serve_details())
    apps = {name: _running_app(app) for name, app in details.applications.items()}
    proxies = {node: str(proxy.node_ip) for node, proxy in details.proxies.items()}
    return ServeInstance(_identity(client), client.http_config.host, client.http_config.port, proxies, apps)


def _running_app(app: ApplicationDetails) -> RunningApp:
    front = app.deployments.get("front")
    about = front.deployment_config.user_config if front else None
    ours = about if isinstance(about, dict) and about.keys() == {"deployment", "config"} else {}
    messages = {name: state.message for name, state in app.deployments.items()}
    status = str(app.status.value)
    return RunningApp(
        app.name, app.route_prefix, status, app.message, ours.get("config"), ours.get("deployment"), messages
    )


def app_status(name: str) -> str:
    """`RUNNING`, `DEPLOYING`, `DEPLOY_FAILED`, …; `NOT_STARTED` where there is no such application. Cheap to ask."""
    client = _get_global_client(raise_if_no_controller_running=False)
    return "NOT_STARTED" if client is None else str(client.get_serve_status(name).app_status.status.value)


def shut_down_serve() -> None:
    """End Serve and wait until it is gone, at most a minute. Does nothing where it does not run."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return
    client.shutdown_cached_handles()
    ray.get(client._controller.graceful_shutdown.remote(wait=False))
    until = time.monotonic() + SHUTDOWN_SECONDS
    try:
        while time.monotonic() < until:
            ray.get_actor(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
            time.sleep(POLL_SECONDS)
    except ValueError:  # its name is gone
        pass
    _disconnect()


def _identity(client: Any) -> str:
    return client._controller._actor_id.hex()
