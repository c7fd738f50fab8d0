"""Conditional writes: the bucket itself refuses to create an object where there is one.

S3 (`If-None-Match: *`) and Google Cloud Storage (`x-goog-if-generation-match: 0`) have them. pyarrow's filesystems
cannot send them, so these requests go through obstore. Some servers that speak S3 ignore the header and overwrite, so
each bucket is tested once.
"""

import logging
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit

from prefvec_ray.registry.errors import StoreError

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig, S3Config

log = logging.getLogger(__name__)
RETRY: "RetryConfig" = {"max_retries": 4, "retry_timeout": timedelta(seconds=30)}


class ConditionalWriter:
    """Creates objects of one bucket. Make it with `connect`."""

    def __init__(self, bucket: Any):
        self._bucket = bucket

    def create(self, path: str, data: bytes) -> bool:
        """Write the object `path` (below the bucket) if there is none: True. False: there is one, unchanged.

        A request that is repeated after a lost answer also finds one: compare the bytes. Raises StoreError where the
        bucket cannot be written.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

        try:
            obstore.put(self._bucket, path, data, mode="create", use_multipart=False)
        except (AlreadyExistsError, PreconditionError):
            return False
        except (BaseError, OSError, NotImplementedError) as error:  # their texts may carry addresses and credentials
            raise StoreError(f"{path}: cannot be written to the bucket ({type(error).__name__}); try again") from None
        return True


def connect(uri: str, path: str, data: bytes) -> tuple[ConditionalWriter | None, str]:
    """A writer for the bucket of a pyarrow URI, or None and why the bucket has no conditional writes.

    `path` is an object that exists and holds `data`: creating it must fail, and where the condition is ignored the
    same bytes are written again, which changes nothing.
    """
    from obstore.exceptions import BaseError

    try:
        bucket = _bucket(uri)
        if bucket is None:
            return None, "not known for this kind of bucket"
        writer = ConditionalWriter(bucket)
        ignored = writer.create(path, data)
    except StoreError as error:
        reason = f"the request failed: {error}"
    except (BaseError, ValueError) as error:  # a setting that obstore does not know
        reason = f"obstore does not take the address ({type(error).__name__})"
    else:
        if not ignored:
            return writer, ""
        reason = "the bucket ignores the condition"
    log.warning("conditional writes are not used, the lease alone protects this registry: %s", reason)
    return None, reason


def _bucket(uri: str) -> Any:
    """The obstore client that a pyarrow filesystem URI describes; None for other kinds of buckets."""
    from obstore.store import GCSStore, S3Store

    parts = urlsplit(uri)
    options = dict(parse_qsl(parts.query))
    plain = options.get("scheme") == "http"
    client: ClientConfig = {"allow_http": plain, "timeout": "30s"}
    endpoint = options.get("endpoint_override", "")
    if endpoint and "://" not in endpoint:
        endpoint = f"{'http' if plain else 'https'}://{endpoint}"
    if parts.scheme == "s3":
        config: S3Config = {"region": options["region"]} if "region" in options else {}
        if endpoint:
            config["endpoint"] = endpoint
        if parts.username is not None and parts.password is not None:
            config["access_key_id"], config["secret_access_key"] = unquote(parts.username), unquote(parts.password)
        return S3Store(parts.hostname or "", config=config, client_options=client, retry_config=RETRY)
    if parts.scheme in ("gs", "gcs"):
        return GCSStore(parts.hostname or "", client_options=client, retry_config=RETRY)
    return None
