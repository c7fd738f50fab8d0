"""The releases that one replica can answer for: which vectors its engine holds, and until when."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path

from prefvec_ray.common.errors import InputError
from prefvec_ray.common.paths import check_visible
from prefvec_ray.registry import VectorVersion, open_registry
from prefvec_ray.registry.cache import entry_key
from prefvec_ray.serving.engines.base import EngineError
from prefvec_ray.serving.release.release import Release, ServedVector, check_unchanged
from prefvec_ray.serving.release.rollout import ReleaseBook
from prefvec_ray.serving.request import ReleaseId
from prefvec_ray.vectors import PreferenceVector, load_vector


class LoadedReleases:
    """A replica begins with the release that its book says is committed. It learns others by `prepare`, or when a
    request is of one that it does not have yet. Vectors that no running request needs are dropped at the next change.

    `change` gives the engine these vectors and no others; `try_out` generates a token with a release.
    """

    def __init__(
        self,
        base: Path,
        registry: str,
        first: Release,
        book: ReleaseBook | None,
        change: Callable[[Mapping[str, PreferenceVector]], Awaitable[None]],
        try_out: Callable[[Release], Awaitable[None]],
    ):
        self._base, self._where, self._first, self._book = base, registry, first, book
        self._change, self._try_out = change, try_out
        self._running: Counter[ReleaseId] = Counter()
        """requests, by release"""
        self._changing = asyncio.Lock()
        self._unfit: Exception | None = None
        self._fetched: dict[str, VectorVersion] = {}
        """what is pinned in the node's cache, by column"""
        self.vectors: dict[str, PreferenceVector] = {}
        """what the engine has, by column"""
        self._releases: dict[ReleaseId, Release] = {}

    def begin(self) -> Release:
        """Read the release that is served now, and its vectors, which the engine is to start with. Blocks.

        Raises JobError, before anything is loaded, where this node does not see the base or the registry's folder, and
        InputError where the base is no longer what it was at deployment.
        """
        check_visible(self._base, *([] if ":" in self._where else [self._where]))
        self._registry = open_registry(self._where)
        release = (self._book and self._book.newest()) or self._first
        self.vectors = self._loaded([release])
        self._releases = {release.id: release}
        check_unchanged(self._base, release.served_base)
        return release

    def check(self) -> None:
        """Raises EngineError where this replica could not load what is served."""
        if self._unfit:
            raise EngineError(f"this replica cannot load the release that is served: {self._unfit}")

    @contextlib.asynccontextmanager
    async def running(self, wanted: ReleaseId) -> AsyncIterator[Release]:
        """The release of a request, whose vectors stay while this block runs. Raises EngineError where it cannot be
        served here."""
        if wanted not in self._releases:
            async with self._changing:
                if wanted not in self._releases:
                    await self._catch_up(wanted)
        release = self._releases[wanted]
        self._running[wanted] += 1
        try:
            yield release
        finally:
            self._running[wanted] -= 1

    async def prepare(self, release: Release, beside: ReleaseId) -> None:
        """Load this release beside the release `beside` and those of running requests, and generate a token with it.

        Running requests go on. Raises InputError or StoreError where it cannot be loaded; nothing has changed then.
        """
        async with self._changing:
            await self._learn(release, beside)

    async def _catch_up(self, wanted: ReleaseId) -> None:
        """Load a release that was committed while this replica started or before it did, or one of the deployment
        before this one or after it."""
        found = self._first if wanted == self._first.id else None
        if found is None and self._book:
            found = await asyncio.to_thread(self._book.read, wanted)
        if found is None or found.served_base != self._first.served_base:
            raise EngineError(f"no release of generation {wanted[1]} was committed for this base")
        try:
            await self._learn(found, next(reversed(self._releases)))  # the one learned last
        except Exception as error:
            if found.deployment == self._first.deployment:
                self._unfit = error
            raise EngineError(f"generation {wanted[1]} cannot be served here: {error}") from error

    async def _learn(self, release: Release, beside: ReleaseId) -> None:
        before = self._releases
        try:
            new = await asyncio.to_thread(self._loaded, [release])
            used = {beside, *(name for name, running in self._running.items() if running)}
            # Requests of what is dropped may come meanwhile: they wait, and load it again.
            self._releases = {name: known for name, known in before.items() if name in used}
            vectors = self._loaded(list(self._releases.values())) | new
            await self._change(vectors)
            self.vectors = vectors
        except BaseException:
            self._releases = before
            raise
        finally:
            self._unpin_unused()
        await self._try_out(release)
        self._releases[release.id] = release

    def _loaded(self, releases: list[Release]) -> dict[str, PreferenceVector]:
        """The vectors of these releases under their engine's names; those that are loaded are not read again.

        Raises InputError where a reference no longer is the vector that it was when the release was resolved.
        """
        known, vectors = self.vectors, {}
        for release in releases:
            for name, vector in release.vectors.items():
                column = release.column(name)
                if column not in vectors:
                    vectors[column] = known[column] if column in known else self._load(column, vector)
        return vectors

    def _load(self, column: str, vector: ServedVector) -> PreferenceVector:
        found = self._registry.resolve(vector.ref)
        if found.digest != vector.digest:
            raise InputError(f"{vector.ref} is another vector in {self._where} than at the roll-out; resolve again")
        self._fetched[column] = found
        return load_vector(self._registry.fetch(vector.ref))

    def _unpin_unused(self) -> None:
        """Release the node's cache of vectors that the engine no longer has, or never got. Several may share files."""
        unused = self._fetched.keys() - self.vectors.keys()
        dropped = [self._fetched.pop(column) for column in unused]
        kept = {entry_key(version) for version in self._fetched.values()}
        for version in dropped:
            if entry_key(version) not in kept:
                self._registry.cache.unpin(version)
