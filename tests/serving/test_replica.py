"""A replica without Ray: jobs in, answers out, in both modes."""

import asyncio
import itertools
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefvec_ray.common.errors import InputError, JobError
from prefvec_ray.registry import Registry
from prefvec_ray.serving.config import ServingConfig
from prefvec_ray.serving.engines.base import EngineError, PromptTooLongError
from prefvec_ray.serving.engines.sampling_params import SamplingParams
from prefvec_ray.serving.release import loaded
from prefvec_ray.serving.release.release import resolve_release
from prefvec_ray.serving.replica import Replica
from prefvec_ray.serving.request import GenerationRequest, Started
from prefvec_ray.vectors import PreferenceVector, load_vector, save_vector
from prefvec_ray.vectors.entries import scaled

SETTING = (("harmless", 0.5), ("helpful", -0.5))


@pytest.fixture(scope="module", params=["merged", "steered"])
def replica(
    request: pytest.FixtureRequest, make_replica: Callable[..., Replica], base_folder: Path, registry_root: str
) -> Iterator[Replica]:
    engine = {"mode": request.param, "max_new_tokens": 64}
    config = ServingConfig.model_validate(
        {"model": "tiny", "base": base_folder, "registry": registry_root, "engine": engine}
    )
    replica = make_replica(config, resolve_release(config))
    yield replica
    replica.engine.close()


def answer(
    replica: Replica, prompts: Any, coefficients: Any = SETTING, *, release: Any = ("", 0), **sampling: Any
) -> tuple[int, list[Any]]:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 16} | sampling)
    return asyncio.run(replica.answer(GenerationRequest(prompts, coefficients, params, release=release)))


def test_a_replica_has_answered_before_it_is_ready(replica):
    assert replica.status().finished >= 1
    replica.check_health()


@pytest.mark.parametrize("folder", ["base", "registry"])
def test_a_replica_on_a_node_that_does_not_see_a_folder_names_both(
    folder, make_replica, base_folder, registry_root, tmp_path
):
    given = {"model": "tiny", "base": base_folder, "registry": registry_root}
    release = resolve_release(ServingConfig.model_validate(given))
    shutil.copytree(given[folder], tmp_path / "storage")
    config = ServingConfig.model_validate({**given, folder: str(tmp_path / "storage")})
    shutil.rmtree(tmp_path / "storage")  # the storage is no longer mounted
    (tmp_path / "storage").mkdir()
    with pytest.raises(
        JobError, match=rf"^node .* does not see {tmp_path / 'storage'}: is the storage mounted there\?$"
    ):
        make_replica(config, release)


def test_text_ids_and_chats_become_prompts(replica, tokenizer, merged_alone):
    ids = tuple(tokenizer("the quick fox").input_ids)
    prompt_tokens, (from_text, from_ids) = answer(replica, prompts=("the quick fox", ids))
    assert prompt_tokens == 2 * len(ids)
    assert from_text == from_ids
    assert list(from_text.tokens) == merged_alone(ids, dict(SETTING), 16)
    chat = ({"role": "user", "content": "the quick fox"},)
    said = tuple(tokenizer("<|user|>the quick fox<|end|><|assistant|>").input_ids)
    assert answer(replica, prompts=(chat,)) == answer(replica, prompts=(said,))


def test_choices_differ_and_a_seed_brings_them_back(replica):
    sampled = {"prompts": ("the lazy dog",), "temperature": 1.0, "n": 4}
    _, choices = answer(replica, **sampled, seed=5)
    assert len({choice.text for choice in choices}) == 4
    assert answer(replica, **sampled, seed=5)[1] == choices
    assert answer(replica, **sampled, seed=6)[1] != choices
    assert answer(replica, **sampled)[1] != answer(replica, **sampled)[1], "no seed: new every time"
    assert answer(replica, **sampled | {"prompts": ("no", "the lazy dog")}, seed=5)[1][4:] == choices


def test_without_a_number_the_answer_is_as_long_as_allowed(replica):
    _, (piece,) = answer(replica, prompts=((5, 6, 7),), temperature=1.0, max_tokens=None, seed=3)
    assert piece.finish_reason == "stop" or len(piece.tokens) == 64
    _, (piece,) = answer(replica, prompts=((5,) * 500,), temperature=1.0, max_tokens=None, seed=3)
    assert piece.finish_reason == "stop" or len(piece.tokens) == 12


