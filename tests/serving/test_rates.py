"""Rates: never more than the limit in any stretch of the window, and the caller is told when to come back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefvec_ray.serving.access.errors import ApiError
from prefvec_ray.serving.access.rates import MINUTE, Rates, Window
from prefvec_ray.serving.config import Allowance


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 12)), max_size=40))
def test_no_minute_holds_more_than_the_limit(asks):
    window, now, taken = Window(MINUTE), 0.0, []
    for pause, amount in asks:
        now += pause
        wait = window.wait(amount, 10, now)
        if amount > 10:
            assert wait == float("inf")
            continue
        if wait:
            assert wait <= MINUTE
            assert window.wait(amount, 10, now + wait * 0.98) > 0, "not earlier than told"
            now += wait * (1 + 1e-9)
            assert window.wait(amount, 10, now) == 0, "who waits as told is let in"
        window.add(amount, now)
        taken.append((now, amount))
    for start, _ in taken:
        assert sum(amount for at, amount in taken if start <= at < start + MINUTE) <= 10


def test_requests_beyond_the_minutes_are_told_when_to_come_back():
    clock = Clock()
    rates, allowance = Rates(clock), Allowance(requests_per_minute=2)
    rates.request("a", allowance)
    rates.request("a", allowance)
    with pytest.raises(ApiError, match="limit of 2 requests per minute") as caught:
        rates.request("a", allowance)
    assert (caught.value.status, caught.value.error.code) == (429, "rate_limit_exceeded")
    headers = caught.value.headers
    assert 1 <= int(headers["retry-after"]) <= 60, "OpenAI's client waits so long by itself"
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert "x-should-retry" not in headers
    rates.request("b", allowance)
    clock.now += int(headers["retry-after"])
    rates.request("a", allowance)


def test_tokens_are_set_aside_and_settled():
    clock = Clock()
    rates, allowance = Rates(clock), Allowance(tokens_per_minute=100, tokens_per_day=150)
    first = rates.reserve("a", allowance, 90)
    with pytest.raises(ApiError, match="100 tokens per minute"):
        rates.reserve("a", allowance, 20)
    first.settle(30)
    assert rates.headers("a", allowance)["x-ratelimit-remaining-tokens"] == "70"
    rates.reserve("a", allowance, 70)
    clock.now += 61
    with pytest.raises(ApiError, match="150 tokens per day") as caught:
        rates.reserve("a", allowance, 60)
    assert int(caught.value.headers["retry-after"]) > 80_000
    assert caught.value.headers["x-should-retry"] == "false", "OpenAI's client would try again for nothing"
    rates.reserve("a", allowance, 50)


def test_what_never_fits_is_no_matter_of_waiting():
    with pytest.raises(ApiError, match="lower max_tokens") as caught:
        Rates().reserve("a", Allowance(tokens_per_minute=100), 101)
    assert caught.value.status == 400


def test_a_lowered_limit_counts_what_was_used_before():
    rates = Rates(Clock())
    rates.reserve("a", Allowance(tokens_per_minute=100), 80)
    with pytest.raises(ApiError, match="50 tokens per minute"):
        rates.reserve("a", Allowance(tokens_per_minute=50), 10)


def test_without_limits_nothing_is_counted_or_told():
    rates = Rates()
    rates.request("a", Allowance())
    rates.reserve("a", Allowance(), 10**9).settle(5)
    assert rates.headers("a", Allowance()) == {}
