"""A short run of the fuzzer of readers; `python -m tests.fuzz.readers` makes a long one."""

import importlib.util
from pathlib import Path


def test_a_mutated_file_is_read_or_refused_in_one_line(tmp_path):
    spec = importlib.util.spec_from_file_location("fuzz_readers", Path(__file__).with_name("readers.py"))
    assert spec is not None
    assert spec.loader is not None
    readers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readers)
    ends, failures = readers.run(300, seed=7, seconds=120, folder=tmp_path)
    assert not failures, "\n".join(failures)
    assert {end.split()[0] for end in ends} >= {"data", "config", "vector"}
