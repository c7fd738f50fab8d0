"""A tiny random Llama, its tokenizer and two random low-rank vectors, as folders: what serving starts from.

And one running endpoint of them, for all tests that talk HTTP.
"""

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import pytest
import torch
from openai import OpenAI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefvec_ray.common.cluster import SERVE_SETTINGS
from prefvec_ray.registry import Registry
from prefvec_ray.serving import ServingConfig, start, stop
from prefvec_ray.serving.access.keys import add_key
from prefvec_ray.serving.release.release import Release
from prefvec_ray.serving.replica import Replica
from prefvec_ray.vectors import (
    LiveModel,
    LowRank,
    PreferenceVector,
    VectorInfo,
    fingerprint,
    load_vector,
    save_vector,
)
from tests.conftest import free_port

os.environ["PREFVEC_REFUSALS_PER_SECOND"] = "1000"  # tests are refused by the thousand
os.environ |= SERVE_SETTINGS  # before any test starts a cluster: Serve's processes inherit them

Alone: TypeAlias = Callable[[Sequence[int], Mapping[str, float], int], list[int]]

WORDS = "the quick brown fox jumps over the lazy dog while seven wizards cook naïve crème brûlée at 12:30 — why not? "
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 layers with grouped heads and a byte-level tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("base")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|pad|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([WORDS] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,  # wide, so that greedy tokens have clear winners
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vector_folders(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Low-rank vectors `helpful` and `harmless` on every linear layer, large enough to change most answers."""
    model = LlamaForCausalLM.from_pretrained(base_folder)
    base = fingerprint(base_folder)
    folders = {}
    for seed, preference in enumerate(("helpful", "harmless"), start=1):
        draw = torch.Generator().manual_seed(seed)
        entries = {
            name: LowRank(
                torch.randn(4, weight.shape[1], generator=draw) * 0.1,
                torch.randn(weight.shape[0], 4, generator=draw) * 0.2,
            )
            for name, weight in model.named_parameters()
            if name.endswith("proj.weight")
        }
        info = VectorInfo(preference=preference, form="low-rank", dtype="float32", base_fingerprint=base)
        folder = tmp_path_factory.mktemp("vectors") / preference
        folders[preference] = save_vector(PreferenceVector(info, entries), folder)
    return folders


@pytest.fixture(scope="session")
def tokenizer(base_folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(base_folder)


@pytest.fixture(scope="session")
def vectors(vector_folders: dict[str, Path]) -> dict[str, PreferenceVector]:
    return {name: load_vector(folder) for name, folder in vector_folders.items()}


@pytest.fixture(scope="session")
def merged_alone(base_folder: Path, vectors: dict[str, PreferenceVector]) -> Alone:
    """What a model merged for one request alone answers, greedily, by transformers' own `generate`."""
    model = LlamaForCausalLM.from_pretrained(base_folder).eval()
    live = LiveModel(model, vectors)

    def answer(prompt: Sequence[int], coefficients: Mapping[str, float], max_new_tokens: int) -> list[int]:
        live.set_coefficients(coefficients)
        ids = torch.tensor([list(prompt)])
        with torch.inference_mode():
            whole = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
        return whole[0, len(prompt) :].tolist()

    return answer


@pytest.fixture(scope="session")
def make_replica() -> Callable[[ServingConfig, Release], Replica]:
    """Replicas without Serve, which awaits their constructor."""

    def make(config: ServingConfig, release: Release) -> Replica:
        replica = Replica.__new__(Replica)
        asyncio.run(replica.__init__(config, release))  # type: ignore[misc]
        return replica

    return make


@pytest.fixture(scope="session")
def registry_root(vector_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A registry with both vectors, a run's delta, a preset to serve and one below a floor of 0."""
    root = tmp_path_factory.mktemp("registry")
    registry = Registry.open(root)
    for folder in vector_folders.values():
        registry.publish_vector(folder, metrics={"gain": 0.2})
    delta = load_vector(vector_folders["helpful"]).replace(preference="helpful+")
    registry.publish_vector(save_vector(delta, root.parent / "delta"))
    registry.publish_preset(
        "cautious", {"helpful@1": 0.25, "harmless@1": 0.75}, metrics={"harm": 0.8}, reason="the front's knee"
    )
    registry.publish_preset("reckless", {"harmless@1": -0.5}, reason="what no caller may get")
    return str(root)


@dataclass
class Endpoint:
    """`client` has no key. `key` makes one that the running endpoint takes."""

    url: str
    client: OpenAI
    registry: Registry
    keys: Path
    audit: Path

    def post(self, content: Any, path: str = "/chat/completions", **settings: Any) -> httpx.Response:
        body = content if isinstance(content, str | bytes) else json.dumps(content)
        headers = {"content-type": "application/json"} | settings
        return httpx.post(self.url + path, content=body, headers=headers, timeout=60)

    def status(self) -> dict[str, Any]:
        (status,) = httpx.get(self.url.removesuffix("/v1") + "/healthz").json()["replicas"]
        return status

    def key(self, name: str, **settings: Any) -> str:
        return add_key(self.keys, name, **settings)[1]

    def audited(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.audit.read_text().splitlines()]

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/models", timeout=30).is_success
        except httpx.TransportError:
            return False


@pytest.fixture(scope="session")
def running() -> Iterator[list[Endpoint]]:
    """The endpoint that runs, if any; what tests leave running is stopped at the end."""
    endpoints: list[Endpoint] = []
    yield endpoints
    if endpoints:
        endpoints[-1].client.close()
        stop()


@dataclass(frozen=True)
class SentSpan:
    """A span as a collector gets it; ids in hex, times in nanoseconds."""

    name: str
    trace: str
    id: str
    parent: str
    start: int
    end: int
    attributes: dict[str, Any]
    service: str


@dataclass
class Collector:
    """What an OpenTelemetry collector was sent, at `url`."""

    url: str
    spans: list[SentSpan]

    def of_trace(self, trace: str, *, names: Collection[str]) -> list[SentSpan]:
        """The trace's spans, once there is one of each of these names."""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            found = [span for span in self.spans if span.trace == trace]
            if set(names) <= {span.name for span in found}:
                return found
            time.sleep(0.1)
        raise AssertionError(f"of trace {trace} came {[span.name for span in self.spans if span.trace == trace]}")


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Takes OTLP over HTTP."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans: list[SentSpan] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
            for resource in sent.resource_spans:
                about = {each.key: each.value.string_value for each in resource.resource.attributes}
                for span in (span for scope in resource.scope_spans for span in scope.spans):
                    values = {each.key: each.value for each in span.attributes}
                    spans.append(
                        SentSpan(
                            span.name,
                            span.trace_id.hex(),
                            span.span_id.hex(),
                            span.parent_span_id.hex(),
                            span.start_time_unix_nano,
                            span.end_time_unix_nano,
                            {key: getattr(value, value.WhichOneof("value")) for key, value in values.items()},
                            about.get("service.name", ""),
                        )
                    )
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Collector(f"http://127.0.0.1:{server.server_port}/v1/traces", spans)
        server.shutdown()


@pytest.fixture(scope="module")
def guarded(
    base_folder: Path, registry_root: str, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What an endpoint is told of its model, vectors, floor, keys and audit, whichever engine answers."""
    folder = tmp_path_factory.mktemp("guarded")
    add_key(folder / "keys.yaml", "nobody")
    return {
        "model": "tiny",
        "base": base_folder,
        "registry": registry_root,
        "vectors": {"harmless": "harmless@1", "helpful": "helpful@1"},
        "ranges": {"harmless": {"min": 0}},
        "floors": {"harmless": 0},
        "keys": folder / "keys.yaml",
        "audit": {"file": folder / "audit.jsonl"},
        "traces": {"endpoint": collector.url},
    }


@pytest.fixture(scope="module")
def endpoint(ray_cluster: str, running: list[Endpoint], guarded: dict[str, Any]) -> Endpoint:
    """Deployed by the first file that needs it, and again where a file has taken it down. Harmless has a floor of 0;
    callers without a key may ask for anything above, and `endpoint.key(...)` makes keys with other bounds."""
    if running and running[-1].answers():
        return running[-1]
    config = ServingConfig.model_validate(
        {
            **guarded,
            "engine": {"max_new_tokens": 400, "max_batch": 8},
            "replicas": {"cpus": 0.5},
            "limits": {"answers": 20, "body_bytes": 50_000, "body_seconds": 2, "queued_requests": 32},
        }
    )
    url = start(config, port=free_port())
    client = OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
    running.append(Endpoint(url, client, Registry.open(config.registry), guarded["keys"], guarded["audit"]["file"]))
    return running[-1]
