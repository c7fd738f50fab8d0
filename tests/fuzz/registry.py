"""Fuzz what the registry reads from strangers: bundles, manifests and vector files, mutated from sound ones.

    python tests/fuzz/registry.py --inputs 10000 --seed 0 --seconds 600

Every input must be taken, or refused with an InputError or StoreError of one printable line, within `LONGEST_S`
seconds; what is taken must verify as sound. Prints one JSON object; exit code 1 where an input did anything else (its
number is named: `--only NUMBER` repeats it).
"""

import argparse
import json
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from prefvec_ray.common.errors import InputError
from prefvec_ray.registry import Registry, StoreError
from prefvec_ray.registry.cache import NodeCache
from prefvec_ray.registry.records import decode, encode
from prefvec_ray.registry.verify import MODELS
from prefvec_ray.vectors import load_vector, save_vector, vector_from_state

LONGEST_S = 20
MEMORY = 16 << 30
"""address space of this process, so that an input cannot take the machine down with it"""
BASE = "blake3:" + "b" * 64
ODD_TEXTS = [
    "",
    "../../x",
    "/etc/x",
    "a\nb",
    "\x1b[2J",
    "[/]",
    "x" * 300,
    "\u202e",
    "é",
    "\ud800",
    "NaN",
    "-1",
    "a/b",
    "con",
    "helpful@1",
]
ODD_VALUES: list[Any] = [None, True, -1, 0, 10**9, 10**30, 1e308, -0.0, 0.5, [], {}, [[]], {"a": {"b": []}}, *ODD_TEXTS]
ODD_JSON = [b"NaN", b"1e999", b"-Infinity", b"[" * 300 + b"]" * 300, b"9" * 5000, b'"\\ud800"', b"tru", b"\xff", b"{}"]


class Materials:
    """Sound inputs to mutate: one bundle, one record of each kind, vector folders of each form."""

    def __init__(self, folder: Path):
        registry = Registry.open(folder / "home", cache=NodeCache(folder / "home-cache"))
        generator = torch.Generator().manual_seed(0)
        self.vectors = []
        with registry.lease.held():
            forms: list[tuple[torch.dtype, int | str]] = [
                (torch.float32, "5GB"), (torch.bfloat16, "5GB"), (torch.float32, 256),
            ]  # fmt: skip
            for number, (dtype, shard) in enumerate(forms):
                delta = {"w": torch.randn(8, 8, generator=generator), "b": torch.randn(8, generator=generator)}
                vector = vector_from_state(delta, preference="helpful", base_fingerprint=BASE, dtype=dtype)
                path = save_vector(vector, folder / f"vector-{number}", max_shard_size=shard)
                registry.publish_vector(path, metrics={"gain": 0.5}, notes="sound")
                self.vectors.append({file.name: file.read_bytes() for file in path.iterdir()})
            registry.publish_preset("cautious", {"helpful@1": 0.5}, reason="knee")
            registry.set_alias("helpful", "production", 1, "best")
            registry.set_tags("helpful@1", {"stage": "new"}, "it is")
            registry.record_served({"helpful@1": 0.1}, base_fingerprint=BASE)
            registry.publish_vector(folder / "vector-0", name="spare")
            registry.retire("spare@1", "not needed")
        self.records = {key: registry.store.read_fresh(key) or b"" for key in registry.store.record_keys()}
        self.bundle = registry.export_bundle(
            folder / "b.prefvec", ["helpful@1", "helpful@3"], presets=["cautious"]
        ).read_bytes()


def flipped(data: bytes, draw: random.Random) -> bytes:
    """Bytes changed, cut, doubled or replaced somewhere."""
    out = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 8])):
        at, kind = draw.randrange(len(out) + 1), draw.randrange(5)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del out[at : at + draw.choice([1, 8, 512, 4096])]
        elif kind == 2:
            out[at:at] = out[max(0, at - draw.choice([1, 8, 512])) : at]
        elif kind == 3:
            out[at : at + 8] = draw.choice([b"\0" * 8, b"\xff" * 8, b"\x00\x00\x00\x00\x00\x00\x00\x80", b"99999999"])
        else:
            out[at:at] = draw.randbytes(draw.choice([1, 8, 512]))
    return bytes(out)