def test_a_stop_that_is_never_part_of_a_text_is_refused(replica):
    with pytest.raises(InputError, match=r"stop: '<\|end\|>' is a token that is never part of an answer's text"):
        answer(replica, prompts=("the quick fox",), stop=["no", "a<|end|>"])


@pytest.mark.parametrize(
    ("prompt", "error", "says"),
    [
        ("", InputError, "no tokens"),
        ((1, 10**6), InputError, "vocabulary"),
        ("fox " * 600, PromptTooLongError, "context of 512"),
        (({"role": "tool", "content": "x"},), InputError, "no tools here"),
    ],
)
def test_a_bad_prompt_is_refused_before_any_answer_starts(replica, prompt, error, says):
    before = replica.status()
    with pytest.raises(error, match=says):
        answer(replica, prompts=("a good one", prompt))
    assert replica.status() == before


def test_leaving_a_stream_stops_all_its_answers(replica):
    async def leave() -> None:
        job = GenerationRequest(("the dog",), SETTING, SamplingParams(n=8, temperature=1.5, max_tokens=64))
        items = replica.stream(job)
        assert isinstance(await anext(items), Started)
        await anext(items)
        await items.aclose()
        while replica.status().running:
            await asyncio.sleep(0.01)

    before = replica.status().cancelled
    asyncio.run(asyncio.wait_for(leave(), 60))
    assert replica.status().cancelled > before


def test_another_base_on_the_node_is_refused(make_replica, base_folder, registry_root):
    config = ServingConfig(model="tiny", base=base_folder, registry=registry_root)
    release = resolve_release(config)
    other = type(release)("blake3:" + "0" * 64, release.vectors, release.policy, release.created)
    with pytest.raises(InputError, match="put the same base on every node"):
        make_replica(config, other)


def test_the_event_loop_goes_on_while_a_replica_is_constructed(base_folder, registry_root, monkeypatch):
    loop_went_on = threading.Event()

    def load_vector_once_the_loop_went_on(folder: Path) -> PreferenceVector:
        assert loop_went_on.wait(60), "the event loop stands still"
        return load_vector(folder)

    monkeypatch.setattr(loaded, "load_vector", load_vector_once_the_loop_went_on)
    config = ServingConfig(model="tiny", base=base_folder, registry=registry_root)
    replica = Replica.__new__(Replica)

    async def construct() -> None:
        asyncio.get_running_loop().call_later(0.01, loop_went_on.set)
        await replica.__init__(config, resolve_release(config))  # type: ignore[misc]
        replica.check_health()

    asyncio.run(construct())
    assert replica.status().finished == 1
    replica.engine.close()


def test_a_dead_engine_is_unhealthy(make_replica, base_folder, registry_root):
    config = ServingConfig(model="tiny", base=base_folder, registry=registry_root)
    replica = make_replica(config, resolve_release(config))
    replica.engine.close()
    with pytest.raises(EngineError):
        replica.check_health()


def test_earlier_releases_leave_the_cache(make_replica, base_folder, vector_folders, tmp_path, monkeypatch):
    """The cache has room for three versions, and each release brings another one: the earliest must make room."""
    registry = Registry.open(tmp_path / "registry")
    vector = load_vector(vector_folders["helpful"])
    for number in range(1, 7):
        entries = {name: scaled(entry, float(number)) for name, entry in vector.entries.items()}
        registry.publish_vector(save_vector(vector.replace(entries), tmp_path / f"helpful-{number}"))
    largest = max(version.size for version in registry.list_vectors())
    monkeypatch.setenv("PREFVEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PREFVEC_CACHE_BYTES", str(3 * largest + 10_000))
    configs = [
        ServingConfig(
            model="tiny",
            base=base_folder,
            registry=str(tmp_path / "registry"),
            vectors={"helpful": f"helpful@{number}"},
        )
        for number in range(1, 7)
    ]
    releases = [replace(resolve_release(config), generation=number) for number, config in enumerate(configs)]
    replica = make_replica(configs[0], releases[0])
    try:
        for before, release in itertools.pairwise(releases):
            asyncio.run(replica.prepare(release, before.id))
            _, (piece,) = answer(replica, prompts=((5, 6),), release=release.id, coefficients=(("helpful", 0.1),))
            assert piece.tokens
    finally:
        replica.engine.close()
