"""The Prometheus metrics of serving, exported through Ray (`ray_prefvec_serve_*`; cluster/grafana has a dashboard).

Labels are few whatever callers do: presets are those of the registry, all free coefficients are one.
"""

import time
from collections.abc import Sequence

from ray.util import metrics

from prefvec_ray.serving.engines.base import EngineStatus, Timeline
from prefvec_ray.serving.traces import RequestTrace

SECONDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]
BY_PRESET = ("model", "preset")
BY_REPLICA = ("model", "replica")
COUNTERS = {
    "prefvec_serve_requests": ("requests that were admitted, by how they ended", (*BY_PRESET, "status")),
    "prefvec_serve_refused": ("requests that were refused", ("model", "status")),
    "prefvec_serve_answer_tokens": ("tokens of answers", BY_PRESET),
    "prefvec_serve_prompt_tokens": ("tokens of prompts that were answered", BY_PRESET),
    "prefvec_serve_generated_tokens": ("tokens that an engine computed", BY_REPLICA),
    "prefvec_serve_merges": ("times that a replica's weights were rewritten to other coefficients", BY_REPLICA),
}
GAUGES = {
    "prefvec_serve_running": ("requests that an engine works on", BY_REPLICA),
    "prefvec_serve_waiting": ("requests that wait within an engine", BY_REPLICA),
    "prefvec_serve_cached_tokens": ("tokens whose keys and values the slot engine holds", BY_REPLICA),
    "prefvec_serve_generation": ("generation of the release that new requests get", ("model",)),
}
HISTOGRAMS = {
    "prefvec_serve_request_s": ("from a request's admission to the end of its answer", BY_PRESET),
    "prefvec_serve_first_piece_s": ("from a stream's admission to the first piece of its answer", BY_PRESET),
    "prefvec_serve_token_s": ("from one token of a stream's answer to the next, its mean over the answer", BY_PRESET),
    "prefvec_serve_queue_s": ("that a request waited in the slot engine until it had a row", BY_REPLICA),
}
DEFAULT, FREE, OTHER = "(default)", "(free)", "(other)"
"""in place of a preset's name: the operator's coefficients, the caller's own, a preset beyond MOST_PRESETS"""
MOST_PRESETS = 50
HUNG_UP = 499


class FrontMetrics:
    """Of the requests of one model, as their callers see them."""

    def __init__(self, model: str):
        self._model = model
        self._presets: set[str] = set()
        self._refused, self._generation = _counter("prefvec_serve_refused"), _gauge("prefvec_serve_generation")
        self.requests, self.tokens = _counter("prefvec_serve_requests"), _counter("prefvec_serve_answer_tokens")
        self.prompt_tokens = _counter("prefvec_serve_prompt_tokens")
        self.seconds, self.first = _histogram("prefvec_serve_request_s"), _histogram("prefvec_serve_first_piece_s")
        self.between = _histogram("prefvec_serve_token_s")

    def refused(self, status: int) -> None:
        """Admission refused a request with this."""
        self._refused.inc(tags={"model": self._model, "status": str(status)})

    def admitted(self, model: str, *, free: bool, answers: int, trace: RequestTrace) -> "RequestMetrics":
        """A request begins; `model` is what it asks for, `free` says that it names coefficients of its own."""
        return RequestMetrics(self, {"model": self._model, "preset": self._preset(model, free)}, answers, trace)

    def serves(self, generation: int) -> None:
        self._generation.set(generation, {"model": self._model})

    def _preset(self, model: str, free: bool) -> str:
        preset = model.partition("@")[2].partition("@")[0]
        if not preset:
            return FREE if free else DEFAULT
        if len(self._presets) < MOST_PRESETS:
            self._presets.add(preset)
        return preset if preset in self._presets else OTHER


class RequestMetrics:
    """Of one request, from its admission on."""

    def __init__(self, front: FrontMetrics, tags: dict[str, str], answers: int, trace: RequestTrace):
        self._front, self._tags, self._began = front, tags, time.monotonic()
        self._answers, self._trace = answers, trace
        self._first = self._last = 0.0

    def piece(self) -> None:
        """A piece of a stream came."""
        self._last = time.monotonic()
        if not self._first:
            self._first = self._last
            self._front.first.observe(self._first - self._began, self._tags)

    def ended(self, status: int, tokens: int, prompt_tokens: int = 0) -> None:
        """`status`: that of the answer, what an error within a stream would have had, or HUNG_UP. `tokens`: of all
        answers."""
        self._front.requests.inc(tags=self._tags | {"status": str(status)})
        self._front.seconds.observe(time.monotonic() - self._began, self._tags)
        if tokens:
            self._front.tokens.inc(tokens, self._tags)
        if prompt_tokens:
            self._front.prompt_tokens.inc(prompt_tokens, self._tags)
        if self._first and tokens > self._answers:
            self._front.between.observe((self._last - self._first) / (tokens / self._answers - 1), self._tags)
        self._trace.note({"gen_ai.usage.input_tokens": prompt_tokens, "gen_ai.usage.output_tokens": tokens})
        self._trace.end(status)


class ReplicaMetrics:
    """Of one replica's engine."""

    def __init__(self, model: str, replica: str):
        self._tags = {"model": model, "replica": replica}
        self._running, self._waiting = _gauge("prefvec_serve_running"), _gauge("prefvec_serve_waiting")
        self._tokens, self._merges = _counter("prefvec_serve_generated_tokens"), _counter("prefvec_serve_merges")
        self._cached, self._queue = _gauge("prefvec_serve_cached_tokens"), _histogram("prefvec_serve_queue_s")
        self._told = {"tokens": 0, "merges": 0}

    def worked(self, timelines: Sequence[Timeline]) -> None:
        """The engine is done with the answers of a request."""
        for times in timelines:
            if times.admitted:
                self._queue.observe((times.admitted - times.submitted) / 1e9, self._tags)

    def report(self, status: EngineStatus) -> None:
        """Call this every few seconds: counters go on from what they were at the last call."""
        self._running.set(status.running, self._tags)
        self._waiting.set(status.waiting, self._tags)
        self._cached.set(status.cached_tokens, self._tags)
        for counter, name in ((self._tokens, "tokens"), (self._merges, "merges")):
            total = getattr(status, name)
            if total > self._told[name]:
                counter.inc(total - self._told[name], self._tags)
                self._told[name] = total


def _counter(name: str) -> metrics.Counter:
    description, tags = COUNTERS[name]
    return metrics.Counter(name, description, tag_keys=tags)


def _gauge(name: str) -> metrics.Gauge:
    description, tags = GAUGES[name]
    return metrics.Gauge(name, description, tag_keys=tags)


def _histogram(name: str) -> metrics.Histogram:
    description, tags = HISTOGRAMS[name]
    return metrics.Histogram(name, description, boundaries=SECONDS, tag_keys=tags)