def changed(value: Any, draw: random.Random) -> Any:
    """JSON with one value somewhere in it replaced, removed, added or doubled."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(sorted(value))
        out = dict(value)
        match draw.randrange(8):
            case 0:
                del out[key]
            case 1:
                out[draw.choice(ODD_TEXTS)] = out.pop(key)
            case _:
                out[key] = changed(value[key], draw)
        return out
    if isinstance(value, list) and value and draw.random() < 0.85:
        at = draw.randrange(len(value))
        return [*value[:at], changed(value[at], draw), *value[at:]][: len(value) + draw.randrange(2)]
    return draw.choice(ODD_VALUES)


def line(body: bytes) -> bytes:
    return b'{"blake3":"%s","record":%s}\n' % (blake3(body).hexdigest().encode(), body)


def mutated_record(data: bytes, draw: random.Random) -> bytes:
    """A record with a right digest over changed content, or damaged bytes."""
    if draw.random() < 0.2:
        return flipped(data, draw)
    record = json.loads(data)["record"]
    for _ in range(draw.choice([1, 1, 2, 4])):
        record = changed(record, draw)
    body = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
    if draw.random() < 0.2:
        body = body.replace(draw.choice([b"0.5", b"1", b"null", b'"helpful"']), draw.choice(ODD_JSON), 1)
    return line(body)


def mutated_bundle(bundle: bytes, draw: random.Random) -> bytes:
    """Damaged anywhere, a changed header, or a changed index with a right digest and the size that it has."""
    kind = draw.randrange(3)
    if kind == 0:
        return flipped(bundle, draw)
    if kind == 1:  # a tar header, with a right checksum
        headers = [at for at in range(0, len(bundle), 512) if bundle[at + 257 : at + 262] == b"ustar"]
        at = draw.choice(headers)
        header = bytearray(bundle[at : at + 512])
        field, length = draw.choice(
            [(0, 100), (100, 8), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155), (386, 100)]
        )
        odd = draw.choice([draw.randbytes(length), b"\xff" * length, b"7" * length, b"\x80" + b"\x7f" * (length - 1)])
        header[field : field + length] = odd[:length].ljust(length, b"\0")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        return bundle[:at] + bytes(header) + bundle[at + 512 :]
    size = int(bundle[124:135], 8)
    index = mutated_record(bundle[512 : 512 + size], draw)
    header = bytearray(bundle[:512])
    header[124:136] = b"%011o\0" % len(index)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + index + b"\0" * (-len(index) % 512) + bundle[512 + -(-size // 512) * 512 :]


def mutated_vector(files: dict[str, bytes], draw: random.Random) -> dict[str, bytes]:
    """A folder with a changed safetensors header, a changed index, damaged bytes, or a file too many or too few."""
    out = dict(files)
    name = draw.choice(sorted(out))
    data = out[name]
    match draw.randrange(4):
        case 0:
            out[name] = flipped(data, draw)
        case 1:
            del out[name]
            if draw.random() < 0.5:
                out[draw.choice(["vector.safetensors", "other.json", "README.md", "x.safetensors"])] = data
        case _ if name.endswith(".json"):
            out[name] = json.dumps(changed(json.loads(data), draw)).encode()
        case _:
            size = int.from_bytes(data[:8], "little")
            header = json.dumps(changed(json.loads(data[8 : 8 + size]), draw)).encode()
            out[name] = len(header).to_bytes(8, "little") + header + data[8 + size :]
    return out


def import_bundle(materials: Materials, draw: random.Random, folder: Path) -> None:
    path = folder / "x.prefvec"
    path.write_bytes(mutated_bundle(materials.bundle, draw))
    registry = Registry.open(folder / "store", cache=NodeCache(folder / "cache"))
    try:
        registry.import_bundle(path, renumber=draw.random() < 0.5)
    finally:
        if registry.names():
            assert registry.verify().sound, registry.verify().findings
            for version in registry.list_vectors():
                assert registry.fetch(version.ref).is_relative_to(folder / "cache")
            registry.close()
        outside = {path.name for path in folder.iterdir()} - {"x.prefvec", "store", "cache"}
        assert not outside, outside


def read_record(materials: Materials, draw: random.Random, folder: Path) -> None:
    key = draw.choice(sorted(materials.records))
    model = MODELS[key.partition("/")[0]]
    record = decode(mutated_record(materials.records[key], draw), model, key)
    assert decode(encode(record), model, key) == record, "what is taken can be written and read again"


def read_store(materials: Materials, draw: random.Random, folder: Path) -> None:
    """A whole store with one changed record: everything that looks at it, looks."""
    for key, data in materials.records.items():
        (folder / "store" / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / "store" / key).write_bytes(data)
    key = draw.choice(sorted(materials.records))
    (folder / "store" / key).write_bytes(mutated_record(materials.records[key], draw))
    registry = Registry.open(folder / "store", cache=NodeCache(folder / "cache"))
    assert registry.verify(read_bytes=False).findings, "at least the missing marker is found"
    registry.list_vectors(skip_damaged=True)
    registry.list_presets(skip_damaged=True)
    registry.damaged()
    registry.lineage(draw.choice(["helpful", "preset:cautious", "helpful@3"])).to_mermaid()
    registry.users("helpful@1")
    registry.resolve("helpful@production")


def publish_folder(materials: Materials, draw: random.Random, folder: Path) -> None:
    source = folder / "vector"
    source.mkdir()
    for name, data in mutated_vector(draw.choice(materials.vectors), draw).items():
        (source / name).write_bytes(data)
    load_vector(source).validate()
    registry = Registry.open(folder / "store", cache=NodeCache(folder / "cache"))
    registry.publish_vector(source)
    assert registry.verify().sound, registry.verify().findings


TARGETS: tuple[Callable[[Materials, random.Random, Path], None], ...] = (
    import_bundle,
    read_record,
    read_store,
    publish_folder,
)


def attempt(number: int, seed: int, materials: Materials, work: Path) -> tuple[str, str]:
    """(target and outcome, what is wrong with it or nothing) of one input."""
    draw = random.Random(f"{seed}/{number}")
    target = TARGETS[number % len(TARGETS)]
    signal.alarm(LONGEST_S)
    try:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            target(materials, draw, Path(folder))
        outcome, wrong = "taken", ""
    except (InputError, StoreError) as error:
        outcome = "refused"
        wrong = "" if str(error).isprintable() and len(str(error)) < 2000 else f"unprintable: {error!r}"[:500]
    except BaseException:
        if isinstance(sys.exception(), KeyboardInterrupt):
            raise
        outcome, wrong = "failed", traceback.format_exc()[-1500:]
    finally:
        signal.alarm(0)
    return f"{target.__name__} {outcome}", wrong


def fuzz(inputs: int, seed: int, seconds: float, only: int | None = None) -> dict[str, Any]:
    """What became of the inputs: how many by target and outcome, and every failure."""
    began, outcomes, failures = time.monotonic(), Counter[str](), []
    with tempfile.TemporaryDirectory() as folder:
        materials = Materials(Path(folder))
        for number in range(inputs) if only is None else [only]:
            if time.monotonic() - began > seconds:
                break
            outcome, wrong = attempt(number, seed, materials, Path(folder))
            outcomes[outcome] += 1
            if wrong:
                failures.append({"number": number, "outcome": outcome, "wrong": wrong})
    return {
        "seed": seed,
        "inputs": sum(outcomes.values()),
        "seconds": round(time.monotonic() - began, 1),
        "outcomes": dict(sorted(outcomes.items())),
        "failures": failures,
    }


def _too_long(signum: int, frame: object) -> None:
    raise TimeoutError(f"took longer than {LONGEST_S} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--only", type=int, help="the number of one input")
    given = parser.parse_args()
    signal.signal(signal.SIGALRM, _too_long)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    result = fuzz(given.inputs, given.seed, given.seconds, given.only)
    print(json.dumps(result))
    sys.exit(bool(result["failures"]))


if __name__ == "__main__":
    main()
