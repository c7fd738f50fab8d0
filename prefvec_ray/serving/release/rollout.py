"""Rolling out a new release: to every replica, or to none before it can reach all.

    prefvec roll-out --config serve_configs/tiny.yaml        # a vector was published, or an alias was moved

Two phases. *Prepare*: every replica loads the new vectors beside the old ones and generates a token with them; if one
cannot, the old release goes on. *Commit*: the release is written down under the next generation number, and requests
that come from then on carry that number. Those that have begun keep theirs, and what the engine computes and caches is
named by the vectors themselves (`Release.columns`), so generations never share a key, a value or a weight by mistake.

A committed release is kept in the cluster's own key-value store (Ray's GCS, as Serve's state is): a front or a replica
that is restarted begins with it, and lives as long as the cluster does.
"""

import asyncio
import logging
import pickle
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Protocol

from ray.exceptions import RayError
from ray.experimental import internal_kv
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from prefvec_ray.common.errors import InputError
from prefvec_ray.registry import Registry, StoreError
from prefvec_ray.serving.config import ServingConfig
from prefvec_ray.serving.release.records import ServingRecords
from prefvec_ray.serving.release.release import Release, resolve
from prefvec_ray.serving.request import ReleaseId

log = logging.getLogger("ray.serve")

PREPARE_SECONDS = 1800.0
"""for every replica to load the new vectors"""
SPACE = b"prefvec-releases"


class ReleaseBook:
    """The committed releases of one deployment, and what others committed. Usable in every process of a Ray cluster."""

    def __init__(self, deployment: str):
        self._deployment = deployment

    def read(self, release: ReleaseId) -> Release | None:
        """Any deployment's."""
        deployment, generation = release
        return ReleaseBook(deployment)._read(str(generation))

    def begin(self, release: Release) -> None:
        """What the deployment begins with."""
        self._write(str(release.generation), pickle.dumps(release))

    def newest(self) -> Release | None:
        """The committed release; None where the deployment still serves what it began with."""
        return self._read("newest")

    def next_generation(self) -> int:
        """A number that no attempt has had: a replica may remember one that came to nothing. One caller at a time."""
        number = int(internal_kv._internal_kv_get(self._key("attempts"), namespace=SPACE) or 0) + 1
        self._write("attempts", str(number).encode())
        return number

    def commit(self, release: Release) -> None:
        """From here on it is what restarted fronts and replicas begin with."""
        written = pickle.dumps(release)
        self._write(str(release.generation), written)  # first, so that whoever reads the number finds the release
        self._write("newest", written)

    def _read(self, key: str) -> Release | None:
        found = internal_kv._internal_kv_get(self._key(key), namespace=SPACE)
        return pickle.loads(found) if found else None

    def _write(self, key: str, value: bytes) -> None:
        internal_kv._internal_kv_put(self._key(key), value, overwrite=True, namespace=SPACE)

    def _key(self, key: str) -> bytes:
        return f"{self._deployment}/{key}".encode()


class Admits(Protocol):
    """What a roll-out needs of whoever lets requests in."""

    release: Release
    """what new requests get"""

    def check(self, release: Release) -> None:
        """Raises InputError where a key or a floor would lose its meaning with this release."""


class RollOut:
    """The half of the front, or of the coordinator of several: one change at a time, prepared by all replicas before
    any request gets it. `adopted` brings a committed release to whoever else lets requests in.

    A replica that starts meanwhile is not asked; should it be unable to load what was committed, it answers no request
    of that generation (503, which clients repeat), is unhealthy, and Serve replaces it.
    """

    def __init__(
        self,
        config: ServingConfig,
        registry: Registry,
        book: ReleaseBook,
        admission: Admits,
        records: ServingRecords,
        replicas: DeploymentHandle,
        adopted: Callable[[Release], Awaitable[None]] | None = None,
    ):
        self._config, self._registry, self._book, self._admission = config, registry, book, admission
        self._records, self._replicas, self._adopted = records, replicas, adopted
        self._one_at_a_time = asyncio.Lock()

    async def to(self, wanted: ServingConfig) -> Release:
        """Serve what `wanted.vectors` stand for now. Returns the release in force; an equal one changes nothing.

        Raises InputError where that cannot be served by every replica, or `wanted` differs in other settings too.
        """
        same = {"vectors": self._config.vectors, "follow_seconds": self._config.follow_seconds}
        ours, theirs = self._config.model_dump(), wanted.model_copy(update=same).model_dump()
        if other := [name for name in ours if ours[name] != theirs[name]]:
            raise InputError(f"{', '.join(other)}: only 'vectors' can be rolled out; deploy again for other settings")
        return await self._to(wanted)

    async def follow(self, seconds: float) -> None:
        """For ever: roll out what the references of the release in force have come to stand for."""
        while True:
            await asyncio.sleep(seconds)
            try:
                named = self._admission.release.named
                vectors = None if named is None else dict(named)
                await self._to(self._config.model_copy(update={"vectors": vectors}))
            except (InputError, StoreError, RayError) as error:
                log.warning("the old vectors are served on: %s", error)

    async def _to(self, wanted: ServingConfig) -> Release:
        async with self._one_at_a_time:
            before = self._admission.release
            found = await asyncio.to_thread(resolve, wanted, before.base_fingerprint, self._registry)
            found = replace(found, deployment=before.deployment, context=before.context, quantized=before.quantized)
            if found.vectors == before.vectors and found.named == before.named:
                return before
            await asyncio.to_thread(self._admission.check, found)
            after = replace(found, generation=self._book.next_generation())
            await asyncio.to_thread(self._records.hold, before, after)
            try:
                await self._prepared(after, before)
            except BaseException:
                await asyncio.to_thread(self._records.hold, before)
                raise
            self._book.commit(after)
            self._admission.release = after
            if self._adopted:
                await self._adopted(after)
            log.info("generation %d: %s", after.generation, ", ".join(v.ref for v in after.vectors.values()))
            return after

    async def _prepared(self, release: Release, beside: Release) -> None:
        asked = self._replicas.broadcast("prepare", release, beside=beside.id)
        try:
            await asked.results_async(timeout_s=PREPARE_SECONDS)
        except DeploymentUnavailableError:
            return  # none runs (scaled to zero): the next one starts with what is committed
        except Exception as error:  # the replica's own, or Ray's around it
            cause = getattr(error, "cause", None) or error
            raise InputError(f"a replica cannot prepare the new vectors, the old are served on: {cause}") from None
