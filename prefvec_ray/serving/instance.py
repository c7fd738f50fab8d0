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
from ray.serve.schema import ServeInstanceDetails

SHUTDOWN_SECONDS = 60.0
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class RunningApp:
    """One application. `deployed` is the time of its deployment, in seconds since 1970: another time, another one."""

    name: str
    route: str | None
    status: str
    message: str
    deployed: float
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
    apps = {
        name: RunningApp(
            name,
            app.route_prefix,
            str(app.status.value),
            app.message,
            app.last_deployed_time_s,
            {deployment: state.message for deployment, state in app.deployments.items()},
        )
        for name, app in details.applications.items()
    }
    proxies = {node: str(proxy.node_ip) for node, proxy in details.proxies.items()}
    return ServeInstance(_identity(client), client.http_config.host, client.http_config.port, proxies, apps)


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
