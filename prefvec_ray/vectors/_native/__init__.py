"""C++ for what torch does slowly on CPUs: compiled on first use where a compiler is, never needed.

A library is built once per source, compiler and CPU into a per-user cache (`$XDG_CACHE_HOME/prefvec-ray`),
installed by an atomic rename, so any number of processes may build it at once. `PREFVEC_NATIVE=0` turns it
off.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)

FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math", "-march=native"]
if platform.machine() == "x86_64":
    FLAGS.append("-mprefer-vector-width=512")
APART = "-ffp-contract=off"
"""products and sums rounded apart: merging has no fused multiply-add in torch's path, which it is to match"""


@functools.cache
def merge_library() -> ctypes.CDLL | None:
    """The compiled `merge.cpp`, or None where it cannot be had (one log line says why)."""
    library = _library("merge", APART)
    if library:
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        library.prefvec_merge.argtypes = [pointer, count, pointer, pointer, ctypes.c_int32]
        library.prefvec_merge.restype = count
    return library


@functools.cache
def steer_library() -> ctypes.CDLL | None:
    """The compiled `steer.cpp`, or None where it cannot be had (one log line says why)."""
    library = _library("steer")
    if library:
        library.prefvec_steer.argtypes = [ctypes.c_char_p]
        library.prefvec_steer.restype = None
    return library


@functools.cache
def openmp() -> int:
    """Address of `GOMP_parallel` in the OpenMP library of this process; 0 for none.

    LLVM's and Intel's libraries have GNU's entry points too.
    """
    try:
        mapped = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return 0
    loaded = {line.split()[-1] for line in mapped if re.search(r"/lib(gomp|iomp5|omp)[^/]*\.so", line)}
    for path in sorted(loaded, key=lambda path: "iomp" not in path):  # a preloaded one serves all
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value or 0
        except (OSError, AttributeError):
            continue
    return 0


def _library(name: str, *flags: str) -> ctypes.CDLL | None:
    if os.environ.get("PREFVEC_NATIVE") == "0":
        return None
    try:
        return compile_library(Path(__file__).with_name(f"{name}.cpp"), *flags)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("no compiled %s, the slower torch path is used instead: %s", name, error)
        return None


def compile_library(source: Path, *flags: str) -> ctypes.CDLL:
    """Build (or find) a C++ file's shared library and load it. Raises OSError or SubprocessError where that
    fails."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise FileNotFoundError("no C++ compiler (c++ or $CXX) found")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    key = hashlib.sha256(b"\0".join([source.read_bytes(), version, " ".join([*FLAGS, *flags]).encode(), _cpu()]))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefvec-ray" / "native"
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    if cache.stat().st_uid != os.getuid():
        raise PermissionError(f"{cache} belongs to another user, and code is loaded only from a folder of one's own")
    library = cache / f"{source.stem}-{key.hexdigest()[:24]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built = Path(folder) / "built.so"
            command = [compiler, *FLAGS, *flags, str(source), "-o", str(built)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if done.returncode:
                raise OSError(f"{' '.join(command)} failed: {done.stderr.strip()[:500]}")
            built.replace(library)
    return ctypes.CDLL(str(library))


def _cpu() -> bytes:
    """What -march=native depends on: a home folder may be shared by machines whose instruction sets
    differ."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()
    return b"\n".join(sorted({line for line in lines if line.startswith((b"flags", b"Features", b"model name"))}))
