"""Errors of a store that the caller's input did not cause."""

from prefvec_ray.common.errors import JobError


class StoreError(JobError):
    """The store is damaged, out of reach or out of space. Names the file and what to do; nothing was changed."""


class NoSpace(StoreError):  # noqa: N818 - see LeaseLost
    """The disk, or a quota, is full. Nothing was changed; `gc` works all the same."""


class LeaseLost(StoreError):  # noqa: N818 - it is a state to react to, not only an error
    """Another writer has taken this store over. The operation was not acknowledged; ask the new writer."""


class MissingBlob(StoreError):  # noqa: N818 - see LeaseLost
    """A draft names a blob that is not in the store: stage it (again) and commit (again)."""
