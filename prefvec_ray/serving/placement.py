"""Where an endpoint goes on a cluster that others use too: its route, and whether its name, host and port are free.

Everything here looks and refuses; nothing is changed.
"""

import ray

from prefvec_ray.common.errors import InputError
from prefvec_ray.serving.config import ServingConfig
from prefvec_ray.serving.http.ingress import PREFIX, Address, bind, ingress_address
from prefvec_ray.serving.instance import RunningApp, ServeInstance


def choose_route(found: ServeInstance | None, config: ServingConfig, name: str, asked: Address, replace: bool) -> str:
    """The route that the application gets on Serve's port. InputError where something else is in the way."""
    if found is None:
        _check_free(asked, found)
        return "/"
    host, port = asked
    at = _address(name, found)
    if name in found.apps and not replace:
        _check_same(found.apps[name], config, at, asked)
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
    if ingress_address(name) != asked:
        _check_free(asked, found)
    proxy_url(found)
    if _is_loopback(asked.host) and not _is_loopback(found.host):
        raise InputError(
            f"Ray Serve listens at {found.host}:{found.port} on this cluster, so other machines could reach the"
            f" endpoint there (under {route}); give --host {found.host} if that is meant"
        )
    return route


def _check_same(app: RunningApp, config: ServingConfig, at: Address | None, asked: Address) -> None:
    """InputError unless the running application is of this very config and address."""
    where = f" at {at.host}:{at.port}" if at else ""
    advice = "give another --name, or --replace to put this one in its place"
    if app.status == "DELETING":
        raise InputError(f"the application {app.name!r} is being deleted; try again when `serve status` has it no more")
    if app.config is None:
        raise InputError(f"an application {app.name!r} of somebody else runs on this cluster; {advice}")
    if at != asked:
        raise InputError(f"the endpoint {app.name!r} runs already{where}; {advice}, or its own --host and --port")
    ours, theirs = config.absolute().model_dump(mode="json"), app.config
    if other := sorted(field for field in ours.keys() | theirs.keys() if ours.get(field) != theirs.get(field)):
        raise InputError(
            f"the endpoint {app.name!r} runs already{where} with another config ({', '.join(other)}); {advice}"
        )


def _address(name: str, found: ServeInstance) -> Address | None:
    """Where an application answers; None where it has no address of its own."""
    app = found.apps.get(name)
    if app is not None and app.route == "/":
        return Address(found.host, found.port)
    return ingress_address(name)


def endpoints(found: ServeInstance | None) -> str:
    """The endpoints of the cluster, for an error message."""
    names = [name for name, app in found.apps.items() if app.config is not None] if found else []
    return f"those that run are {', '.join(names)}" if names else "there is no endpoint on this cluster"


def _check_free(asked: Address, found: ServeInstance | None) -> None:
    """InputError where the address is taken on this node; names the endpoint that has it, if it is one."""
    for name in found.apps if found else ():
        if found and _address(name, found) == asked:
            raise InputError(
                f"port {asked.port} on {asked.host} belongs to the endpoint {name!r}; choose another --port"
            )
    bind(*asked).close()


def proxy_url(found: ServeInstance) -> str:
    """`http://host:port` of a proxy of Serve, as this node reaches it."""
    everywhere = found.host in ("0.0.0.0", "::", "")
    address = "127.0.0.1" if everywhere else found.host
    if ray.get_runtime_context().get_node_id() not in found.proxies:
        if _is_loopback(found.host) or not found.proxies:
            nodes = ", ".join(found.proxies.values()) or "no node"
            raise InputError(f"Ray Serve listens on {found.host} of {nodes} only; run this command there")
        address = next(iter(found.proxies.values())) if everywhere else found.host
    return f"http://[{address}]:{found.port}" if ":" in address else f"http://{address}:{found.port}"


def _is_loopback(host: str) -> bool:
    return host.startswith("127.") or host in ("localhost", "::1")
