"""Compares what a manifest says of a vector with the vector's own files.

Anybody can write a manifest: a bundle can call a harmful vector `helpful`.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from prefvec_ray.common.errors import InputError
from prefvec_ray.registry.errors import StoreError
from prefvec_ray.registry.names import shown
from prefvec_ray.registry.records import VectorDraft

COMPARED = ("preference", "form", "dtype", "base_fingerprint", "parents", "data_digest", "precision")


def wrong_statements(
    manifest: VectorDraft, folder: Path, *, links: bool = False, digest: Callable[[], str] | None = None
) -> list[str]:
    """What is not as the manifest says, a line each; empty where all of it is. `folder` holds the version's files.

    Reads every number once, for the digest and to find NaN and infinity, or calls `digest` for that. `links` allows
    files that are symbolic links.
    """
    from prefvec_ray.vectors import load_vector

    try:
        vector = load_vector(folder, links=links)
        rank = max((getattr(entry, "rank", 0) for entry in vector.entries.values()), default=0) or None
        found = {field: getattr(vector.info, field) for field in COMPARED} | {"rank": rank}
        stated = {field: getattr(manifest, field) for field in found}
        wrong = [
            f"{field}: the manifest says {shown(stated[field])}, the file {shown(value)}"
            for field, value in found.items()
            if stated[field] != value
        ]
        if any(manifest.recipe.get(key) != value for key, value in vector.info.recipe.items()):
            wrong.append("recipe: the manifest contradicts the file")
        if not wrong:
            numbers = digest() if digest else vector.validated_digest()
            if numbers != manifest.digest:
                wrong.append(f"digest: the manifest says {manifest.digest}, the numbers have {numbers}")
    except InputError as error:
        return [f"not a vector that can be used: {error}"]
    return wrong


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for the files of one vector at a time. StoreError where there is no room for them."""
    try:
        with tempfile.TemporaryDirectory(prefix="prefvec-") as scratch:
            yield Path(scratch)
    except OSError as error:
        raise StoreError(
            f"{tempfile.gettempdir()}: {error.strerror or error}; vectors are unpacked there one at a time; make room,"
            " or set TMPDIR to another folder"
        ) from None
