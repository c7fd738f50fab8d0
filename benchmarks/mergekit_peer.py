"""Run one task_arithmetic merge with mergekit and print its time: `python mergekit_peer.py config.yaml out threads`.

Runs in mergekit's own environment. Imports are not timed; the time ends when the output is on disk, as for the others.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions


def main(config: str, out: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    merge = MergeConfiguration.model_validate(yaml.safe_load(Path(config).read_text("utf-8")))
    os.sync()
    start = time.perf_counter()
    run_merge(merge, out, options=MergeOptions(lazy_unpickle=True, copy_tokenizer=False, quiet=True))
    for file in Path(out).iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main(*sys.argv[1:])
