"""A judge behind a real HTTP server in this process, which fails, rambles and favours places as it is told to."""

import asyncio
import contextlib
import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from prefvec_ray.common.errors import InputError
from prefvec_ray.scorers import ScorerError, TextPrompt, run_scorer
from prefvec_ray.scorers.cache import ScoreCache
from prefvec_ray.scorers.judge import JudgeScorer
from prefvec_ray.scorers.judge_config import PAIRWISE, POINTWISE, JudgeConfig, read_verdict

Reply = str | int


class Endpoint(ThreadingHTTPServer):
    """Answers each request with what `reply(question, number of the call)` says: a text, or an HTTP status."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply: Callable[[list[dict[str, str]], int], Reply] = lambda messages, call: "Score: 5"
        self.calls = 0
        self.at_once: Counter[str] = Counter()
        self.requests: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Endpoint
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.calls += 1
            call = self.server.calls
            self.server.at_once["now"] += 1
            self.server.at_once["most"] = max(self.server.at_once["most"], self.server.at_once["now"])
            self.server.requests.append({**body, "key": self.headers["Authorization"]})
        reply = self.server.reply(body["messages"], call)
        with self.server.lock:
            self.server.at_once["now"] -= 1
        if isinstance(reply, int):
            content: dict[str, Any] = {"error": {"message": f"status {reply}"}}
        else:
            content = {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply}}],
                "usage": {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12},
            }
        data = json.dumps(content).encode()
        self.send_response(reply if isinstance(reply, int) else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("retry-after-ms", "1")
        with contextlib.suppress(ConnectionError):  # a client that has given up
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def judge(endpoint, tmp_path):
    def make(
        *, baseline: dict[str, str] | None = None, cache: ScoreCache | None = None, **settings: Any
    ) -> JudgeScorer:
        if baseline is not None:
            path = tmp_path / "baseline.jsonl"
            rows = [{"prompt": prompt, "answer": answer} for prompt, answer in baseline.items()]
            path.write_text("\n".join(map(json.dumps, rows)))
            settings |= {"mode": "pairwise", "baseline": path}
        given = {"base_url": endpoint.url, "model": "m", "metric": "quality", "criterion": "clarity", **settings}
        return JudgeScorer(JudgeConfig(**given), cache=cache)

    return make


def mark_by_length(messages, call):
    answer = messages[0]["content"].split("[Answer]\n")[1].split("\n[End of answer]")[0]
    return f"It has {len(answer)} letters.\nScore: {min(10, len(answer))}"


def test_marks_come_through_and_are_asked_for_once(judge, endpoint, tmp_path):
    endpoint.reply = mark_by_length
    asked = judge(cache=ScoreCache(tmp_path / "verdicts.db"), extra={"seed": 1}, concurrency=2)
    prompts = ["p", TextPrompt("q {answer}", "safe"), "p"]
    assert run_scorer(asked, prompts, ["abc", "abcd", "abc"]) == {"quality": [3.0, 4.0, 3.0]}
    assert endpoint.calls == 2, "the same question twice is asked once"
    assert endpoint.requests[0]["key"] == "Bearer none"
    assert {request["seed"] for request in endpoint.requests} == {1}
    assert any("q {answer}\n" in request["messages"][0]["content"] for request in endpoint.requests)
    assert (asked.metrics["quality"].low, asked.metrics["quality"].high) == (1, 10)

    again = judge(cache=ScoreCache(tmp_path / "verdicts.db"), extra={"seed": 1}, concurrency=8)
    assert again.digest == asked.digest
    assert run_scorer(again, prompts, ["abc", "abcd", "abcde"]) == {"quality": [3.0, 4.0, 5.0]}
    assert endpoint.calls == 3
    assert (again.counts["asked"], again.counts["known"]) == (1, 2)
    assert "3 verdicts asked for, 2 known" in again.notes()[0], "of both"
    assert judge(extra={"seed": 2}).digest != asked.digest


def test_an_endpoint_that_fails_half_its_calls_changes_no_number(judge, endpoint):
    fate = random.Random(0)
    endpoint.reply = lambda messages, call: fate.choice([500, 429, *[mark_by_length(messages, call)] * 2])
    answers = ["x" * n for n in range(1, 11)] * 4
    asked = judge(concurrency=4, retries=25)
    prompts = [f"p{i}" for i in range(40)]
    assert run_scorer(asked, prompts, answers) == {"quality": [float(len(text)) for text in answers]}
    assert asked.counts["failed"] == asked.counts["missing"] == 0
    assert endpoint.calls > 60
    assert endpoint.at_once["most"] <= 4


def test_what_fails_for_good_is_missing_and_not_a_number_and_never_kept(judge, endpoint, tmp_path):
    endpoint.reply = lambda messages, call: 400 if "xxxxx\n" in messages[0]["content"] else "Score: 7"
    answers = ["a", "b", "c", "xxxxx"]
    cache = ScoreCache(tmp_path / "verdicts.db")
    lenient = judge(max_missing=0.3, retries=0, cache=cache)
    assert run_scorer(lenient, ["p"] * 4, answers) == {"quality": [7.0, 7.0, 7.0, None]}
    assert "1 calls failed for good, 1 verdicts are missing" in lenient.notes()[0]
    assert len(cache) == 3
    with pytest.raises(ScorerError, match=r"more than 10% of 4 verdicts are missing; the last: BadRequestError"):
        judge(retries=0, cache=cache)(["p"] * 4, answers)
    endpoint.reply = lambda messages, call: 401
    with pytest.raises(ScorerError, match="status 401"):
        judge(retries=5)(["p"], ["new"])


def test_a_dead_endpoint_ends_with_its_name(judge, endpoint):
    endpoint.reply = lambda messages, call: 503
    with pytest.raises(ScorerError, match=rf"judge m at {endpoint.url}: more than 10% of 60 verdicts are missing"):
        judge(retries=1, concurrency=4)([f"p{i}" for i in range(60)], ["a"] * 60)
    assert endpoint.calls < 60, "it stops at the share, not after every answer"
    silent = threading.Event()
    endpoint.reply = lambda messages, call: "Score: 5" if silent.wait(20) else 500
    with pytest.raises(ScorerError, match="APITimeoutError"):
        judge(retries=0, timeout=0.2)(["p"], ["a"])
    silent.set()


def test_replies_that_cannot_be_read_are_asked_again_and_never_guessed(judge, endpoint):
    def reply(messages, call):
        if "hopeless" in messages[0]["content"]:
            return "I would rather not say. Score: 9 or so"
        return "Well, 8 of 10." if len(messages) == 1 else "Score: 8"

    endpoint.reply = reply
    asked = judge(max_missing=0.5, concurrency=1)
    assert run_scorer(asked, ["p", "p"], ["fine", "hopeless"]) == {"quality": [8.0, None]}
    assert (asked.counts["unread"], asked.counts["missing"]) == (3, 1)
    second = [request["messages"] for request in endpoint.requests if len(request["messages"]) == 3]
    assert second[0][1] == {"role": "assistant", "content": "Well, 8 of 10."}
    assert "a number from 1 to 10" in second[0][2]["content"]


@pytest.mark.parametrize(
    ("reply", "mode", "expected"),
    [
        ("Clear.\nScore: 7", "pointwise", 7.0),
        ("**Score: 7.5**", "pointwise", 7.5),
        ("Score: 11", "pointwise", None),
        ("Score: -3", "pointwise", None),
        ("Score: 7/10", "pointwise", None),
        ("Score: 7\nand more", "pointwise", None),
        ("Score: 3\nScore: 7", "pointwise", None),
        ("7", "pointwise", None),
        ("", "pointwise", None),
        ("A is longer.\nverdict: **B**\n", "pairwise", 0.0),
        ("Verdict: tie", "pairwise", 0.5),
        ("Verdict: A or B", "pairwise", None),
        ("Verdict: A\nVerdict: B", "pairwise", None),
        ("The answer says:\nVerdict: A\nI disagree.", "pairwise", None),
    ],
)
def test_only_a_last_line_that_states_the_verdict_counts(reply, mode, expected, tmp_path):
    baseline = tmp_path / "b.jsonl" if mode == "pairwise" else None
    config = JudgeConfig(base_url="http://x", model="m", metric="q", criterion="c", mode=mode, baseline=baseline)
    assert read_verdict(reply, config) == expected


def test_a_pair_is_won_only_in_both_orders(judge, endpoint):
    def longer(messages, call):
        text = messages[0]["content"]
        a, b = (text.split(f"[Answer {x}]\n")[1].split(f"\n[End of answer {x}]")[0] for x in "AB")
        return "Verdict: tie" if len(a) == len(b) else f"Verdict: {'A' if len(a) > len(b) else 'B'}"

    endpoint.reply = longer
    fair = judge(baseline={"p": "four", "q": "four"})
    answers = ["longer", "sho", "same", "four"]
    assert run_scorer(fair, ["p", "q", "p", "q"], answers) == {"quality": [1.0, 0.0, 0.5, 0.5]}
    assert endpoint.calls == 6, "the baseline's own text is a tie unasked"
    assert "0 of 4 pairs were judged otherwise" in fair.notes()[0]

    endpoint.reply = lambda messages, call: "Verdict: A"
    biased = judge(baseline={"p": "four"})
    assert run_scorer(biased, ["p"], ["longer"]) == {"quality": [0.5]}, "a judge of places says nothing of answers"
    assert "1 of 1 pairs were judged otherwise" in biased.notes()[0]
    with pytest.raises(InputError, match=r"baseline.jsonl has no answer to 'unknown'"):
        biased(["unknown"], ["a"])


def test_a_judge_can_be_asked_from_within_an_event_loop(judge):
    asked = judge()

    async def notebook():
        return asked(["p"], ["a"])

    assert asyncio.run(notebook()) == {"quality": [5.0]}


def test_a_template_of_ones_own(judge, endpoint, tmp_path):
    mine = tmp_path / "judge.txt"
    mine.write_text("{criterion}? {prompt} -> {answer} ({low}-{high})")
    assert run_scorer(judge(template=mine, low=0, high=5), ["why {high}"], ["so"]) == {"quality": [5.0]}
    assert endpoint.requests[0]["messages"][0]["content"] == "clarity? why {high} -> so (0-5)"
    assert (endpoint.requests[0]["temperature"], endpoint.requests[0]["max_tokens"]) == (0, 512)
    judge(template=mine, max_tokens=None, temperature=None, extra={"max_completion_tokens": 9})(["p"], ["a"])
    assert endpoint.requests[1].keys() & {"temperature", "max_tokens", "max_completion_tokens"} == {
        "max_completion_tokens"
    }
    assert all("{criterion}" in template for template in (POINTWISE, PAIRWISE))


@pytest.mark.parametrize(
    ("text", "message"),
    [("{prompt}", r"lacks \{answer\}"), ("{prompt} {answer} {grade}", r"unknown fields \['grade'\]")],
)
def test_a_template_without_its_fields_is_refused(judge, tmp_path, text, message):
    (tmp_path / "judge.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        judge(template=tmp_path / "judge.txt")


def test_a_key_stays_in_the_environment(judge, endpoint, monkeypatch):
    with pytest.raises(InputError, match="environment variable JUDGE_KEY is not set"):
        judge(api_key_env="JUDGE_KEY")
    monkeypatch.setenv("JUDGE_KEY", "sesame")
    keyed = judge(api_key_env="JUDGE_KEY")
    keyed(["p"], ["a"])
    assert endpoint.requests[0]["key"] == "Bearer sesame"
    assert "sesame" not in repr(vars(keyed))


def test_contradictions_are_refused(tmp_path):
    stated: dict[str, Any] = {"base_url": "http://x", "model": "m", "metric": "q", "criterion": "c"}
    for wrong in ({"mode": "pairwise"}, {"baseline": tmp_path / "b"}, {"low": 5, "high": 5}, {"max_missing": 1}):
        with pytest.raises(ValueError, match=r"baseline|low < high|less than 1"):
            JudgeConfig(**stated, **wrong)
    (tmp_path / "twice.jsonl").write_text('{"prompt": "p", "answer": "a"}\n{"prompt": "p", "answer": "b"}\n')
    with pytest.raises(InputError, match=r"twice.jsonl, row 2: expected one answer, a text, for each prompt"):
        JudgeScorer(JudgeConfig(**stated, mode="pairwise", baseline=tmp_path / "twice.jsonl"))
