"""Traces of requests for an OpenTelemetry collector (OTLP over HTTP): from the caller's request to the engine's work.

A request is one span of the front, a child of the caller's `traceparent` where it sends one. Its replica's span is a
child of that, and in the slot engine each answer has three: `queue` until it has a row, `prompt` until its first token,
`tokens` until its last. They say who called, what was asked for and how much was computed; never what was said.
"""

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from prefvec_ray.common.extras import require
from prefvec_ray.serving.config import TracesConfig
from prefvec_ray.serving.engines.base import Timeline

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

Carrier = Mapping[str, str]
"""W3C trace context, as it travels from front to replica; empty where the request has no trace"""

PARENT = "traceparent"
MOST_ANSWERS = 16
"""answers of one request whose work is shown"""
SEND_MILLISECONDS = 1000


class RequestTrace:
    """A request's span in one process. Without a collector it is none, and nothing is done."""

    def __init__(self, tracer: "Tracer | None" = None, span: "Span | None" = None) -> None:
        self._tracer, self._span = tracer, span

    @property
    def carrier(self) -> Carrier:
        """For spans of other processes that belong under this one."""
        carrier: dict[str, str] = {}
        if self._span is not None:
            from opentelemetry.trace import set_span_in_context
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            TraceContextTextMapPropagator().inject(carrier, set_span_in_context(self._span))
        return carrier

    def note(self, attributes: Mapping[str, str | int | float]) -> None:
        """Attributes of the span, by OpenTelemetry's names where it has one."""
        if self._span is not None:
            self._span.set_attributes(dict(attributes))

    def worked(self, timelines: Sequence[Timeline]) -> None:
        """What the engine did for each answer."""
        if self._tracer is None or self._span is None:
            return
        from opentelemetry.trace import set_span_in_context

        under = set_span_in_context(self._span)
        for number, times in enumerate(timelines[:MOST_ANSWERS]):
            about = {"prefvec.answer": number, "gen_ai.usage.output_tokens": times.tokens}
            parts = {
                "queue": (times.submitted, times.admitted),
                "prompt": (times.admitted, times.first),
                "tokens": (times.first, times.last),
            }
            for name, (start, end) in parts.items():
                if end:
                    self._tracer.start_span(name, under, attributes=about, start_time=start).end(end)

    def end(self, status: int | None = None) -> None:
        """`status`: of HTTP, where it is the front's span."""
        if self._span is None:
            return
        if status is not None:
            from opentelemetry.trace import StatusCode

            self._span.set_attribute("http.response.status_code", status)
            if status >= 500:
                self._span.set_status(StatusCode.ERROR)
        self._span.end()


class Traces:
    """Makes a process's spans. With None, requests have no traces."""

    def __init__(self, config: TracesConfig | None, model: str, part: str) -> None:
        self._config, self._model, self._part = config, model, part

    def begin(self, name: str, parent: Carrier, *, server: bool = False) -> RequestTrace:
        """A span under `parent`: the context that another process or the caller sent. What cannot be read is none."""
        if self._config is None:
            return RequestTrace()
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract({key: parent[key] for key in (PARENT,) if key in parent})
        kind = SpanKind.SERVER if server else SpanKind.INTERNAL
        return RequestTrace(self._tracer, self._tracer.start_span(name, context, kind=kind))

    @cached_property
    def _tracer(self) -> "Tracer":
        assert self._config is not None
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import TraceIdRatioBased

        about: dict[str, Any] = {"service.name": f"prefvec-{self._part}", "prefvec.model": self._model}
        about["process.pid"] = os.getpid()
        provider = TracerProvider(resource=Resource.create(about), sampler=TraceIdRatioBased(self._config.sample))
        exporter = OTLPSpanExporter(endpoint=self._config.endpoint)
        provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=SEND_MILLISECONDS))
        return provider.get_tracer("prefvec_ray")


def check_traces(config: TracesConfig | None) -> None:
    """InputError where traces are asked for and what sends them is not installed."""
    if config is not None:
        require("traces", "opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
