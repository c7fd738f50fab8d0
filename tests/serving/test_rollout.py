"""A new release: beside the old one in a replica, and to all replicas of an endpoint or none."""

import asyncio
import contextlib
import itertools
import json
import math
import random
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import torch
from openai import APIError, BadRequestError, OpenAI
from ray.util.state import list_actors
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from prefvec_ray.common.errors import InputError
from prefvec_ray.registry import Registry
from prefvec_ray.serving import ServingConfig, metrics, roll_out, start, stop
from prefvec_ray.serving.access.keys import add_key
from prefvec_ray.serving.engines.base import EngineError
from prefvec_ray.serving.engines.sampling_params import SamplingParams
from prefvec_ray.serving.release.release import Release, ServedVector, resolve_release
from prefvec_ray.serving.replica import Replica
from prefvec_ray.serving.request import GenerationRequest
from prefvec_ray.vectors import Entry, LiveModel, LowRank, load_vector, save_vector
from tests.conftest import free_port
from tests.serving.test_metrics import DASHBOARD

DRAW = random.Random(9)
PROMPT = tuple(DRAW.randrange(5, 300) for _ in range(150))
SETTING = (("harmless", 0.5), ("helpful", 1.0))


@pytest.fixture(scope="module")
def next_helpful(vector_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another training of `helpful`."""
    old = load_vector(vector_folders["helpful"])
    draw = torch.Generator().manual_seed(9)
    entries = {
        name: LowRank(*(torch.randn(part.shape, generator=draw) * part.std() for part in entry.parts().values()))
        for name, entry in old.entries.items()
    }
    return save_vector(type(old)(old.info, entries), tmp_path_factory.mktemp("next") / "helpful")


@pytest.fixture
def registry(vector_folders: dict[str, Path], tmp_path: Path) -> Registry:
    registry = Registry.open(tmp_path / "registry")
    for folder in vector_folders.values():
        registry.publish_vector(folder)
    return registry


def alone(base: Path, folders: Mapping[str, Path], prompt: Sequence[int], new: int) -> list[int]:
    model = LlamaForCausalLM.from_pretrained(base).eval()
    live = LiveModel(model, {n: load_vector(f) for n, f in folders.items()})
    live.set_coefficients(dict(SETTING))
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return whole[0, len(prompt) :].tolist()


@pytest.fixture(params=["merged", "steered"])
def config(request: pytest.FixtureRequest, base_folder: Path, registry: Registry) -> ServingConfig:
    engine = {"mode": request.param, "max_new_tokens": 300, "max_batch": 8}
    return ServingConfig.model_validate(
        {"model": "tiny", "base": base_folder, "registry": str(registry.store.folder), "engine": engine}
    )


@pytest.fixture
def replica(config: ServingConfig, make_replica: Callable[..., Replica]) -> Iterator[Replica]:
    replica = make_replica(config, resolve_release(config))
    yield replica
    replica.engine.close()


def later(release: Release, generation: int) -> Release:
    return Release(release.base_fingerprint, release.vectors, release.policy, release.created, generation)


async def ask(replica: Replica, generation: int, new: int = 24) -> list[int]:
    greedy = SamplingParams(max_tokens=new, temperature=0.0)
    job = GenerationRequest((PROMPT,), SETTING, greedy, release=("", generation))
    _, (answer,) = await replica.answer(job)
    return list(answer.tokens)


def test_a_request_keeps_the_release_that_it_started_with(
    config, replica, registry, base_folder, vector_folders, next_helpful
):
    """Same prompt, same coefficients, two generations, at once: nothing that one caches reaches the other."""
    registry.publish_vector(next_helpful)
    second = later(resolve_release(config), 1)
    assert second.vectors["helpful"].ref == "helpful@2"

    async def change_in_the_middle() -> list[list[int]]:
        job = GenerationRequest((PROMPT,), SETTING, SamplingParams(max_tokens=200, temperature=0.0))
        items = replica.stream(job)
        first: list[int] = []
        for _ in range(4):
            item: Any = await anext(items)
            first += [token for _, piece in item for token in piece.tokens] if isinstance(item, list) else []
        await replica.prepare(second, beside=("", 0))
        told = await asyncio.gather(*(ask(replica, generation) for generation in (0, 1, 0, 1)))
        async for item in items:
            first += [token for _, piece in item for token in piece.tokens]
        return [*told, first]

    *told, first = asyncio.run(asyncio.wait_for(change_in_the_middle(), 120))
    old = alone(base_folder, vector_folders, PROMPT, 200)
    new = alone(base_folder, vector_folders | {"helpful": next_helpful}, PROMPT, 24)
    assert old[:24] != new
    assert first == old[: len(first)]
    for tokens, truth in zip(told, (old, new, old, new), strict=True):
        assert tokens == truth[: len(tokens)]


def test_what_cannot_be_prepared_leaves_everything_as_it_was(config, replica, registry, next_helpful):
    release = resolve_release(config)
    before = asyncio.run(ask(replica, 0))
    for vector, error in (
        (ServedVector("helpful@7", "blake3:" + "0" * 64, "low-rank", {}), "helpful@7"),
        (ServedVector("helpful@1", "blake3:" + "0" * 64, "low-rank", {}), "another vector"),
    ):
        bad = Release(release.base_fingerprint, {**release.vectors, "helpful": vector}, release.policy, 0, 1)
        with pytest.raises(InputError, match=error):
            asyncio.run(replica.prepare(bad, beside=("", 0)))
    replica.check_health()
    assert asyncio.run(ask(replica, 0)) == before
    with pytest.raises(EngineError, match="generation 1"):
        asyncio.run(ask(replica, 1))


def test_what_no_job_needs_is_dropped_and_comes_back_when_asked_for(config, replica):
    release = resolve_release(config)
    before = asyncio.run(ask(replica, 0))
    for generation in (1, 2, 3):
        asyncio.run(replica.prepare(later(release, generation), beside=("", generation - 1)))
    assert asyncio.run(ask(replica, 0)) == asyncio.run(ask(replica, 3)) == before


# --- an endpoint of two replicas ------------------------------------------------------------------------------------


@dataclass
class Served:
    """`truths`: the text that a lone merged model answers, by the reference of `helpful`."""

    url: str
    config: ServingConfig
    registry: Registry
    truths: dict[str, str]

    def ask(self, **settings: Any) -> tuple[str, str]:
        """The answer's text and fingerprint."""
        with OpenAI(base_url=self.url, api_key="none", max_retries=8, timeout=60) as client:
            answer = client.completions.create(
                model="tiny",
                prompt=list(PROMPT),
                temperature=0,
                max_tokens=24,
                extra_body={"preferences": dict(SETTING)},
                **settings,
            )
        return answer.choices[0].text, answer.system_fingerprint

    def says(self, ref: str) -> bool:
        return self.ask()[0] == self.truths[ref]

    def replicas(self) -> list[dict[str, Any]]:
        return httpx.get(self.url.removesuffix("/v1") + "/healthz", timeout=30).json().get("replicas", [])


def metric_series() -> list[str]:
    counters, others = metrics.COUNTERS, {**metrics.GAUGES, **metrics.HISTOGRAMS}
    names = [f"ray_{name}_total" for name in counters]
    return names + [f"ray_{name}_count" if name in metrics.HISTOGRAMS else f"ray_{name}" for name in others]


def wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def served(
    ray_cluster: str,
    running: list[Any],
    base_folder: Path,
    vector_folders: dict[str, Path],
    next_helpful: Path,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    """An endpoint of two replicas behind two fronts."""
    stop()  # another file's endpoint; it deploys its own again
    home = tmp_path_factory.mktemp("rollout")
    registry = Registry.open(home / "registry")
    add_key(home / "keys.yaml", "nobody")
    for folder in vector_folders.values():
        registry.publish_vector(folder)
    registry.publish_vector(next_helpful)
    registry.set_alias("helpful", "production", 1, "the first")
    registry.publish_preset("balanced", {"harmless@1": 0.5}, reason="above the floor")
    registry.publish_preset("below", {"harmless@1": -0.5}, reason="below the floor")
    texts = {
        ref: tokenizer.decode(alone(base_folder, vector_folders | change, PROMPT, 24), skip_special_tokens=True)
        for ref, change in (("helpful@1", {}), ("helpful@2", {"helpful": next_helpful}))
    }
    config = ServingConfig.model_validate(
        {
            "model": "tiny",
            "base": base_folder,
            "registry": str(registry.store.folder),
            "vectors": {"helpful": "helpful@production", "harmless": "harmless@1"},
            "ranges": {"harmless": {"min": 0}},
            "floors": {"harmless": 0},
            "engine": {"max_new_tokens": 400, "max_batch": 8, "stream_interval": 2},
            "replicas": {"min": 2, "max": 2, "cpus": 0.5},
            "ingress_replicas": 2,
            "keys": home / "keys.yaml",
        }
    )
    yield Served(start(config, port=free_port()), config, registry, texts)
    stop()
    wait_for(lambda: registry.holds() == {})


def test_an_equal_release_changes_nothing(served):
    assert roll_out(served.config).generation == 0
    assert served.says("helpful@1")
    (held,) = served.registry.holds().values()
    assert held == ["harmless@1", "helpful@1"]
    with pytest.raises(InputError, match="model: only 'vectors' can be rolled out"):
        roll_out(served.config.model_copy(update={"model": "other"}))


def test_settings_stay_where_they_are_merged(served):
    before = sum(replica["merges"] for replica in served.replicas())
    with OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=60) as client:
        for i in range(40):
            preferences = {"harmless": (i % 2) / 2 + 0.25}
            client.completions.create(
                model="tiny", prompt=[5, 6, 7], max_tokens=2, extra_body={"preferences": preferences}
            )
    merges = sum(replica["merges"] for replica in served.replicas()) - before
    # Two settings by turns: a merge each, where they have a replica each, 40 where they share one; never by chance.
    assert merges <= 4 or merges >= 36


def test_a_vector_that_one_replica_cannot_load_is_served_by_none(served, next_helpful, tmp_path):
    third = load_vector(next_helpful)
    entries: dict[str, Entry] = {}
    for name, entry in third.entries.items():
        assert isinstance(entry, LowRank)
        entries[name] = LowRank(entry.A_RI * 2, entry.B_OR)
    version = served.registry.publish_vector(save_vector(type(third)(third.info, entries), tmp_path / "helpful"))
    (file,) = (file for file in version.files if file.name.endswith(".safetensors"))
    blob = next(served.registry.store.folder.rglob(f"{file.digest.removeprefix('blake3:')}*"))
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    broken = served.config.model_copy(update={"vectors": {"helpful": version.ref, "harmless": "harmless@1"}})
    with pytest.raises(InputError, match="cannot prepare"):
        roll_out(broken)
    assert served.says("helpful@1")
    assert len(served.replicas()) == 2
    (held,) = served.registry.holds().values()
    assert held == ["harmless@1", "helpful@1"]


def test_names_come_and_go_while_callers_see_one_release_at_a_time(served):
    """No server error, no floor crossed, and no list of preferences that is half of another release."""
    more = served.config.model_copy(update={"vectors": {**served.config.vectors, "kind": "helpful@2"}})
    asked: list[dict[str, Any]] = [
        {"preferences": {"harmless": 0.25}},
        {"preferences": {"harmless": -0.5}},
        {"preferences": {"kind": -0.5}},
        {"model": "tiny@balanced"},
        {"model": "tiny@below"},
    ]
    cards: list[httpx.Response] = []
    answers: list[tuple[dict[str, Any], httpx.Response]] = []
    done = threading.Event()

    def read(client: httpx.Client) -> None:
        while not done.is_set():
            cards.append(client.get("/preferences"))
            cards.append(client.get("/models"))

    def ask(client: httpx.Client) -> None:
        for number in itertools.count():
            if done.is_set():
                return
            wanted = asked[number % len(asked)]
            content = {"model": "tiny", "prompt": [5, 6], "max_tokens": 2} | wanted
            answers.append((wanted, client.post("/completions", json=content)))

    def answered(count: int) -> Callable[[], bool]:
        return lambda: len(answers) > count

    with httpx.Client(base_url=served.url, timeout=60) as client, ThreadPoolExecutor(4) as pool:
        callers = [pool.submit(each, client) for each in (read, read, ask, ask)]
        try:
            for config in (more, served.config) * 2:
                roll_out(config)
                wait_for(answered(len(answers) + len(asked)))
        finally:
            done.set()
        for caller in callers:
            caller.result()
    assert {response.status_code for response in cards} == {200}
    listed = [response.json() for response in cards if "presets" in response.json()]
    names = {tuple(each["preference"] for each in card["preferences"]) for card in listed}
    assert names == {("harmless", "helpful"), ("harmless", "helpful", "kind")}
    for card in listed:
        assert [preset["model"] for preset in card["presets"]] == ["tiny@balanced"]
        assert set(card["presets"][0]["preferences"]) == {each["preference"] for each in card["preferences"]}
    for wanted, response in answers:
        allowed = (200, 400) if "kind" in wanted.get("preferences", {}) else (200,)
        crossing = wanted in (asked[1], asked[4])
        assert response.status_code in ((400,) if crossing else allowed), (wanted, response.text)
    assert {response.status_code for wanted, response in answers if wanted is asked[2]} == {200, 400}


def test_a_moved_alias_reaches_all_while_callers_notice_nothing(served):
    """Every answer is a lone merged model's for its fingerprint; none fails; after the roll-out all are new."""
    fingerprints = {}
    answers: list[tuple[str, str]] = []
    done = threading.Event()

    def keep_asking() -> None:
        while not done.is_set():
            answers.append(served.ask())

    _, fingerprints["helpful@1"] = served.ask()
    with ThreadPoolExecutor(6) as pool:
        callers = [pool.submit(keep_asking) for _ in range(6)]
        try:
            wait_for(lambda: len(answers) > 6)
            served.registry.set_alias("helpful", "production", 2, "a better one")
            assert served.says("helpful@1"), "nothing moves by itself"
            release = roll_out(served.config)
            after = [served.ask() for _ in range(8)]
        finally:
            done.set()
        for caller in callers:
            caller.result()
    assert release.vectors["helpful"].ref == "helpful@2"
    assert release.context == 512, "of the base, which a roll-out does not load"
    fingerprints["helpful@2"] = release.fingerprint(SETTING)
    truths = {fingerprints[ref]: text for ref, text in served.truths.items()}
    assert len(truths) == 2
    assert len(set(truths.values())) == 2
    assert all(text == truths[fingerprint] for text, fingerprint in answers)
    assert set(after) == {(served.truths["helpful@2"], fingerprints["helpful@2"])}
    wait_for(lambda: served.registry.served(fingerprints["helpful@2"]) is not None)
    assert served.registry.served(fingerprints["helpful@2"]).coefficients == {"harmless@1": 0.5, "helpful@2": 1.0}


def test_prometheus_is_told(served):
    """Every metric of the front and of both replicas, with its labels, once each has something to say."""
    with OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=60) as client:
        list(client.completions.create(model="tiny", prompt="a", max_tokens=2, stream=True))
        with pytest.raises(BadRequestError):
            client.completions.create(model="tiny", prompt="a", n=99)
    port = ray.nodes()[0]["MetricsExportPort"]

    def missing() -> set[str]:
        lines = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text.splitlines()
        return {series for series in metric_series() if not any(line.startswith(series + "{") for line in lines)}

    wait_for(lambda: not missing(), 60)


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="no Prometheus is installed: apt-get install prometheus")
def test_a_real_prometheus_answers_every_query_of_the_dashboard(served, tmp_path):
    scraped, port = ray.nodes()[0]["MetricsExportPort"], free_port()
    (tmp_path / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s}\n"
        f"scrape_configs: [{{job_name: ray, static_configs: [{{targets: ['127.0.0.1:{scraped}']}}]}}]\n"
    )
    options = [f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    server = subprocess.Popen(["prometheus", *options, f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"])

    def values(query: str) -> list[float]:
        query = query.replace("$model", "tiny").replace("$__rate_interval", "1m")
        answer = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": query}, timeout=30)
        return [float(found["value"][1]) for found in answer.raise_for_status().json()["data"]["result"]]

    def unanswered() -> list[str]:
        """Queries without a number. What nobody asked for within the minute is none: a preset of another test."""
        client.completions.create(model="tiny", prompt="a", max_tokens=4)
        list(client.completions.create(model="tiny", prompt="a", max_tokens=4, stream=True))
        with pytest.raises(BadRequestError):
            client.completions.create(model="tiny", prompt="a", n=99)
        with contextlib.suppress(httpx.TransportError):  # it is still starting
            return [query for query in queries if all(map(math.isnan, values(query)))]
        return queries

    # What was admitted and then failed has no number here: no request did.
    asked = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    queries = [query for query in asked if 'status!="200"' not in query]
    assert len(queries) == len(asked) - 1
    try:
        with OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=60) as client:
            until = time.monotonic() + 120
            while left := unanswered():
                assert time.monotonic() < until, left
    finally:
        server.kill()
        server.wait()


def kill(dashboard: str, *deployments: str) -> Callable[[], None]:
    """A function that kills all actors of these deployments, which are looked up now."""
    alive = list_actors(address=dashboard, filters=[("state", "=", "ALIVE")], limit=1000)
    classes = tuple(f"ServeReplica:prefvec:{name}" for name in deployments)
    actors = [ray.get_actor(actor.name, "serve") for actor in alive if actor.class_name.startswith(classes)]
    assert len(actors) >= len(deployments)

    def strike() -> None:
        for actor in actors:
            ray.kill(actor, no_restart=False)

    return strike


def test_a_stream_goes_on_when_its_replica_dies(served, ray_cluster):
    ask: dict[str, Any] = {
        "model": "tiny",
        "prompt": list(PROMPT),
        "n": 8,
        "max_tokens": 300,
        "seed": 3,
        "temperature": 1,
    }
    texts = [""] * 8
    strike, received = kill(ray_cluster, "replica"), 0
    with OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=100) as client:
        for chunk in client.completions.create(**ask, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].text
            received += 1
            if received == 40:
                strike()
        assert texts == [choice.text for choice in client.completions.create(**ask).choices]
    assert received > 100
    assert sum(replica["finished"] for replica in served.replicas()) >= 16, "both were answered by new replicas"


def of_each_status(responses: Iterable[httpx.Response]) -> dict[int, int]:
    return Counter(response.status_code for response in responses)


def keyed(served: Served, **limits: Any) -> httpx.Client:
    """A client with a new key of these limits."""
    assert served.config.keys is not None
    key = add_key(served.config.keys, "limited", **limits)[1]
    return httpx.Client(base_url=served.url, headers={"authorization": f"Bearer {key}"}, timeout=60)


SHORT = {"model": "tiny", "prompt": [5, 6], "max_tokens": 2}


def test_two_fronts_count_as_one(served):
    """Requests, tokens and requests at once are the caller's, whichever front it reaches."""

    def ask(client: httpx.Client) -> httpx.Response:
        return client.post("/completions", json=SHORT)

    with ThreadPoolExecutor(8) as pool:
        with keyed(served, requests_per_minute=12) as client:
            assert of_each_status(pool.map(ask, [client] * 40)) == {200: 12, 429: 28}
        with keyed(served, tokens_per_minute=50) as client:
            responses = [ask(client) for _ in range(16)]
            assert of_each_status(responses) == {200: 12, 429: 4}, "4 tokens each, of two and two"
            left = [int(r.headers["x-ratelimit-remaining-tokens"]) for r in responses if r.is_success]
            assert left == list(range(46, 0, -4))
            too_many = SHORT | {"n": 99}
            assert client.post("/completions", json=too_many).status_code == 400
            wait_for(lambda: client.post("/completions", json=too_many).status_code == 429)  # its body was charged
        with keyed(served, requests_at_once=2) as client:
            assert of_each_status(ask(client) for _ in range(6)) == {200: 6}, "one after the other"
            with client.stream("POST", "/completions", json=SHORT | {"stream": True, "max_tokens": 300, "n": 4}) as one:
                assert one.status_code == 200
                with client.stream("POST", "/completions", json=SHORT | {"stream": True, "max_tokens": 300}) as two:
                    assert two.status_code == 200
                    assert of_each_status(pool.map(ask, [client] * 6)) == {429: 6}
            wait_for(lambda: ask(client).is_success)


def test_without_a_coordinator_nobody_gets_more_than_allowed(served, ray_cluster):
    """What is lost with it is the count: it begins from zero, as one front's does."""
    with keyed(served, requests_per_minute=5) as limited, httpx.Client(base_url=served.url, timeout=60) as free:
        assert of_each_status(limited.post("/completions", json=SHORT) for _ in range(8)) == {200: 5, 429: 3}
        kill(ray_cluster, "coordinator")()
        after: list[httpx.Response] = []
        until = time.monotonic() + 60
        while time.monotonic() < until and not any(response.status_code == 429 for response in after):
            assert free.post("/completions", json=SHORT).is_success, "callers without limits need no coordinator"
            after.append(limited.post("/completions", json=SHORT))
            below = free.post("/completions", json=SHORT | {"preferences": {"harmless": -0.5}})
            assert below.status_code == 400, "floors hold on each front"
        statuses = of_each_status(after)
        assert set(statuses) <= {200, 429, 503}
        assert statuses[200] <= 5
        assert statuses[429] == 1
    assert roll_out(served.config).vectors["helpful"].ref == "helpful@2"


def test_restarted_replicas_and_a_restarted_front_begin_with_what_was_committed(served, ray_cluster):
    assert served.says("helpful@2")
    kill(ray_cluster, "replica", "front", "coordinator")()

    def back() -> bool:
        with contextlib.suppress(httpx.HTTPError, APIError, json.JSONDecodeError):  # the proxy answers for a lost front
            return len(served.replicas()) == 2 and served.says("helpful@2")
        return False

    wait_for(back)
    for _ in range(6):
        assert served.says("helpful@2")
