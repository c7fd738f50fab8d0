"""The deployment grows with its queue, goes to zero and comes back, and no answer is cut short by any of it."""

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from openai import OpenAI
from transformers import PreTrainedTokenizerBase

from prefvec_ray.registry import Registry
from prefvec_ray.serving import ServingConfig, start, stop
from prefvec_ray.serving.release.release import resolve_release
from prefvec_ray.vectors import load_vector, save_vector

PROMPT = list(range(5, 45))
NEW, LONG = 24, 400
ETAS = (-1.0, -0.5, 0.5, 1.0)
ENGINE = {"max_new_tokens": LONG, "max_batch": 2}


@dataclass
class Deployed:
    """`truths`: (fingerprint, eta, tokens) -> the text that a lone merged model answers."""

    config: ServingConfig
    port: int
    truths: dict[tuple[str, float, int], str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def deploy(self, **changes: Any) -> None:
        self.config = ServingConfig.model_validate(self.config.model_dump() | changes)
        start(self.config, port=self.port, replace=True)

    def health(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/healthz", timeout=30).json()

    def replicas(self) -> list[dict[str, Any]]:
        """Those that take requests."""
        return self.health().get("replicas", [])

    def client(self, retries: int) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=retries, timeout=100)

    def ask(self, eta: float, retries: int = 0) -> bool:
        """Whether the answer is that of the model which its fingerprint names."""
        with self.client(retries) as client:
            told = client.completions.create(**body(eta, NEW))
        return told.choices[0].text == self.truths[told.system_fingerprint, eta, NEW]

    def stream(self, eta: float, n: int) -> bool:
        """The same of `n` long answers, which must all be whole."""
        texts, ends, fingerprint = [""] * n, [""] * n, ""
        with self.client(0) as client:
            for chunk in client.completions.create(**body(eta, LONG), n=n, stream=True):
                choice, fingerprint = chunk.choices[0], chunk.system_fingerprint
                texts[choice.index] += choice.text
                ends[choice.index] = choice.finish_reason or ends[choice.index]
        assert all(ends)
        return texts == [self.truths[fingerprint, eta, LONG]] * n

    @contextlib.contextmanager
    def traffic(self, callers: int, ask: Callable[[float], bool]) -> Iterator[list[bool]]:
        """Callers who ask without pause; what their answers were worth, so far. Raises what any of them met."""
        done, told = threading.Event(), []

        def keep_asking(eta: float) -> None:
            while not done.is_set():
                told.append(ask(eta))

        with ThreadPoolExecutor(callers) as pool:
            asking = [pool.submit(keep_asking, ETAS[i % len(ETAS)]) for i in range(callers)]
            try:
                yield told
            finally:
                done.set()
            for caller in asking:
                caller.result()


def body(eta: float, new: int) -> dict[str, Any]:
    extra = {"preferences": {"helpful": eta}}
    return {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": new, "extra_body": extra}


def wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def deployed(
    ray_cluster: str,
    running: list[Any],
    base_folder: Path,
    vector_folders: dict[str, Path],
    tokenizer: PreTrainedTokenizerBase,
    merged_alone: Callable[..., list[int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Deployed]:
    """Two replicas, which serve the first version of `helpful`. The second is what `harmless` is."""
    stop()  # another file's endpoint; it deploys its own again
    folder = tmp_path_factory.mktemp("scale")
    registry = Registry.open(folder / "registry")
    registry.publish_vector(vector_folders["helpful"])
    other = load_vector(vector_folders["harmless"]).replace(preference="helpful")
    registry.publish_vector(save_vector(other, folder / "helpful"))
    config = ServingConfig.model_validate(
        {
            "model": "tiny",
            "base": base_folder,
            "registry": str(registry.store.folder),
            "vectors": {"helpful": "helpful@1"},
            "engine": {"mode": "steered"} | ENGINE,
            "replicas": {"min": 2, "max": 2, "cpus": 0.5},
        }
    )
    truths = {}
    for version, same in (("helpful@1", "helpful"), ("helpful@2", "harmless")):
        release = resolve_release(config.model_copy(update={"vectors": {"helpful": version}}))
        for eta, new in itertools.product(ETAS, (NEW, LONG)):
            text = tokenizer.decode(merged_alone(PROMPT, {same: eta}, new), skip_special_tokens=True)
            truths[release.fingerprint((("helpful", eta),)), eta, new] = text
    assert len(set(truths.values())) >= 2 * len(ETAS), "versions and settings must make a difference"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    deployed = Deployed(config, port, truths)
    deployed.deploy()
    yield deployed
    stop()


STEPS = {
    "other vectors": {"vectors": {"helpful": "helpful@2"}},
    "another engine": {"engine": {"mode": "merged"} | ENGINE, "vectors": {"helpful": "helpful@1"}},
}


@pytest.mark.parametrize("changes", STEPS.values(), ids=list(STEPS))
def test_a_new_deployment_cuts_no_answer_and_mixes_no_vectors(deployed, changes):
    """Old and new replicas, and callers of both, at once."""
    with ThreadPoolExecutor(2) as pool, deployed.traffic(6, partial(deployed.ask, retries=2)) as told:
        wait_for(lambda: len(told) > 12)
        streams = [pool.submit(deployed.stream, eta, 12) for eta in ETAS[:2]]
        deployed.deploy(**changes)
        assert all(stream.result() for stream in streams)
        after = len(told)
        wait_for(lambda: len(told) > after + 12)
    assert all(told)


def front_log() -> str:
    """What the newest front has logged."""
    logs = Path(ray._private.worker._global_node.get_logs_dir_path(), "serve").glob("replica_prefvec_front_*.log")
    return max(logs, key=lambda log: log.stat().st_ctime).read_text()


def test_the_log_has_no_line_for_every_request(deployed):
    assert deployed.ask(ETAS[0])
    assert "POST /v1/completions" not in front_log()


def test_from_zero_to_two_replicas_to_one_to_none_and_back(deployed):
    """Without a client's retry. Each replica has answered before it takes requests, and ends what it has begun."""
    scaling = {"min": 0, "max": 2, "target_requests": 6, "window_seconds": 1.5, "grow_seconds": 0.5}
    replicas = {**scaling, "shrink_seconds": 0.5, "idle_seconds": 1, "cpus": 0.5}
    deployed.deploy(replicas=replicas, logs={"access": True})
    wait_for(lambda: deployed.health()["status"] == "idle")
    assert deployed.ask(ETAS[0])
    wait_for(lambda: "POST /v1/completions" in front_log())  # its line is written once the answer is out
    with deployed.traffic(12, deployed.ask) as told:
        wait_for(lambda: len(deployed.replicas()) == 2)
        assert all(replica["finished"] for replica in deployed.replicas())
    assert all(told)
    with deployed.traffic(4, partial(deployed.stream, n=8)) as streams:
        wait_for(lambda: len(deployed.replicas()) == 1)
    assert all(streams)
    wait_for(lambda: deployed.health()["status"] == "idle")
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(deployed.ask, ETAS))
