"""API keys: a YAML file with what each key may do and the SHA-256 of its secret.

    prefvec keys add --file keys.yaml --name team-a --range harmless=0.5..1

A secret is 256 random bits, so its plain digest gives nothing away that could be guessed; it is shown once and kept
nowhere. The file is read again whenever it changes: a revoked key is refused from the next request on.
"""

import hashlib
import hmac
import logging
import secrets
import stat
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from filelock import FileLock
from pydantic import Field, model_validator

from prefvec_ray.common.atomic import new_file
from prefvec_ray.common.config import Config, load_config, parse_config
from prefvec_ray.common.errors import InputError
from prefvec_ray.common.names import Name
from prefvec_ray.serving.config import Allowance, Range

log = logging.getLogger("ray.serve")


class Key(Allowance):
    """One key and what its holder may do. What it leaves out is as for everybody."""

    id: Name
    """says which key it is, in lists and in the audit; no secret"""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_ .@/-]{1,100}$")]
    """whose key it is"""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    created: datetime
    revoked: datetime | None = None
    ranges: dict[Name, Range] = {}
    """preference -> allowed coefficients, instead of the endpoint's"""
    may_go_below_floor: bool = False
    """the operator's floors do not bound this key; its ranges do"""

    def summary(self) -> str:
        """What it may do other than everybody, in one line."""
        parts = [f"{name} {r.min:g}..{r.max:g}, default {r.default:g}" for name, r in self.ranges.items()]
        identity = {"id", "name", "sha256", "created", "revoked", "ranges"}
        rest = self.model_dump(mode="json", exclude=identity, exclude_defaults=True)
        return "; ".join([*parts, *(f"{name}: {value}" for name, value in rest.items())])


class KeyFile(Config):
    """What is in the file."""

    keys: tuple[Key, ...] = ()

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        for what in ("id", "sha256"):
            values = [getattr(key, what) for key in self.keys]
            if len(set(values)) < len(values):
                raise ValueError(f"two keys have the same {what}; keep one of them")
        return self


class KeysUnreadableError(RuntimeError):
    """The key file changed to something that cannot be read: no key can be checked until it is corrected."""


class Keys:
    """The keys of a running endpoint. `check` raises InputError for a key that this endpoint must not take.

    Raises InputError where the file is missing, wrong, or open to writing by others than its owner.
    """

    def __init__(self, path: Path, check: Callable[[Key], None]):
        self._path, self._check = path, check
        self._keys: tuple[Key, ...] | None = ()
        self._seen = _version(path)
        self._keys = self._read()

    def find(self, secret: str) -> Key | None:
        """The key with this secret, also where it is revoked. Every key is compared, whichever fits.

        Raises KeysUnreadableError where the file cannot be read any more: then nobody's key counts.
        """
        digest = _digest(secret)
        found = None
        for key in self._current():
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def _current(self) -> tuple[Key, ...]:
        version = _version(self._path)
        if version != self._seen:
            self._seen = version
            try:
                self._keys = self._read()
                log.info("%s: %d keys", self._path, len(self._keys))
            except InputError as error:
                self._keys = None
                log.error("no key is accepted until this is corrected: %s", error)
        if self._keys is None:
            raise KeysUnreadableError(f"{self._path} cannot be read")
        return self._keys

    def _read(self) -> tuple[Key, ...]:
        keys = read_keys(self._path)
        for key in keys:
            self._check(key)
        return keys


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys in a file. Raises InputError as `Keys` does."""
    keys = load_config(path, KeyFile).keys
    if path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise InputError(f"keys {path}: others than its owner may write it, and so make keys; chmod 600 {path}")
    return keys


def add_key(path: Path, name: str, **settings: Any) -> tuple[Key, str]:
    """Make a key and write it into the file, which may be new. Returns it with its secret, which is kept nowhere.

    Raises InputError for settings that a `Key` does not take, and where the file is wrong.
    """
    secret = f"pv-{secrets.token_urlsafe(32)}"
    content = {"id": f"key-{secrets.token_hex(4)}", "name": name, "sha256": _digest(secret), "created": _now()}
    key = parse_config(content | settings, Key, source=f"key {name!r}")
    with FileLock(f"{path}.lock"):
        _write(path, [*(read_keys(path) if path.exists() else ()), key])
    return key, secret


def revoke_key(path: Path, id: str) -> Key:
    """Mark a key as revoked; it stays in the file, so that its id in the audit keeps its meaning.

    Raises InputError where there is no such key, or it is revoked already.
    """
    with FileLock(f"{path}.lock"):
        keys = {key.id: key for key in read_keys(path)}
        if id not in keys:
            raise InputError(f"keys {path}: no key {id!r}; there are: {', '.join(keys) or 'none'}")
        if (before := keys[id].revoked) is not None:
            raise InputError(f"keys {path}: {id} was revoked at {before:%Y-%m-%d %H:%M} UTC; nothing to do")
        keys[id] = keys[id].model_copy(update={"revoked": _now()})
        _write(path, keys.values())
    return keys[id]


def parse_range(text: str) -> tuple[str, Range]:
    """`harmless=0.5..1:0.7` as ("harmless", Range(min=0.5, max=1, default=0.7)). Raises InputError."""
    name, _, bounds = text.partition("=")
    span, _, default = bounds.partition(":")
    low, _, high = span.partition("..")
    content = {"min": low, "max": high} | ({"default": default} if default else {})
    if not (name and low and high):
        raise InputError(
            f"range {text!r}: expected NAME=MIN..MAX or NAME=MIN..MAX:DEFAULT, such as harmless=0.5..1:0.7"
        )
    return name, parse_config(content, Range, source=f"range {text!r}")


def _write(path: Path, keys: Iterable[Key]) -> None:
    """All of it or nothing, for the owner's eyes only."""
    content = KeyFile(keys=tuple(keys)).model_dump(mode="json", exclude_none=True)
    with new_file(path.resolve(), mode=0o600) as temporary:
        temporary.write_text(yaml.safe_dump(content, sort_keys=False))


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def _version(path: Path) -> tuple[int, ...] | None:
    """Differs where the file has changed; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino
