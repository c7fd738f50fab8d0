"""The Prometheus metrics of serving, exported through Ray (`ray_prefvec_serve_*`; cluster/grafana has a dashboard).

Labels are few whatever callers do: presets are those of the registry, all free coefficients are one.
"""

import time

from ray.util import metrics

from prefvec_ray.serving.engines.base import EngineStatus

SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]
BY_PRESET = ("model", "preset")
BY_REPLICA = ("model", "replica")
COUNTERS = {
    "prefvec_serve_requests": ("requests that were admitted, by how they ended", (*BY_PRESET, "status")),
    "prefvec_serve_refused": ("requests that were refused", ("model", "status")),
    "prefvec_serve_answer_tokens": ("tokens of answers", BY_PRESET),
    "prefvec_serve_generated_tokens": ("tokens that an engine computed", BY_REPLICA),
    "prefvec_serve_merges": ("times that a replica's weights were rewritten to other coefficients", BY_REPLICA),
}
GAUGES = {
    "prefvec_serve_running": ("requests that an engine works on", BY_REPLICA),
    "prefvec_serve_waiting": ("requests that wait within an engine", BY_REPLICA),
    "prefvec_serve_generation": ("generation of the release that new requests get", ("model",)),
}
HISTOGRAMS = {
    "prefvec_serve_request_s": ("from a request's admission to the end of its answer", BY_PRESET),
    "prefvec_serve_first_piece_s": ("from a stream's admission to the first piece of its answer", BY_PRESET),
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
        self.seconds, self.first = _histogram("prefvec_serve_request_s"), _histogram("prefvec_serve_first_piece_s")

    def refused(self, status: int) -> None:
        """Admission refused a request with this."""
        self._refused.inc(tags={"model": self._model, "status": str(status)})

    def admitted(self, model: str, *, free: bool) -> "RequestMetrics":
        """A request begins; `model` is what it asks for, `free` says that it names coefficients of its own."""
        return RequestMetrics(self, {"model": self._model, "preset": self._preset(model, free)})

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

    def __init__(self, front: FrontMetrics, tags: dict[str, str]):
        self._front, self._tags, self._began = front, tags, time.monotonic()
        self._spoken = False

    def piece(self) -> None:
        """A piece of a stream came; only the first counts."""
        if not self._spoken:
            self._spoken = True
            self._front.first.observe(time.monotonic() - self._began, self._tags)

    def ended(self, status: int, tokens: int) -> None:
        """`status`: that of the answer, what an error within a stream would have had, or HUNG_UP."""
        self._front.requests.inc(tags=self._tags | {"status": str(status)})
        self._front.seconds.observe(time.monotonic() - self._began, self._tags)
        if tokens:
            self._front.tokens.inc(tokens, self._tags)


class ReplicaMetrics:
    """Of one replica's engine."""

    def __init__(self, model: str, replica: str):
        self._tags = {"model": model, "replica": replica}
        self._running, self._waiting = _gauge("prefvec_serve_running"), _gauge("prefvec_serve_waiting")
        self._tokens, self._merges = _counter("prefvec_serve_generated_tokens"), _counter("prefvec_serve_merges")
        self._told = {"tokens": 0, "merges": 0}

    def report(self, status: EngineStatus) -> None:
        """Call this every few seconds: counters go on from what they were at the last call."""
        self._running.set(status.running, self._tags)
        self._waiting.set(status.waiting, self._tags)
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
