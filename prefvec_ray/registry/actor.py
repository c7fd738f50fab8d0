"""The registry actor: one writer in front of a store, found by name from anywhere in the cluster.

    client = start_registry("runs/registry")            # detached: outlives this driver
    client.publish_vector("vectors/helpful")            # bytes go to the store, not through the actor
    client.name                                         # prefvec-registry-1a2b3c4d: named after the store
    client = RegistryClient.connect(name)               # later, elsewhere; on the command line: --registry ray:<name>

One cluster has room for many registries, since every actor is named after its store (`actor_name`).
The actor keeps all records in memory and loses nothing when it dies: Ray restarts it, it takes the lease
again and reads the records back. Calls that were under way are repeated by Ray, which is safe because
`Catalog`'s methods are.
"""

import functools
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.util import metrics
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from prefvec_ray.common.cluster import NAMESPACE, raise_cause
from prefvec_ray.common.errors import InputError
from prefvec_ray.registry.cache import NodeCache
from prefvec_ray.registry.catalog import Catalog
from prefvec_ray.registry.errors import StoreError
from prefvec_ray.registry.lease import Lease
from prefvec_ray.registry.names import THROUGH_RAY
from prefvec_ray.registry.registry import Blobs, Registry, user
from prefvec_ray.registry.running import actor_name, end, listing, running_registries
from prefvec_ray.registry.store import Store
from prefvec_ray.registry.transport import RayBlobs, run_on

REQUESTED = ("set_alias", "set_tags")
"""operations that carry the id of their request, so that one that is repeated changes nothing"""
SIGNED = ("commit_vector", "publish_preset", *REQUESTED)
"""operations that record who asked for them"""


