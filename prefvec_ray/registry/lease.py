"""One writer per store: the lease.

In a folder, the lease is `flock(2)` on `lease/lock`: the kernel gives it to one process, and takes it back however that
process ends. It works on local disks and on network folders that support locks (NFSv4, Lustre with `flock`). Where a
lock does nothing, records still cannot overwrite each other (`Store._link`).

A bucket has no locks. There the lease is a small object. Candidates overwrite it and read it back after a pause
(Fischer's timed mutual exclusion, in Lamport, A Fast Mutual Exclusion Algorithm, 1987); its owner renews it by a
heartbeat. A candidate takes over only after it has seen no heartbeat for `ttl_s` by its own monotonic clock, so wall
clocks may jump. The lease is exclusive as long as a request arrives within `settle_s` or not at all. If one arrives
later, `verify` finds what went wrong.
"""

import contextlib
import fcntl
import os
import random
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import psutil

from prefvec_ray.common.atomic import make_folder
from prefvec_ray.common.errors import InputError
from prefvec_ray.registry.errors import LeaseLost, NoSpace, StoreError
from prefvec_ray.registry.records import LeaseClaim, decode, encode
from prefvec_ray.registry.store import Store

CLAIM = "lease/claim.json"


class Lease:
    """The right to write to `store`, not yet held. `owner` is the same string for all lives of one actor.

    `with lease.held(wait_s=30):` or `acquire` / `release`. `check` is what `Store.create` asks.
    """

    def __init__(self, store: Store, owner: str, *, ttl_s: float = 15.0, settle_s: float = 1.0, lasting: bool = False):
        self.store, self.owner, self.ttl_s, self.settle_s = store, owner, ttl_s, settle_s
        self.lasting = lasting
        self.epoch = 0
        self._token = ""
        self._lock: IO[bytes] | None = None
        self._depth = 0
        self._guard = threading.RLock()
        self._renewed = 0.0
        self._stop = threading.Event()

    @contextlib.contextmanager
    def held(self, wait_s: float = 30.0) -> Iterator[None]:
        """Hold the lease for a block; may be nested."""
        with self._guard:
            if self._depth == 0 and not self._token:
                self.acquire(wait_s)
                self._depth = 1
            else:
                self._depth += self._depth > 0
            try:
                yield
            finally:
                if self._depth:
                    self._depth -= 1
                    if self._depth == 0:
                        self.release()

    def acquire(self, wait_s: float = 30.0) -> None:
        """Take the lease, waiting for a short-lived writer; InputError names the one that keeps it."""
        deadline = time.monotonic() + wait_s
        self.store.begin()
        if self.store.folder is not None:
            self._lock_folder(self.store.folder, deadline)
            self._write_claim(self.claim())
            return
        while not self._try_bucket(deadline):
            time.sleep(self.settle_s * (1 + random.random()))

    def _try_bucket(self, deadline: float) -> bool:
        """One round of Fischer's algorithm: see it free, write, pause, and still read one's own token."""
        seen, last = self._await_bucket(deadline)
        self._write_claim(last)
        wrote = time.monotonic()
        if wrote - seen <= self.settle_s:  # slower, and somebody who saw it free as well may already be inside
            time.sleep(self.settle_s)
            if self._token_now() == self._token:
                self._renewed, self._stop = wrote, threading.Event()
                threading.Thread(target=self._beat, args=(self._token, self._stop), daemon=True).start()
                return True
        self._token = ""
        if time.monotonic() > deadline:
            raise InputError(
                f"{self.store.label}: no lease within the time allowed: others want it too, or requests take longer"
                f" than settle_s = {self.settle_s}; try again, or with a larger settle_s"
            )
        return False

    def _write_claim(self, last: LeaseClaim | None) -> None:
        self.epoch, self._token = (last.epoch if last else 0) + 1, uuid.uuid4().hex
        try:
            self._write(released=False)
        except NoSpace:
            # Only what removes something can work now, and it must. In a folder the lock is ours already, and the
            # claim says who holds it: the last one stays, and its token is ours until it is released.
            if self._lock is None or last is None or not last.token:
                self._drop()
                raise
            self.epoch, self._token = last.epoch, last.token
        except BaseException:
            self._drop()
            raise

    def release(self) -> None:
        """Give the lease back; the next writer need not wait."""
        if not self._token:
            return
        with contextlib.suppress(StoreError, OSError):
            if self._token_now() == self._token:
                self._write(released=True)
        self._drop()

    def _drop(self) -> None:
        self._stop.set()
        self._token = ""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def live(self) -> bool:
        """Was the lease held a moment ago? Reads nothing from the store."""
        late = self.store.folder is None and time.monotonic() - self._renewed > self.ttl_s - self.settle_s
        return bool(self._token) and not late

    def check(self) -> None:
        """LeaseLost unless this process may write right now. One small read."""
        if not self._token:
            raise LeaseLost(f"{self.store.label}: this process does not hold the writer's lease")
        if not self.live or self._token_now() != self._token:
            holder = self.claim()
            self._drop()
            raise LeaseLost(f"{self.store.label}: the writer's lease passed to {holder.owner if holder else 'nobody'}")

    def claim(self) -> LeaseClaim | None:
        """The last claim, held or released; None where nobody ever wrote. A damaged one is somebody unknown's."""
        data = self.store.read_fresh(CLAIM)
        if data is None:
            return None
        try:
            return decode(data, LeaseClaim, CLAIM)
        except (StoreError, InputError):
            return LeaseClaim(created=0.0, owner="an unknown process (the claim is damaged)")

    def _lock_folder(self, folder: Path, deadline: float) -> None:
        with self.store.reporting("lease/lock"):
            make_folder(folder / "lease")
            lock, began = (folder / "lease" / "lock").open("ab"), time.monotonic()
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._lock = lock
                return
            except BlockingIOError:
                if time.monotonic() > (min(deadline, began + 1.0) if self._others_for_long() else deadline):
                    lock.close()
                    raise self._refusal() from None
                time.sleep(0.01)

    def _await_bucket(self, deadline: float) -> tuple[float, LeaseClaim | None]:
        """Until the last claim is released, ours, or silent for ttl_s: when that was seen, and the claim."""
        state, since = None, time.monotonic()
        while True:
            now = time.monotonic()
            claim = self.claim()
            if claim is None or claim.released or claim.owner == self.owner:
                return now, claim
            beat = (claim.token, self.store.read_fresh(f"lease/beat-{claim.token}"))
            if beat != state:
                if state is not None and claim.lasting:
                    raise self._refusal()
                state, since = beat, now
            if now - since > self.ttl_s:
                return now, claim
            if now > deadline:
                raise self._refusal()
            time.sleep(min(0.2, self.ttl_s / 10))

    def _others_for_long(self) -> bool:
        claim = self.claim()
        if claim is None or not claim.lasting or claim.released or claim.owner == self.owner:
            return False
        return not _is_orphan(claim)

    def _beat(self, token: str, stop: threading.Event) -> None:
        count = 0
        key = f"lease/beat-{token}"
        while not stop.wait(self.ttl_s / 5):
            began, count = time.monotonic(), count + 1
            with contextlib.suppress(StoreError, OSError):
                self.store.overwrite(key, b"%d" % count)
                if self._token_now() == token:
                    self._renewed = began
                elif self._token == token:
                    self._token = ""
                    break
        with contextlib.suppress(StoreError, OSError):
            self.store.delete(key)

    def _refusal(self) -> InputError:
        claim = self.claim() or LeaseClaim(created=0.0, owner="another process")
        advice = "publish through it, or stop it first"
        if actor := re.match(r"actor (\S+) ", claim.owner):
            advice = f"use --registry ray:{actor[1]}, or end the actor with `prefvec registry stop`"
        return InputError(
            f"{self.store.label}: is being written to by {claim.owner} (pid {claim.pid} on {claim.host}); {advice}"
        )

    def _token_now(self) -> str:
        claim = self.claim()
        return claim.token if claim else ""

    def _write(self, *, released: bool) -> None:
        claim = LeaseClaim(
            created=self.store.clock(),
            epoch=self.epoch,
            owner=self.owner,
            host=socket.gethostname(),
            pid=os.getpid(),
            token=self._token,
            released=released,
            lasting=self.lasting,
        )
        self.store.overwrite(CLAIM, encode(claim))


def _is_orphan(claim: LeaseClaim) -> bool:
    """Whether the claim is of an actor on this machine whose raylet has ended: it ends by itself, within seconds."""
    if claim.host != socket.gethostname() or not claim.owner.startswith("actor "):
        return False
    try:
        return all(parent.name() != "raylet" for parent in psutil.Process(claim.pid).parents())
    except psutil.Error:  # it has ended, or belongs to somebody else
        return False
