"""The registry knows what is served, and can say what an answer's fingerprint stands for."""

import pytest

from prefvec_ray.common.errors import InputError
from prefvec_ray.registry import Registry
from prefvec_ray.serving.config import ServingConfig
from prefvec_ray.serving.release.records import ServingRecords
from prefvec_ray.serving.release.release import resolve_release


def test_what_is_served_cannot_be_retired_until_it_is_let_go(base_folder, vector_folders, tmp_path):
    registry = Registry.open(tmp_path / "registry")
    registry.publish_vector(vector_folders["helpful"])
    release = resolve_release(ServingConfig(model="tiny", base=base_folder, registry=str(tmp_path / "registry")))
    records = ServingRecords(registry, "abc")
    records.hold(release)
    with pytest.raises(InputError, match="replica serve-abc"):
        registry.retire("helpful@1", "old")
    setting = (("helpful", 0.5),)
    for _ in range(3):
        records.note(release.fingerprint(setting), release, setting, "anonymous")
    records.close()
    served = registry.served(release.fingerprint(setting))
    assert served is not None
    assert served.coefficients == {"helpful@1": 0.5}
    assert registry.holds() == {}
    registry.retire("helpful@1", "nobody serves it")


def test_one_caller_does_not_use_up_what_is_recorded(base_folder, vector_folders, tmp_path, monkeypatch):
    monkeypatch.setattr("prefvec_ray.serving.release.records.MOST_OF_A_CALLER", 3)
    registry = Registry.open(tmp_path / "registry")
    registry.publish_vector(vector_folders["helpful"])
    release = resolve_release(ServingConfig(model="tiny", base=base_folder, registry=str(tmp_path / "registry")))
    records = ServingRecords(registry, "abc")
    settings = [(("helpful", number / 16),) for number in range(8)]
    for setting in settings[:7]:
        records.note(release.fingerprint(setting), release, setting, "key-flood")
    records.note(release.fingerprint(settings[7]), release, settings[7], "key-other")
    records.close()
    kept = [setting for setting in settings if registry.served(release.fingerprint(setting))]
    assert kept == [*settings[:3], settings[7]]
