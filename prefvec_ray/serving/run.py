"""Starting and stopping the endpoint from Python: what `prefvec serve` and the demo call."""

import logging
import os
import time
from typing import TYPE_CHECKING

from prefvec_ray.errors import InputError
from prefvec_ray.serving.config import THROUGH_RAY, ServingConfig

if TYPE_CHECKING:
    from prefvec_ray.serving.lineup import Lineup

APP = "prefvec"


def start(config: ServingConfig, *, host: str = "127.0.0.1", port: int = 8000) -> str:
    """Deploy on the running Ray cluster (a local one is started where there is none) and wait until the endpoint
    answers. Returns its base URL for OpenAI clients, `http://<host>:<port>/v1`.

    Raises InputError where the config, the base or the vectors are wrong, before anything is deployed, and where
    Serve already listens elsewhere; RuntimeError where the replicas do not come up.
    """
    import httpx
    import ray
    from ray import serve
    from ray.serve.schema import LoggingConfig

    from prefvec_ray.serving import guard
    from prefvec_ray.serving.app import build_app

    # A mistake in the config is told before the seconds that a cluster takes, unless the registry is an actor of it.
    through_ray = config.registry.startswith(THROUGH_RAY)
    app = None if through_ray else build_app(config)
    if not ray.is_initialized():
        os.environ.setdefault(guard.SETTING, guard.PATH)
        ray.init(namespace="prefvec", log_to_driver=False)
    app = app or build_app(config)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # what Serve tells of starting, this function returns
    proxy_logs = LoggingConfig(log_level=config.logs.level, enable_access_log=config.logs.access)
    serve.start(http_options={"host": host, "port": port}, logging_config=proxy_logs)
    serve.run(app, name=APP, route_prefix="/")
    url = f"http://{host}:{port}/v1"
    try:
        # Serve ignores a port asked for when it already runs, so ask the endpoint itself; its proxy may come a moment
        # later than its replicas.
        with httpx.Client(transport=httpx.HTTPTransport(retries=5), timeout=30) as client:
            response = client.get(f"{url}/models/{config.model}")
        served = response.is_success or response.status_code == httpx.codes.UNAUTHORIZED
    except httpx.TransportError:
        served = False
    if not served:
        raise InputError(f"nothing answers at {url}: Serve runs on another port, or the port is taken; stop that")
    return url


def roll_out(config: ServingConfig) -> "Lineup":
    """Bring the vectors that `config.vectors` names now to every replica of the running endpoint, or to none.

    Returns what is served from now on. Raises InputError where no endpoint runs, where `config` differs from the
    running one in more than its vectors, and where a vector, a key or a replica does not take the new lineup: then the
    old one goes on.
    """
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    if not ray.is_initialized():
        ray.init(address="auto", namespace="prefvec", log_to_driver=False)
    try:
        front = serve.get_deployment_handle("front", APP)
        lineup: Lineup = front.roll_out.remote(config.absolute()).result()
    except RayServeException as error:
        raise InputError(f"no endpoint runs as application {APP!r} ({error}); `prefvec serve` starts one") from None
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise InputError(str(error.cause)) from None
        raise
    return lineup


def stop() -> None:
    """Take the endpoint down, and Serve with it. Does nothing where none runs."""
    from ray import serve

    serve.shutdown()


def serve_forever(config: ServingConfig, *, host: str = "127.0.0.1", port: int = 8000) -> None:
    """`start`, then wait for Ctrl-C and `stop`."""
    print(f"serving {config.model} at {start(config, host=host, port=port)} (Ctrl-C stops it)")
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        pass
    finally:
        stop()
