"""From what was served back to the data."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prefvec_ray.common.errors import InputError
from prefvec_ray.registry import Registry
from prefvec_ray.vectors import load_vector, save_vector, subtract

Make = Callable[..., Path]
BASE = "blake3:" + "b" * 64


def test_a_served_fingerprint_leads_to_its_data(registry: Registry, make_vector: Make, tmp_path: Path) -> None:
    data = "blake3:" + "d" * 64
    runs = [make_vector(f"helpful{sign}", seed, data_digest=data) for seed, sign in ((1, "+"), (2, "-"))]
    deltas = [registry.publish_vector(folder) for folder in runs]
    phi = subtract(*map(load_vector, runs), preference="helpful", dtype=torch.bfloat16)
    vector = registry.publish_vector(save_vector(phi, tmp_path / "phi"))
    preset = registry.publish_preset("eager", {"helpful@1": 0.7}, reason="try")
    served = registry.record_served({"helpful@1": 0.3}, base_fingerprint=BASE)

    for what in (served.fingerprint, preset.fingerprint, "eager", "preset:eager@1"):
        graph = registry.lineage(what)
        assert graph.ids("vector") == [vector.digest]
        assert sorted(graph.ids("delta")) == sorted(delta.digest for delta in deltas)
        assert graph.ids("data") == [data]
        assert graph.ids("base") == [BASE]
    roles = {(edge.child, edge.role): edge.parent for edge in registry.lineage(served.fingerprint).edges}
    assert roles[served.fingerprint, "0.3 x helpful@1"] == vector.digest
    assert roles[vector.digest, "positive"] == deltas[0].digest
    assert roles[deltas[1].digest, "data"] == data
    assert 'n0["vector helpful@1"]' in registry.lineage("helpful").to_mermaid()
    with pytest.raises(InputError, match="is recorded here"):
        registry.lineage("blake3:" + "0" * 64)


def test_lineage_outlives_the_bytes(registry: Registry, make_vector: Make) -> None:
    published = registry.publish_vector(make_vector("helpful", data_digest="blake3:" + "d" * 64))
    served = registry.record_served({"helpful@1": 1.0}, base_fingerprint=BASE)
    registry.retire("helpful@1", "too old")
    registry.gc(apply=True, grace_s=0)
    assert registry.lineage(served.fingerprint).ids("vector") == [published.digest]
    assert registry.lineage(served.fingerprint).ids("data") == ["blake3:" + "d" * 64]
