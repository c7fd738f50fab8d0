"""Mutated files for every reader: data, vectors, adapters, configs. Each is read, or refused in one line.

    python -m tests.fuzz.readers --inputs 10000 --seed 0 --seconds 600

Exit status 1 where an input ended in another exception, took longer than `LONG` seconds of processor time, or where
the memory of the process or of its children grew beyond the bound of `sources.MEMORY`. A failing input is kept in the
folder that is printed.
"""

import argparse
import bz2
import gzip
import json
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from prefvec_ray.common.config import load_config
from prefvec_ray.common.errors import InputError
from prefvec_ray.preferences import load_preferences
from prefvec_ray.preferences.sources import MEMORY
from prefvec_ray.search import EvalConfig, SearchJob
from prefvec_ray.serving.config import load_serving_config
from prefvec_ray.training import TrainingConfig
from prefvec_ray.vectors import load_vector, save_vector, vector_from_adapter, vector_from_state
from prefvec_ray.vectors.checkpoint import Checkpoint

LONG = 60.0
"""Seconds of this process's processor time for one input; a hang is a time that no machine explains."""
ROWS = [{"prompt": f"How {i}?", "chosen": "Like this.", "rejected": "No."} for i in range(4)]
CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
SERVE_CONFIGS = Path(__file__).parents[2] / "serve_configs"
SPLICES = [
    b"\x00", b"\xff\xfe", b'"', b"{", b"[" * 300, b"}" * 3, b"null", b"NaN", b"1e999", b"-1", b"9" * 5000, b"\\ud800",
    b"\xed\xa0\x80", b"\r\n", b",", b": &a [*a]", b"*b", b"!!python/object:os.system x", b"(a+)+$", b"../../x", b"true",
    b"\x1b[2J", b"<<: ", b"? ", b"0x" + b"f" * 9000, b"\xe2\x80\xae",
]  # fmt: skip


def data_files(folder: Path) -> dict[str, Callable[[Path], object]]:
    """Sound data files to begin from, and how each is read."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    table = "prompt,chosen,rejected\n" + "".join(f'{i},"a, {i}",b\n' for i in range(4))
    contents = {
        "a.jsonl": lines,
        "a.json": json.dumps(ROWS).encode(),
        "a.csv": table.encode(),
        "a.jsonl.gz": gzip.compress(lines),
        "a.csv.bz2": bz2.compress(table.encode()),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return dict.fromkeys(contents, load_preferences)


def parquet_files(folder: Path) -> dict[str, Callable[[Path], object]]:
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "a.parquet")
    return {"a.parquet": load_preferences}


def configs(folder: Path) -> dict[str, Callable[[Path], object]]:
    """Every config of the repository under the model that reads it."""
    readers: dict[str, Callable[[Path], object]] = {}
    models = {"train": TrainingConfig, "search": SearchJob, "eval": EvalConfig}
    for file in sorted(CONFIGS.glob("*.yaml")):
        model = next((model for word, model in models.items() if word in file.name), TrainingConfig)
        shutil.copy(file, folder / file.name)
        readers[file.name] = lambda path, model=model: load_config(path, model)  # type: ignore[misc]
    for file in sorted(SERVE_CONFIGS.glob("*.yaml")):
        shutil.copy(file, folder / f"serve-{file.name}")
        readers[f"serve-{file.name}"] = load_serving_config
    return readers


def vectors(folder: Path) -> dict[str, Callable[[Path], object]]:
    """A vector in one file and in shards with an index."""
    state = {name: torch.randn(4, 4) for name in ("a", "b")}
    vector = vector_from_state(state, base_fingerprint="blake3:" + "b" * 64, preference="helpful")
    save_vector(vector, folder / "one")
    save_vector(vector, folder / "many", max_shard_size=100)

    def read(path: Path) -> object:
        return load_vector(path.parent).validate().digest()

    return {"one/vector.safetensors": read, "many/vector.safetensors.index.json": read}


def adapters(folder: Path) -> dict[str, Callable[[Path], object]]:
    """A LoRA adapter over a base of some thousand parameters: its config, its weights, the base's config."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))
    base.save_pretrained(folder / "base")
    config = LoraConfig(r=2, target_modules=r".*\.[qv]_proj", rank_pattern={"v_proj": 3}, alpha_pattern={"v_proj": 5})
    get_peft_model(base, config).save_pretrained(folder / "adapter")

    def read(path: Path) -> object:
        return vector_from_adapter(path.parents[1] / "adapter", base=path.parents[1] / "base", preference="p").digest()

    def read_base(path: Path) -> object:
        return Checkpoint(path.parent).names()

    return {
        "adapter/adapter_config.json": read,
        "adapter/adapter_model.safetensors": read,
        "base/config.json": read_base,
    }


