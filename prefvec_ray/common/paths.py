"""Whether a path is seen by this machine, and whether what is written there lasts. No Ray."""

import os
import re
import socket
from pathlib import Path

from prefvec_ray.common.errors import InputError, JobError

_SESSION = re.compile(r"session_(latest|\d{4}-\d\d-\d\d_.*)")
"""a folder that Ray makes for each cluster, and deletes"""


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


def check_lasting(**paths: str | Path | None) -> None:
    """Pass if nothing would be written into a folder that Ray deletes: a job's copy of `--working-dir` is one.

    Args:
        paths: name of the setting -> its path, relative ones included; addresses of buckets and None pass.

    Raises:
        InputError: one would; the line names the setting and the folder.
    """
    for name, path in paths.items():
        if path is None or re.match(r"[a-z0-9]+:", str(path)):
            continue
        if any(_SESSION.fullmatch(part) for part in Path(path).absolute().parts):
            raise InputError(
                f"{name} {path}: it would be written to {Path(path).absolute()}, which Ray deletes with the cluster; "
                "give an absolute path on storage that every node mounts"
            )
