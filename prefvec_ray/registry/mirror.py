"""All records of a store in memory, as files in folders."""


class Mirror:
    """Records by key. Whoever loads one holds the lease, and adds what is written."""

    def __init__(self) -> None:
        self._folders: dict[str, dict[str, bytes | None]] = {}
        """folder -> name -> bytes of a record, None for a folder in it"""

    def read(self, key: str) -> bytes | None:
        """The bytes of a record, None where there is none."""
        folder, _, name = key.rpartition("/")
        return self._folders.get(folder, {}).get(name)

    def children(self, folder: str) -> list[str]:
        """Names directly under a folder, sorted."""
        return sorted(self._folders.get(folder, {}))

    def add(self, key: str, data: bytes) -> None:
        """A record, and the folders in which it lies."""
        folder, _, name = key.rpartition("/")
        self._folders.setdefault(folder, {})[name] = data
        while "/" in folder:
            folder, _, name = folder.rpartition("/")
            self._folders.setdefault(folder, {}).setdefault(name, None)

    def remove(self, key: str) -> None:
        """Forget a record."""
        folder, _, name = key.rpartition("/")
        self._folders.get(folder, {}).pop(name, None)