KINDS = {"data": data_files, "config": configs, "vector": vectors, "adapter": adapters, "parquet": parquet_files}
WEIGHTS = (45, 30, 15, 8, 2)
"""Shares of the inputs. A Parquet file costs a process, an adapter a model, so they are fewer."""


def mutated(content: bytes, chance: random.Random) -> bytes:
    """A few changes: bytes flipped, cut out, doubled, replaced by what has broken readers before."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at, end = sorted(chance.randint(0, len(data)) for _ in range(2))
        way = chance.randrange(6)
        if way == 0 and data:
            data[min(at, len(data) - 1)] = chance.randrange(256)
        elif way == 1:
            del data[at : min(end, at + 64)]
        elif way == 2:
            data[at:at] = data[at : min(end, at + 64)]
        elif way == 3:
            del data[at:]
        else:
            data[at : at + chance.choice((0, 1, 4))] = chance.choice(SPLICES)
    return bytes(data)


def peak() -> int:
    """Bytes of memory that this process or one of its children had at most."""
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * 1024


def run(inputs: int, seed: int, seconds: float, folder: Path) -> tuple[Counter[str], list[str]]:
    """Read up to `inputs` mutated files within `seconds`. Returns how they ended, `<kind> <read or refused>`, and one
    text for each that ended otherwise."""
    readers = {}
    for kind, make in KINDS.items():
        (folder / kind).mkdir(parents=True)
        readers[kind] = list(make(folder / kind).items())
    for files in readers.values():  # first as they are, so that libraries are loaded before memory is measured
        for name, read in files:
            try:
                read(folder / next(kind for kind in KINDS if readers[kind] is files) / name)
            except InputError:
                continue
    chance, ends, failures = random.Random(seed), Counter[str](), list[str]()
    before, until = peak(), time.monotonic() + seconds
    for number in range(inputs):
        if time.monotonic() > until:
            break
        (kind,) = chance.choices(list(KINDS), WEIGHTS)
        name, read = chance.choice(readers[kind])
        path = folder / kind / name
        sound = path.read_bytes()
        broken = mutated(sound, chance)
        path.write_bytes(broken)
        began, problem = time.process_time(), ""
        try:
            read(path)
            ends[f"{kind} read"] += 1
        except InputError as error:
            ends[f"{kind} refused"] += 1
            problem = "" if str(error) and "\n" not in str(error) else f"not one line: {error!r}"
        except Exception:
            problem = traceback.format_exc()
        if time.process_time() - began > LONG:
            problem = f"took {time.process_time() - began:.0f} s"
        path.write_bytes(sound)
        if problem:
            kept = folder / f"failure-{number}-{path.name}"
            kept.write_bytes(broken)
            failures.append(f"input {number} ({kept}): {problem}")
    if peak() - before > MEMORY:
        failures.append(f"memory grew by {(peak() - before) >> 20} MiB; the bound is {MEMORY >> 20}")
    return ends, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=600.0)
    given = parser.parse_args()
    ends, failures = run(given.inputs, given.seed, given.seconds, Path(tempfile.mkdtemp(prefix="prefvec-fuzz-")))
    for end, count in sorted(ends.items()):
        print(f"{end}: {count}")
    print(f"{sum(ends.values()) + len(failures)} inputs, seed {given.seed}: {len(failures)} failures")
    for failure in failures[:20]:
        print(failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
