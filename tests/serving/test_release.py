"""What a deployment serves: exact versions, and nothing that does not belong together."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from prefvec_ray.cli import main
from prefvec_ray.common.errors import InputError
from prefvec_ray.registry import Registry, serving_fingerprint
from prefvec_ray.registry.store import Store
from prefvec_ray.serving.access.policy import PreferenceError
from prefvec_ray.serving.config import EngineConfig, ServingConfig
from prefvec_ray.serving.release.records import ServingRecords
from prefvec_ray.serving.release.release import resolve_release
from prefvec_ray.vectors import fingerprint, save_vector, vector_from_state


@pytest.fixture
def config(base_folder: Path, registry_root: str) -> ServingConfig:
    return ServingConfig(model="tiny", base=base_folder, registry=registry_root)


def test_by_default_the_newest_vectors_of_this_base_without_single_runs(config, base_folder):
    release = resolve_release(config)
    assert {name: vector.ref for name, vector in release.vectors.items()} == {
        "harmless": "harmless@1",
        "helpful": "helpful@1",
    }
    assert release.base_fingerprint == fingerprint(base_folder)


def test_references_are_fixed_to_versions(config):
    release = resolve_release(config.model_copy(update={"vectors": {"kind": "harmless"}}))
    assert release.vectors["kind"].ref == "harmless@1"


def test_the_fingerprint_is_of_base_vectors_and_coefficients_not_of_names(config):
    release = resolve_release(config)
    renamed = resolve_release(config.model_copy(update={"vectors": {"kind": "harmless", "useful": "helpful"}}))
    fp = release.fingerprint((("harmless", 0.5), ("helpful", 0.0)))
    assert fp == renamed.fingerprint((("kind", 0.5), ("useful", 0.0)))
    assert fp == serving_fingerprint(release.base_fingerprint, {release.vectors["harmless"].digest: 0.5})
    assert fp != release.fingerprint((("harmless", 0.5), ("helpful", 1e-6)))


@pytest.mark.parametrize(
    ("engine", "context"),
    [
        ({}, 512),
        ({"kind": "vllm"}, None),
        ({"kind": "vllm", "vllm": {"max_model_len": 64}}, 64),
        ({"kind": "vllm", "vllm": {"max_model_len": -1}}, None),
    ],
)
def test_the_context_is_known_where_no_engine_need_be_asked(config, engine, context):
    assert resolve_release(config.model_copy(update={"engine": EngineConfig(**engine)})).context == context


def test_a_preset_speaks_of_vectors_and_is_bound_by_the_policy(config):
    registry = Registry.open(config.registry)
    release = resolve_release(ServingConfig.model_validate(config.model_dump() | {"ranges": {"harmless": {"min": 0}}}))
    assert release.preset(registry.resolve_preset("cautious@1")) == (("harmless", 0.75), ("helpful", 0.25))
    assert (
        release.fingerprint(release.preset(registry.resolve_preset("cautious@1")))
        == registry.resolve_preset("cautious@1").fingerprint
    )
    with pytest.raises(PreferenceError, match="outside the allowed range"):
        release.preset(registry.resolve_preset("reckless"))
    fewer = resolve_release(config.model_copy(update={"vectors": {"helpful": "helpful@1"}}))
    with pytest.raises(InputError, match="made with harmless@1, which this endpoint does not serve"):
        fewer.preset(registry.resolve_preset("cautious@1"))


def test_a_preference_in_parts(config, tmp_path):
    """Split by the command, served by one coefficient or by a profile, bounded as one preference."""
    root = str(shutil.copytree(config.registry, tmp_path / "registry"))
    told = CliRunner().invoke(main, ["vectors", "split", "helpful@1", "--by", "depth:2", "--registry", root])
    assert told.output.splitlines() == [
        "helpful@1 depth1of2 -> helpful.depth1of2@1",
        "helpful@1 depth2of2 -> helpful.depth2of2@1",
    ]
    config = config.model_copy(update={"registry": root})
    assert set(resolve_release(config).vectors) == {"harmless", "helpful"}, "parts are served where they are named"
    lineage = Registry.open(root).lineage("helpful.depth1of2@1")
    assert [e.role for e in lineage.edges if e.parent == resolve_release(config).vectors["helpful"].digest] == ["whole"]

    halves = [f"helpful.depth{k}of2" for k in (1, 2)]
    named = {"harmless": "harmless@1", **{half: f"{half}@1" for half in halves}}
    bounds = {"ranges": {"helpful": {"min": -0.2}}, "floors": {"helpful": -0.2}}
    release = resolve_release(ServingConfig.model_validate(config.model_dump() | {"vectors": named} | bounds))
    assert release.policy.coefficients({"helpful": 0.5}) == (("harmless", 0.0), *((half, 0.5) for half in halves))
    registry = Registry.open(root)
    registry.publish_preset("late", {f"{halves[0]}@1": 0.2, f"{halves[1]}@1": 0.9}, reason="later layers more")
    assert dict(release.preset(registry.resolve_preset("late"))) == {"harmless": 0.0, halves[0]: 0.2, halves[1]: 0.9}
    registry.publish_preset("low", {f"{halves[0]}@1": 0.2, f"{halves[1]}@1": -0.3}, reason="below the floor")
    with pytest.raises(PreferenceError, match=r"outside the allowed range \[-0.2, 1\]"):
        release.preset(registry.resolve_preset("low"))
    with pytest.raises(InputError, match=r"helpful\.depth2of2 is missing"):
        resolve_release(config.model_copy(update={"vectors": {halves[0]: f"{halves[0]}@1"}}))


def test_a_presets_coefficients_for_one_vector_add_up(config, vector_folders, tmp_path):
    registry = Registry.open(tmp_path / "registry")
    registry.publish_vector(vector_folders["helpful"])
    registry.publish_vector(vector_folders["helpful"], name="useful")
    registry.publish_preset("both", {"helpful@1": 0.75, "useful@1": 0.125}, reason="two names of one vector")
    registry.publish_preset("much", {"helpful@1": 0.75, "useful@1": 0.75}, reason="more than the range")
    found = resolve_release(
        config.model_copy(update={"registry": str(tmp_path / "registry"), "vectors": {"kind": "helpful"}})
    )
    both = registry.resolve_preset("both")
    assert found.preset(both) == (("kind", 0.875),)
    assert found.fingerprint(found.preset(both)) == both.fingerprint
    with pytest.raises(PreferenceError, match=r"1\.5 is outside the allowed range"):
        found.preset(registry.resolve_preset("much"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"base": "nowhere"}, "no folder"),
        ({"vectors": {"helpful": "helpful@9"}}, "helpful@9"),
        ({"vectors": {"polite": "polite"}}, "polite"),
        ({"ranges": {"polite": {"min": 0}}}, "'polite' not among the served"),
    ],
)
def test_what_is_not_there_is_refused_by_name(config, changes, says):
    with pytest.raises(InputError, match=says):
        resolve_release(ServingConfig.model_validate(config.model_dump() | changes))


def test_an_empty_registry_serves_nothing(config, tmp_path):
    empty = config.model_copy(update={"registry": str(tmp_path / "empty")})
    with pytest.raises(InputError, match="no registry here"):
        resolve_release(empty)
    assert not (tmp_path / "empty").exists()
    Store.open(tmp_path / "empty").begin()
    with pytest.raises(InputError, match="no vectors for the base"):
        resolve_release(empty)


def test_steering_wants_low_rank_and_every_vector_its_own_base(config, base_folder, tmp_path, vectors):
    registry = Registry.open(tmp_path / "registry")
    name = vectors["helpful"].names()[0]
    for preference, base in (("full", fingerprint(base_folder)), ("foreign", "blake3:" + "0" * 64)):
        delta = {name: vectors["helpful"].dense(name)}
        vector = vector_from_state(delta, preference=preference, base_fingerprint=base)
        registry.publish_vector(save_vector(vector, tmp_path / preference))
    content = config.model_dump() | {"registry": str(tmp_path / "registry")}
    steered = content | {"engine": {"mode": "steered"}, "vectors": {"full": "full"}}
    with pytest.raises(InputError, match=r"full@1 .* is in full form"):
        resolve_release(ServingConfig.model_validate(steered))
    with pytest.raises(InputError, match=r"foreign@1 .* belongs to base"):
        resolve_release(ServingConfig.model_validate(content | {"vectors": {"foreign": "foreign"}}))


@pytest.fixture
def quantized(base_folder: Path, tmp_path: Path) -> Path:
    """A folder that says it is quantized, with other bytes than its base."""
    folder = tmp_path / "int4"
    shutil.copytree(base_folder, folder)
    about = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    (folder / "config.json").write_text(json.dumps(about | {"quantization_config": quantization}))
    state = load_file(folder / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


STEERED_BY_VLLM = {"kind": "vllm", "mode": "steered"}


@pytest.mark.parametrize("named", ["folder", "fingerprint"])
def test_a_quantized_copy_takes_the_vectors_of_its_base(config, base_folder, quantized, named):
    source = str(base_folder) if named == "folder" else fingerprint(base_folder)
    changes = {"base": quantized, "quantized_from": source, "engine": STEERED_BY_VLLM}
    release = resolve_release(ServingConfig.model_validate(config.model_dump() | changes))
    itself = resolve_release(config)
    assert (release.base_fingerprint, release.quantized) == (fingerprint(base_folder), fingerprint(quantized))
    assert release.vectors.keys() == itself.vectors.keys()
    coefficients = (("harmless", 0.5),)
    fingerprints = [each.fingerprint(coefficients) for each in (release, itself)]
    assert fingerprints[0] != fingerprints[1], "an answer says which weights it came from"
    registry = Registry.open(config.registry)
    records = ServingRecords(registry, "quantized")
    records.note(fingerprints[0], release, coefficients, "anyone")
    records.close()
    served = registry.served(fingerprints[0])
    assert served is not None
    assert (served.base_fingerprint, served.quantized) == (release.base_fingerprint, release.quantized)


def test_what_a_quantized_copy_was_made_from_is_said_and_not_guessed(config, base_folder, quantized, tmp_path):
    def resolved(**changes: object) -> None:
        given = config.model_dump() | {"base": quantized, "engine": STEERED_BY_VLLM} | changes
        resolve_release(ServingConfig.model_validate(given))

    with pytest.raises(InputError, match="since this one is quantized, name the model that it was made from"):
        resolved(vectors={"helpful": "helpful@1"})
    with pytest.raises(InputError, match="is not quantized"):
        resolved(base=base_folder, quantized_from=str(base_folder))
    with pytest.raises(InputError, match="no fingerprint"):
        resolved(quantized_from="blake3:1234")
    with pytest.raises(InputError, match="no folder"):
        resolved(quantized_from=str(tmp_path / "nowhere"))
    other = tmp_path / "other"
    shutil.copytree(base_folder, other)
    about = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(about | {"num_hidden_layers": 7}))
    with pytest.raises(InputError, match="num_hidden_layers is 2 here, 7 there"):
        resolved(quantized_from=str(other))
    with pytest.raises(InputError, match="belongs to base"):
        resolved(quantized_from="blake3:" + "a" * 64, vectors={"helpful": "helpful@1"})
    for engine in ({"kind": "vllm", "mode": "merged"}, {"mode": "steered"}):
        with pytest.raises(ValueError, match="'quantized_from' with another engine"):
            resolved(quantized_from=str(base_folder), engine=engine)
