"""How long reading, splitting and checking many preference pairs takes, and how much memory.

    python benchmarks/bench_data.py --rows 1000000

Writes rows of about 1 kB to a JSONL(.gz) file, reads them in a process of its own, and prints one line of JSON:
seconds a step, rows a second, peak resident memory in MB, anonymous memory and mapped file pages, which the system
may drop at any time.
"""

import argparse
import gzip
import json
import multiprocessing
import random
import tempfile
import time
from pathlib import Path
from typing import Any


def write_rows(path: Path, rows: int) -> None:
    """PKU-SafeRLHF rows of random words; every tenth prompt twice."""
    choice = random.Random(0)
    words = [f"word{i}" for i in range(5000)]
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        for i in range(rows):
            said = [" ".join(choice.choices(words, k=count)) for count in (20, 60, 60)]
            row = {"prompt": f"{said[0]} {i - i % 10 // 9}", "response_0": said[1], "response_1": said[2]}
            row |= {"better_response_id": choice.randrange(2), "safer_response_id": choice.randrange(2)}
            file.write(json.dumps(row) + "\n")


def memory() -> dict[str, int]:
    """MB of this process: anonymous and file-mapped now, and the peak of both together."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[name].split()[0]) // 1024 for name in ("VmHWM", "RssAnon", "RssFile")}


def measure(path: str, sender: Any) -> None:
    from prefvec_ray.preferences import check_splits, load_split
    from prefvec_ray.tiny_world import TinyWorld, build_tokenizer

    tokenizer = build_tokenizer(TinyWorld("micro"))
    before, started, cpu = memory(), time.perf_counter(), time.process_time()
    split = load_split(path, preference="helpful")
    read = time.perf_counter()
    found = check_splits({"helpful": split}, tokenizer=tokenizer, max_length=1024)
    checked = time.perf_counter()
    after = memory()
    sender.send(
        {
            "rows": found.preferences["helpful"].rows,
            "read_and_split_s": round(read - started, 1),
            "check_s": round(checked - read, 1),
            "cpu_s": round(time.process_time() - cpu, 1),
            "rows_per_s": round(found.preferences["helpful"].rows / (checked - started)),
            "peak_mb": after["VmHWM"],
            "before_mb": before["RssAnon"],
            "anonymous_mb": after["RssAnon"],
            "mapped_mb": after["RssFile"],
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--gzip", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("rows.jsonl.gz" if options.gzip else "rows.jsonl")
        write_rows(path, options.rows)
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(str(path), sender))
        process.start()
        process.join()
        print(json.dumps({"file_mb": path.stat().st_size >> 20, **receiver.recv()}))


if __name__ == "__main__":
    main()
