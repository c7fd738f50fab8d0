"""What an OpenTelemetry collector is sent of a request, and what it is not."""

import secrets
import sys

import pytest

from prefvec_ray.common.errors import InputError
from prefvec_ray.serving import traces
from prefvec_ray.serving.config import ServingConfig, TracesConfig
from prefvec_ray.serving.engines.base import Timeline

SECRET = "where the wizard keeps his brown fox"
PARTS = {"queue", "prompt", "tokens"}


def traceparent() -> tuple[str, str, str]:
    """A header, its trace and its span."""
    trace, span = secrets.token_hex(16), secrets.token_hex(8)
    return f"00-{trace}-{span}-01", trace, span


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_is_one_trace_from_its_caller_to_the_engine(endpoint, collector, stream):
    header, trace, caller = traceparent()
    asked = {"model": "tiny", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 5, "n": 2}
    answer = endpoint.post(asked | {"stream": stream, "preferences": {"helpful": 0.5}}, traceparent=header)
    assert answer.status_code == 200
    spans = collector.of_trace(trace, names={"POST /v1/chat/completions", "answer", *PARTS})
    (front,) = [span for span in spans if span.name.startswith("POST")]
    (replica,) = [span for span in spans if span.name == "answer"]
    assert (front.parent, replica.parent) == (caller, front.id)
    assert (front.service, replica.service) == ("prefvec-front", "prefvec-replica")
    assert front.attributes["http.response.status_code"] == 200
    assert front.attributes["prefvec.fingerprint"] == answer.headers["x-prefvec-fingerprint"]
    assert front.attributes["prefvec.coefficients"] == answer.headers["x-prefvec-preferences"]
    assert front.attributes["enduser.id"] == "anonymous"
    for number in range(2):
        parts = {span.name: span for span in spans if span.attributes.get("prefvec.answer") == number}
        assert set(parts) == PARTS
        assert {span.parent for span in parts.values()} == {replica.id}
        ends = [(parts[name].start, parts[name].end) for name in ("queue", "prompt", "tokens")]
        times = [replica.start, *(time for pair in ends for time in pair), replica.end]
        assert times == sorted(times), "one after the other, within the replica's span"
        assert parts["queue"].end == parts["prompt"].start
        assert parts["prompt"].end == parts["tokens"].start
    computed = sum(span.attributes["gen_ai.usage.output_tokens"] for span in spans if span.name == "tokens")
    assert front.attributes["gen_ai.usage.output_tokens"] == computed > 0
    assert not any(SECRET in str(value) for span in spans for value in span.attributes.values())


def test_a_refused_request_has_a_trace_too(endpoint, collector):
    header, trace, _ = traceparent()
    asked = {"model": "tiny", "prompt": "Hello", "preferences": {"harmless": -1}}
    answer = endpoint.post(asked, "/completions", traceparent=header)
    (span,) = collector.of_trace(trace, names={"POST /v1/completions"})
    assert span.attributes["http.response.status_code"] == answer.status_code != 200


@pytest.mark.parametrize("header", ["nonsense", "00-" + "0" * 32 + "-1-01", "x" * 5000])
def test_what_is_no_trace_context_is_left_alone(endpoint, header):
    asked = {"model": "tiny", "prompt": "Hello", "max_tokens": 1}
    assert endpoint.post(asked, "/completions", traceparent=header).status_code == 200


def test_without_a_collector_nothing_is_begun(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry", None)  # it cannot be imported
    trace = traces.Traces(None, "tiny", "front").begin("POST", {"traceparent": traceparent()[0]}, server=True)
    assert trace.carrier == {}
    trace.note({"a": 1})
    trace.worked([Timeline(1, 2, 3, 4, 5)])
    trace.end(200)


def test_a_share_of_the_requests_is_sampled_the_same_in_every_process():
    config = TracesConfig(endpoint="http://127.0.0.1:9/v1/traces", sample=0.5)
    front, replica = (traces.Traces(config, "tiny", part) for part in ("front", "replica"))
    kept = 0
    for _ in range(200):
        begun = front.begin("POST", {"traceparent": traceparent()[0]}).carrier["traceparent"]
        answered = replica.begin("answer", {"traceparent": begun}).carrier["traceparent"]
        assert answered[-2:] == begun[-2:], "the flag of a trace that is kept"
        kept += begun.endswith("01")
    assert 60 < kept < 140


def test_what_sends_them_must_be_installed(monkeypatch):
    monkeypatch.setattr("prefvec_ray.common.extras.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install 'prefvec-ray\[traces\]'"):
        traces.check_traces(TracesConfig(endpoint="http://collector:4318/v1/traces"))
    traces.check_traces(None)


@pytest.mark.parametrize("endpoint", ["collector:4318", "", "ftp://x", "http://a b"])
def test_an_address_is_one_of_http(endpoint):
    with pytest.raises(ValueError, match="endpoint"):
        TracesConfig(endpoint=endpoint)


def test_absolute_keeps_them(tmp_path):
    config = ServingConfig(
        model="tiny", base=tmp_path, registry=str(tmp_path), traces=TracesConfig(endpoint="http://c:1/v1/traces")
    )
    assert config.absolute().traces == config.traces
