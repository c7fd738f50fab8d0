"""What serving records in the registry: which versions it uses, so that none is collected, and what each fingerprint
stands for, so that an answer can be traced back."""

import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from prefvec_ray.common.errors import InputError
from prefvec_ray.registry import Registry, StoreError
from prefvec_ray.serving.engines.base import Coefficients
from prefvec_ray.serving.release.release import Release

log = logging.getLogger("ray.serve")

MOST_RECORDED = 10_000
"""fingerprints that one front writes down; with free coefficients there is no end of them"""
MOST_OF_A_CALLER = 1_000
"""of them that come from one caller, so that none uses up what others need"""


class ServingRecords:
    """The registry's records of one deployment, under the holder's name `serve-<deployment>`.

    Serving goes on where the registry cannot be written (a read-only mount, say): then the log has a warning.
    """

    def __init__(self, registry: Registry, deployment: str):
        self._registry, self.holder = registry, f"serve-{deployment}"
        self._seen: set[str] = set()
        self._holds = False
        self._by_caller: Counter[str] = Counter()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="serving-records")

    def hold(self, *releases: Release) -> None:
        """Keep the vectors of these releases, and of no others, from `retire` and `gc`."""
        self._holds = True
        refs = sorted({vector.ref for release in releases for vector in release.vectors.values()})
        try:
            self._registry.hold(self.holder, refs)
        except (InputError, StoreError, OSError) as error:
            log.warning("the registry does not know that %s are served: %s", ", ".join(refs), error)

    def note(self, fingerprint: str, release: Release, coefficients: Coefficients, caller: str) -> None:
        """Write down, some time soon, what the fingerprint of an answer that was given stands for. Costs nothing when
        it is known."""
        full = len(self._seen) >= MOST_RECORDED or self._by_caller[caller] >= MOST_OF_A_CALLER
        if fingerprint in self._seen or full:
            return
        self._seen.add(fingerprint)
        self._by_caller[caller] += 1
        if self._by_caller[caller] == MOST_OF_A_CALLER:
            log.warning("%s: %d fingerprints are recorded; further ones are not", caller, MOST_OF_A_CALLER)
        if len(self._seen) == MOST_RECORDED:
            log.warning("%d fingerprints are recorded; further ones are not until the next start", MOST_RECORDED)
        self._writer.submit(self._record, fingerprint, release, coefficients)

    def close(self) -> None:
        """Write what waits, and give up what was held here."""
        self._writer.shutdown()
        if not self._holds:
            return
        try:
            self._registry.release(self.holder)
        except (InputError, StoreError, OSError) as error:
            log.warning("the registry still holds what %s served: %s", self.holder, error)

    def _record(self, fingerprint: str, release: Release, coefficients: Coefficients) -> None:
        etas: dict[str, float] = {}
        for name, eta in coefficients:  # two names may stand for one vector: their coefficients add up
            ref = release.vectors[name].ref
            etas[ref] = etas.get(ref, 0.0) + eta
        try:
            self._registry.record_served(etas, base_fingerprint=release.base_fingerprint, quantized=release.quantized)
        except (InputError, StoreError, OSError) as error:
            self._seen.discard(fingerprint)
            log.warning("served fingerprint %s could not be recorded: %s", fingerprint, error)
