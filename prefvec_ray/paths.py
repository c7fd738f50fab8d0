"""Whether this machine sees a path that the others see: what every worker checks before it loads anything. No Ray."""

import os
import socket
from pathlib import Path

from prefvec_ray.errors import JobError


def check_visible(*paths: str | Path) -> None:
    """Pass if this node sees every path, a file or a folder that is not empty (an unmounted folder is empty).

    Raises:
        JobError: it does not; the line names the node and the path. Another attempt would only repeat it.
    """
    for path in map(Path, paths):
        try:
            seen = any(path.iterdir()) if path.is_dir() else path.exists()
            why = ""
        except OSError as error:  # a stale mount, or no permission
            seen, why = False, f" ({error.strerror})"
        if not seen:
            raise JobError(f"node {this_node()} does not see {path}{why}: is the storage mounted there?")


def this_node() -> str:
    """Host name and address of this machine: `gpu-2 (10.0.0.2)`; the name alone where it has no network.

    In a pod the host name is the pod's name.
    """
    name = os.uname().nodename
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address reserved for documentation: UDP sends nothing to connect
        except OSError:
            return name
        return f"{name} ({probe.getsockname()[0]})"