class RegistryActor:
    """The process in front of the store. Use it through `RegistryClient`."""

    def __init__(self, root: str, ttl_s: float, settle_s: float):
        context = ray.get_runtime_context()
        self.store = Store.open(root, create=False)
        owner = f"actor {context.get_actor_name()} ({context.get_actor_id()})"  # the same after every restart
        self.lease = Lease(self.store, owner, ttl_s=ttl_s, settle_s=settle_s, lasting=True)
        self.node_id = context.get_node_id()
        self.started = time.time()
        self.publishes = 0
        self._catalog: Catalog | None = None
        tags = {"registry": context.get_actor_name() or ""}
        self._vectors = _metric(metrics.Gauge, "prefvec_registry_vectors", "published versions", tags)
        self._bytes = _metric(metrics.Gauge, "prefvec_registry_bytes", "bytes of all blobs", tags)
        self._publishes = _metric(metrics.Counter, "prefvec_registry_publishes", "versions committed", tags)
        self._latency = metrics.Histogram(
            "prefvec_registry_latency_s",
            "time in the actor by method",
            boundaries=[0.0001, 0.001, 0.01, 0.1, 1, 10],
            tag_keys=("registry", "method"),
        )
        self._latency.set_default_tags(tags)

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operation of the catalog, by name."""
        began = time.perf_counter()
        try:
            result = self._ready().perform(method, args, kwargs)
            if method in ("commit_vector", "gc"):
                self._count(method)
            return result
        finally:
            self._latency.observe(time.perf_counter() - began, {"method": method})

    def root(self) -> dict[str, str]:
        """Where the store is, also while this actor cannot write to it."""
        return {"uri": self.store.uri, "label": self.store.label}

    def leave(self) -> None:
        """Give back the lease, so that the next writer need not wait. The next call takes it again."""
        self.lease.release()

    def where(self) -> dict[str, str]:
        """Which store this is, and on which node it is reached."""
        self._ready()
        return {
            "uri": self.store.uri,
            "label": self.store.label,
            "uid": self.store.uid,
            "node_id": self.node_id,
        }

    def health(self) -> dict[str, Any]:
        """Is the lease held, since when does this process run, how much is in the store?"""
        catalog, claim = self._ready(), self.lease.claim()
        return {
            "root": self.store.label,
            "lease": claim.model_dump(include={"owner", "host", "pid", "epoch"}) if claim else {},
            "started": self.started,
            "publishes": self.publishes,
            "vectors": sum(len(catalog.versions(name)) for name in catalog.names()),
            "presets": len(catalog.names("presets")),
        }

    def _ready(self) -> Catalog:
        """The catalog. The first call, and the first one after a lost lease, takes the lease and reads the records."""
        if self._catalog is None or not self.lease.live:
            self.lease.release()
            self.lease.acquire(wait_s=5.0 if self.store.folder is not None else self.lease.ttl_s + 5.0)
            self.store.load_mirror()
            self._catalog = Catalog(self.store, self.lease)
            self._count("start")
        return self._catalog

    def _count(self, why: str) -> None:
        assert self._catalog is not None
        self._vectors.set(sum(len(self.store.children(f"vectors/{name}")) for name in self._catalog.names()))
        if why == "commit_vector":
            self.publishes += 1
            self._publishes.inc()
        else:
            self._bytes.set(sum(size for size, _ in self.store.blobs().values()))


class RemoteCatalog:
    """The catalog of a registry actor: its operations by name, from any process of the cluster."""

    def __init__(self, actor: Any, name: str, timeout_s: float):
        self.actor, self.name, self.timeout_s = actor, name, timeout_s

    def perform(self, operation: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As `Catalog.perform`, in the actor."""
        if operation in REQUESTED:
            kwargs.setdefault("request", uuid.uuid4().hex)
        if operation in SIGNED:
            kwargs.setdefault("creator", user())
        return self.ask(self.actor.call.remote(operation, args, kwargs))

    def ask(self, answer: Any) -> Any:
        """The value of an answer of the actor. StoreError where it does not come; its own errors as it raised them."""
        try:
            with raise_cause(InputError, StoreError):
                return ray.get(answer, timeout=self.timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise StoreError(f"the registry actor did not answer within {self.timeout_s} s; is its node up?") from None
        except ray.exceptions.ActorDiedError as error:
            raise StoreError(f"the registry actor {self.name} is gone; start_registry(root) again ({error})") from None


class RegistryClient(Registry):
    """`Registry` through its actor: the same methods, from any driver, task or replica, to which it can be sent."""

    catalog: RemoteCatalog

    def __init__(self, actor: Any, name: str, *, cache: NodeCache | None, transport: str, timeout_s: float):
        self.actor, self.name, self.transport = actor, name, transport
        catalog = RemoteCatalog(actor, name, timeout_s)
        where = catalog.ask(actor.where.remote())
        store = Store(where["uri"])
        if transport not in ("auto", "storage", "ray"):
            raise InputError(f"transport '{transport}': expected 'auto', 'storage' or 'ray'")
        self.reachable = transport == "storage" or (transport == "auto" and _reaches(store, where["uid"]))
        blobs: Blobs = store if self.reachable else RayBlobs(lambda: catalog.ask(actor.where.remote()))
        super().__init__(catalog, store, Lease(store, "client"), blobs, cache or NodeCache())

    @classmethod
    def connect(
        cls,
        name: str | None = None,
        *,
        namespace: str = NAMESPACE,
        cache: NodeCache | None = None,
        transport: str = "auto",
        timeout_s: float = 300.0,
    ) -> "RegistryClient":
        """The client of a running registry; without a name, of the only one that runs.

        `transport`: bytes straight from the storage, through Ray's object store (`"ray"`), or as this node can
        (`"auto"`: storage if the very same store is seen at its root). InputError where no such actor runs.
        """
        if name is None:
            running = running_registries(namespace)
            if len(running) != 1:
                raise InputError(f"name one registry: {listing(running)}")
            (name,) = running
        try:
            actor = ray.get_actor(name, namespace)
        except ValueError:
            raise InputError(f"no registry actor '{name}': {listing(running_registries(namespace))}") from None
        return cls(actor, name, cache=cache, transport=transport, timeout_s=timeout_s)

    def fetch(self, ref: str) -> Path:
        misses = self.cache.misses
        folder = super().fetch(ref)
        _cache_counter("misses" if self.cache.misses > misses else "hits").inc()
        return folder

    def health(self) -> dict[str, Any]:
        """What `RegistryActor.health` says."""
        return self.catalog.ask(self.actor.health.remote())

    def stop(self) -> None:
        """End the actor for good. The store keeps everything."""
        end(self.actor, self.name)

    def _on_store_node(self, function: Callable[[Store], Any]) -> Any:
        """`function(store)` where the store is reached: here, or in a task beside the actor."""
        if self.reachable:
            return function(self.store)
        where = self.catalog.ask(self.actor.where.remote())
        return self.catalog.ask(run_on(where["node_id"], function, where["uri"]))

    def __reduce__(self) -> Any:
        return _rejoin, (self.actor, self.name, self.transport, self.catalog.timeout_s)


def _rejoin(actor: Any, name: str, transport: str, timeout_s: float) -> RegistryClient:
    return RegistryClient(actor, name, cache=None, transport=transport, timeout_s=timeout_s)


def start_registry(
    root: str | Path,
    *,
    name: str | None = None,
    namespace: str = NAMESPACE,
    cache: NodeCache | None = None,
    ttl_s: float = 15.0,
    settle_s: float = 1.0,
) -> RegistryClient:
    """Start the registry of `root`, or join the one that runs. It outlives the driver, and Ray restarts it whenever
    it dies.

    An empty or missing root becomes a registry. The actor is named after its store (`actor_name`) unless a `name` is
    given. `ray:<name>` as root only joins. A folder's actor stays on the node where this is called, since that node
    sees the folder. Raises InputError where an actor of this name serves another root, and where another process
    writes to this one.
    """
    if str(root).startswith(THROUGH_RAY):
        found = str(root).removeprefix(THROUGH_RAY)
        return RegistryClient.connect(found or None, namespace=namespace, cache=cache)
    store = Store.open(root)
    store.begin()
    name = name or actor_name(store)
    try:
        actor, started = ray.get_actor(name, namespace), False
    except ValueError:
        actor, started = _start(store, name, namespace, ttl_s, settle_s), True
    try:
        client = RegistryClient(actor, name, cache=cache, transport="auto", timeout_s=300.0)
    except InputError:  # the store is another writer's: leave no actor behind that can do nothing
        if started:
            end(actor, name, namespace)
        raise
    if client.store.uri != store.uri and not _reaches(store, client.store.uid if client.reachable else ""):
        raise InputError(
            f"registry actor '{name}' serves {client.store.label}, not {store.label}; use that root or another name"
        )
    return client


def _start(store: Store, name: str, namespace: str, ttl_s: float, settle_s: float) -> Any:
    """The handle of a new actor, or of the one that another caller started at the same moment."""
    on_this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return (
        ray.remote(RegistryActor)
        .options(
            name=name,
            namespace=namespace,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_task_retries=-1,
            num_cpus=0,
            enable_task_events=False,  # thousands of calls a second would crowd the cluster's event log
            scheduling_strategy="DEFAULT" if store.folder is None else on_this_node,
        )
        .remote(store.uri, ttl_s, settle_s)
    )


@functools.cache
def _cache_counter(kind: str) -> metrics.Counter:
    """Counters of this process: how often a fetch found its version on the node."""
    return metrics.Counter(f"prefvec_registry_cache_{kind}", f"cache {kind} of fetches on this node")


def _reaches(store: Store, uid: str) -> bool:
    """Is the store at this path the one that the actor has?"""
    try:
        return store.uid == uid
    except (StoreError, InputError, OSError):
        return False


def _metric(kind: Any, name: str, description: str, tags: dict[str, str]) -> Any:
    metric = kind(name, description, tag_keys=tuple(tags))
    metric.set_default_tags(tags)
    return metric
