"""Which replica answers a request: where each holds one merged model, one that has its coefficients already; where each
keeps a prefix cache, one that has read its beginning at these coefficients.

Every setting has an order of the replicas of its own (rendezvous hashing, Thaler & Ravishankar 1998), the same in every
process, and one that a replica's coming or going disturbs only where it is first. Requests go to the first replica of
the order that has room: as many as its fair share of all running requests and a quarter more (consistent hashing with
bounded loads, Mirrokni et al., arXiv 1608.01350). So a setting stays where it is merged, callers who differ spread
over the replicas, and a hot setting takes as many replicas as its load needs. The same holds for prompts that begin
alike. (Ray Serve LLM's prefix-aware router asks an actor twice for each request, and does not know settings.)
"""

import hashlib
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from prefvec_ray.serving.request import PassedRequest, ReplicaRequest

ROOM = 1.25
"""times the fair share that one replica takes before a setting spills over to its next"""
FEW = 4
"""requests that a replica takes at any rate: in one batch they cost hardly more than one, other weights do"""
OPENING = 1000
"""characters, or token ids, that a prompt must have in common with another to go where that one went"""
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

    def key(self, request: ReplicaRequest) -> Hashable:
        """Equal for requests that belong to one replica."""
        return request.release, request.coefficients

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of one replica each, best first; Serve takes the first that is not full."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # all are in the ranks: nothing to widen
        queued = self.replica_queue_len_cache
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        loads = {name: queued.get(replica.replica_id) or 0 for name, replica in replicas.items()}
        return [[replicas[name]] for name in preferred(self._key_of(pending_request), loads)]

    def _key_of(self, pending: PendingRequest | None) -> Hashable:
        arguments = pending.args if pending else ()
        found: Sequence[ReplicaRequest] = [each for each in arguments if isinstance(each, ReplicaRequest)]
        return self.key(found[0]) if found else None


class PrefixRouter(SettingRouter):
    """For replicas of vLLM, whose cached blocks are of one setting each: the turns of a conversation stay together, and
    so do prompts under one system message."""

    def key(self, request: ReplicaRequest) -> Hashable:
        opening = opening_of(request.body) if isinstance(request, PassedRequest) else ""
        return super().key(request), opening


def opening_of(body: Mapping[str, Any]) -> str:
    """How the prompt of OpenAI's body begins: a chat's first message, which all of its turns have, or the first
    prompt."""
    found = body.get("messages") or body.get("prompt") or ""
    while isinstance(found, list | tuple) and found and not isinstance(found[0], int):
        found = found[0]
    content = found.get("content") if isinstance(found, Mapping) else found
    return content[:OPENING] if isinstance(content, str) else repr((content or [])[:OPENING])[: 8 * OPENING]
