"""Reads one Parquet file in a process of its own, whose memory is limited, and writes its rows as JSON lines.

A few bytes of Parquet can stand for any amount of memory, and what a row takes is known only when it is decoded. So
`readers.py` runs this file as a script: where the limit is reached, this process ends and the caller's does not.

It reads one JSON object from standard input: `uri` and `path` of the file (`uri` is null for a local file) and
`memory`, in bytes above what the interpreter and its libraries take. Exit status: 0 after the last row, `TOO_LARGE`,
or `DAMAGED` with the reason on standard error.
"""

import datetime
import decimal
import json
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TOO_LARGE, DAMAGED = 3, 4
BATCH_ROWS, BATCH_BYTES = 256, 32 << 20


def main() -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from pyarrow import fs

    order = json.load(sys.stdin)
    system: Any = fs.LocalFileSystem() if order["uri"] is None else fs.FileSystem.from_uri(order["uri"])[0]
    pa.set_cpu_count(1)
    limit_memory(order["memory"])
    done = 0
    try:
        with system.open_input_file(order["path"]) as file:
            # A buffer, since otherwise a whole column chunk is in memory at once.
            parquet = pq.ParquetFile(file, buffer_size=1 << 20)
            for size in (batch_rows(parquet.metadata), 1):
                try:
                    for number, row in enumerate(rows(parquet, size)):
                        if number >= done:
                            sys.stdout.write(json.dumps(row, ensure_ascii=True, default=plain) + "\n")
                            done += 1
                    sys.stdout.flush()
                    return 0
                except MemoryError:
                    if size == 1:
                        raise
    except MemoryError:
        return TOO_LARGE
    except BrokenPipeError:  # the reader has gone
        os._exit(0)
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        sys.stderr.write(" ".join(str(error).split())[:300])
        return DAMAGED
    return TOO_LARGE


def limit_memory(more: int) -> None:
    """Let this process take `more` bytes beside what it has now. Without /proc (not Linux) there is no limit."""
    status = Path("/proc/self/statm")
    if status.exists():
        taken = int(status.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + more, taken + more))


def batch_rows(metadata: Any) -> int:
    """Rows to decode at once, by the sizes in the file's metadata."""
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    largest = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, largest)))


def rows(parquet: Any, size: int) -> Iterator[dict[str, Any]]:
    names = parquet.schema_arrow.names
    if len(set(names)) < len(names):
        raise ValueError(f"two columns have one name among {', '.join(names)}; rename one")
    for batch in parquet.iter_batches(batch_size=size, use_threads=False):
        yield from batch.to_pylist()


def plain(value: Any) -> Any:
    """What JSON has no form for: times and decimals as text; bytes and others as an object that names their type, which
    nothing takes for a text."""
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta | decimal.Decimal):
        return str(value)
    return {"type": type(value).__name__}


if __name__ == "__main__":
    sys.exit(main())
