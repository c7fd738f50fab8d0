"""Which replica answers a request, where replicas hold one merged model each: one that has its coefficients already.

Every setting has an order of the replicas of its own (rendezvous hashing, Thaler & Ravishankar 1998), the same in every
process, and one that a replica's coming or going disturbs only where it is first. Requests go to the first replica of
the order that has room: as many as its fair share of all running requests and a quarter more (consistent hashing with
bounded loads, Mirrokni et al., arXiv 1608.01350). So a setting stays where it is merged, callers who differ spread
over the replicas, and a hot setting takes as many replicas as its load needs.
"""

import hashlib
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from prefvec_ray.serving.request import ReplicaRequest

ROOM = 1.25
"""times the fair share that one replica takes before a setting spills over to its next"""
FEW = 4
"""requests that a replica takes at any rate: in one batch they cost hardly more than one, other weights do"""
R = TypeVar("R", bound=Hashable)


def preferred(setting: Hashable, loads: Mapping[R, int], room: float = ROOM) -> list[R]:
    """The replicas in the order in which a request of this setting should try them; `loads`: replica -> running
    requests. First those with room, by the setting's own order, then the others by load."""
    bound = max(FEW, math.ceil(room * (sum(loads.values()) + 1) / max(len(loads), 1)))
    order = sorted(loads, key=lambda replica: _weight(setting, replica))
    return sorted(order, key=lambda replica: 0 if loads[replica] < bound else loads[replica])


def _weight(setting: Hashable, replica: Hashable) -> bytes:
    return hashlib.blake2b(repr((setting, replica)).encode(), digest_size=8).digest()


class SettingRouter(RequestRouter):
    """Ray Serve's choice of replicas by `preferred`. Its interface is marked alpha; what it counts on is tested."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of one replica each, best first; Serve takes the first that is not full."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # all are in the ranks: nothing to widen
        queued = self.replica_queue_len_cache
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        loads = {name: queued.get(replica.replica_id) or 0 for name, replica in replicas.items()}
        return [[replicas[name]] for name in preferred(_setting(pending_request), loads)]


def _setting(request: PendingRequest | None) -> Hashable:
    arguments = request.args if request else ()
    found: Sequence[ReplicaRequest] = [each for each in arguments if isinstance(each, ReplicaRequest)]
    return (found[0].release, found[0].coefficients) if found else None
