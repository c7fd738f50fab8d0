"""Admission: whatever a config says and a caller tries, what reaches the engine is within the caller's policy."""

import asyncio
import json
import math
import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from starlette.datastructures import Headers

from prefvec_ray.common.config import parse_config
from prefvec_ray.common.errors import InputError
from prefvec_ray.registry import Registry
from prefvec_ray.serving.access.audit import AuditEntry, AuditLog
from prefvec_ray.serving.access.errors import ApiError
from prefvec_ray.serving.access.keys import add_key, revoke_key
from prefvec_ray.serving.access.policy import policy_of
from prefvec_ray.serving.config import AuditConfig, ServingConfig
from prefvec_ray.serving.http.admission import AdmissionController, AdmittedRequest
from prefvec_ray.serving.http.openai_protocol import ChatBody, TextBody
from prefvec_ray.serving.release.release import Release, resolve_release
from prefvec_ray.serving.request import GenerationRequest

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "the secret plan"}]}


FLOOR: dict[str, Any] = {"floors": {"harmless": 0}, "ranges": {"harmless": {"min": 0}}}
HELPFUL_FLOOR: dict[str, Any] = {"floors": {"helpful": 0}, "ranges": {"helpful": {"min": 0}}}


@pytest.fixture(scope="module")
def given_config(base_folder: Path, registry_root: str) -> dict[str, Any]:
    vectors = {"harmless": "harmless@1", "helpful": "helpful@1"}
    return {"model": "tiny", "base": base_folder, "registry": registry_root, "vectors": vectors}


@pytest.fixture(scope="module")
def release(given_config: dict[str, Any]) -> Release:
    return resolve_release(ServingConfig.model_validate(given_config))


@pytest.fixture
def make(given_config, release, registry_root):
    """A controller with these settings, over the real vectors and presets."""

    def admission(**settings: Any) -> AdmissionController:
        config = parse_config(given_config | settings, ServingConfig, source="serve.yaml")
        policy = policy_of(config, list(release.vectors))
        return AdmissionController(config, replace(release, policy=policy), Registry.open(registry_root))

    return admission


def enter(
    admission: AdmissionController, body: Any = ASK, *, key: str | None = None, headers: Any = (), kind: Any = ChatBody
) -> AdmittedRequest:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()

    async def read() -> bytes:
        return content

    pairs = [(b"authorization", f"Bearer {key}".encode())] if key else []
    return asyncio.run(admission.admit("/v1/chat/completions", Headers(raw=pairs + list(headers)), read, kind))


def refusal(admission: AdmissionController, body: Any = ASK, **how: Any) -> tuple[int, str | None]:
    with pytest.raises(ApiError) as caught:
        enter(admission, body, **how)
    return caught.value.status, caught.value.error.code


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- within policy or refused ---------------------------------------------------------------------------------------

number = st.one_of(
    st.floats(-1, 1),
    st.floats(0, 0.5),
    st.floats(-2, 2),
    st.sampled_from([0.0, -0.0, 0.5, -1.0, 1.0, 5e-324, -5e-324, 1e308, -1e308, math.nan, math.inf, -math.inf]),
    st.integers(-3, 3),
    st.integers(10**300, 10**320),
)
name = st.one_of(
    st.sampled_from(["helpful", "harmless"]),
    st.sampled_from(["helpful", "harmless", "Harmless", "harmless ", "ｈarmless", "harm\u200bless", "x" * 9999]),
)


@st.composite
def a_range(draw: st.DrawFn) -> dict[str, float]:
    low, default, high = sorted(draw(st.tuples(*[st.floats(-1.5, 1.5)] * 3)))
    return {"min": low, "default": default, "max": high}


ranges = st.dictionaries(st.sampled_from(["helpful", "harmless"]), a_range())
config = st.fixed_dictionaries(
    {},
    optional={
        "ranges": ranges,
        "default_range": a_range(),
        "floors": st.dictionaries(st.sampled_from(["helpful", "harmless"]), st.floats(-1, 1)),
    },
)
holder = st.fixed_dictionaries(
    {},
    optional={
        "ranges": ranges,
        "may_go_below_floor": st.booleans(),
        "coefficients": st.sampled_from(["free", "presets"]),
        "presets": st.sampled_from([(), ("cautious",), ("reckless",)]),
    },
)
model = st.one_of(
    st.just("tiny"),
    st.sampled_from(["tiny@cautious", "tiny@cautious@1", "tiny@reckless", "tiny@reckless@1", "tiny@@reckless", "TINY"]),
)


@st.composite
def a_body(draw: st.DrawFn) -> bytes:
    """A request as bytes: also with names given twice, which `json.dumps` would not write."""
    pairs = draw(st.lists(st.tuples(name, number), max_size=3))
    preferences = ", ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in pairs)
    fields = [f'"model": {json.dumps(draw(model))}', '"messages": [{"role": "user", "content": "x"}]']
    fields += [f'"preferences": {{{preferences}}}'] * draw(st.sampled_from([0, 1, 1, 1, 2]))
    return f"{{{', '.join(fields)}}}".encode()


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(config, holder, st.lists(a_body(), min_size=4, max_size=8))
def test_what_reaches_the_engine_is_what_was_asked_and_within_policy(make, tmp_path, config, holder, bodies):
    keys = tmp_path / "keys.yaml"
    keys.unlink(missing_ok=True)
    _, secret = add_key(keys, "team", **holder)
    refused: list[ApiError] = []
    try:
        admission = make(**config, keys=keys, audit={"file": tmp_path / "audit.jsonl"})
    except InputError:
        return
    everybody = {
        n: config.get("ranges", {}).get(n, config.get("default_range", {"min": -1, "max": 1}))
        for n in ("helpful", "harmless")
    }
    callers: list[tuple[str | None, dict[str, Any], dict[str, Any]]] = [
        (None, everybody, {}),
        (secret, everybody | holder.get("ranges", {}), holder),
    ]
    for key, allowed, free in callers:
        floors = {} if free.get("may_go_below_floor") else config.get("floors", {})
        for body in bodies:
            try:
                entry = enter(admission, body, key=key)
            except ApiError as error:
                refused.append(error)
                continue
            event("admitted")
            asked = json.loads(body)
            chosen = dict(entry.request.coefficients)
            assert sorted(chosen) == ["harmless", "helpful"]
            for each, eta in chosen.items():
                assert math.isfinite(eta)
                assert allowed[each]["min"] <= eta <= allowed[each]["max"]
                assert eta >= floors.get(each, -math.inf)
                assert math.copysign(1, eta) == 1 or eta < 0, "-0.0 is 0"
                if each in asked.get("preferences", {}):
                    assert eta == asked["preferences"][each], "never clamped"
            if free.get("coefficients") == "presets":
                assert not asked.get("preferences")
            if "@" in asked["model"] and "presets" in free:
                assert asked["model"].split("@")[1] in free["presets"]
    assert all(400 <= error.status < 500 and len(error.error.message) < 1000 for error in refused)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"floors": {"harmless": 0}}, "'harmless' may go down to -1, below its floor of 0"),
        ({"floors": {"harmless": 0}, "ranges": {"harmless": {"min": -0.1}}}, "below its floor"),
        ({"floors": {"harmles": 0}}, "'harmles' not among the served"),
        ({"floors": {"harmless": math.nan}}, "finite"),
        (FLOOR | {"anonymous": {"presets": ["reckless"]}}, "anonymous.presets: 'reckless'"),
        ({"anonymous": {"presets": ["nobody"]}}, "anonymous.presets: 'nobody'"),
        ({"anonymous": {"allowed": False}}, "nobody may call"),
        (FLOOR | {"vectors": {"harmless": "harmless@1", "kind": "harmless@1"}}, "'kind' would be a way around"),
        (HELPFUL_FLOOR | {"vectors": {"helpful": "helpful@1", "run": "helpful+@1"}}, "'run' would be a way around"),
    ],
)
def test_a_config_that_lets_anybody_below_a_floor_does_not_load(given_config, settings, says):
    with pytest.raises(InputError, match=says) as caught:
        resolve_release(parse_config(given_config | settings, ServingConfig, source="serve.yaml"))
    assert "\n" not in str(caught.value)


def test_with_a_floor_the_served_vectors_are_named(given_config):
    with pytest.raises(InputError, match=r"'floors' without 'vectors'.*name the served vectors"):
        parse_config(given_config | FLOOR | {"vectors": None}, ServingConfig, source="serve.yaml")


@pytest.mark.parametrize("name", ["harmless ", "harm\u200bless", "ｈarmless", "harmless\n", "hаrmless", "", "x" * 65])
@pytest.mark.parametrize("setting", ["vectors", "ranges", "floors"])
def test_a_preference_has_one_spelling_in_every_setting(given_config, setting, name):
    value = {"vectors": "harmless@1", "ranges": {"min": 0}, "floors": 0}[setting]
    with pytest.raises(InputError, match=setting):
        parse_config(given_config | {setting: {name: value}}, ServingConfig, source="serve.yaml")


LOW = {"harmless": {"min": -1, "max": 1}}


def test_only_a_key_that_may_goes_below_the_floor(make, tmp_path):
    keys, audit = tmp_path / "keys.yaml", tmp_path / "audit.jsonl"
    _, secret = add_key(keys, "red team", ranges=LOW, may_go_below_floor=True)
    below = ASK | {"preferences": {"harmless": -0.5}}
    with pytest.raises(InputError, match="must leave a trace"):
        make(**FLOOR, keys=keys)
    admission = make(**FLOOR, keys=keys, audit={"file": audit})
    assert refusal(admission, below) == (400, "preference_out_of_range")
    assert dict(enter(admission, below, key=secret).request.coefficients)["harmless"] == -0.5
    assert dict(enter(admission, ASK | {"model": "tiny@reckless"}, key=secret).request.coefficients)["harmless"] == -0.5
    assert [line["below_floor"] for line in lines(audit) if line["decision"] == "admitted"] == [True, True]
    _, plain = add_key(keys, "plain", ranges=LOW)
    assert refusal(admission, below, key=plain) == (503, "unavailable"), (
        "a key file that breaks the floor accepts nobody"
    )
    assert enter(admission, ASK).caller.id == "anonymous"


def test_below_the_floor_without_a_trace_is_refused(make, tmp_path):
    keys, folder = tmp_path / "keys.yaml", tmp_path / "audit"
    folder.mkdir()
    _, secret = add_key(keys, "red team", ranges=LOW, may_go_below_floor=True)
    admission = make(**FLOOR, keys=keys, audit={"file": folder / "audit.jsonl", "megabytes": 1e-5, "files": 2})
    enter(admission, key=secret)
    shutil.rmtree(folder)  # the next line begins a new file, which it cannot
    assert refusal(admission, ASK | {"preferences": {"harmless": -0.5}}, key=secret) == (503, "unavailable")
    assert enter(admission, key=secret), "what needs no trace goes on"
    assert refusal(admission, ASK | {"preferences": {"harmless": -2}}) == (400, "preference_out_of_range")


@pytest.mark.parametrize("how", ["moved", "deleted", "emptied"])
def test_the_trace_below_the_floor_is_there_whatever_happened_to_its_file(make, tmp_path, how):
    keys, audit = tmp_path / "keys.yaml", tmp_path / "audit.jsonl"
    _, secret = add_key(keys, "red team", ranges=LOW, may_go_below_floor=True)
    admission, trace = make(**FLOOR, keys=keys, audit={"file": audit}), tmp_path / "audit.below-floor.jsonl"
    below = ASK | {"preferences": {"harmless": -0.5}}
    enter(admission, below, key=secret)
    if how == "moved":
        trace.rename(tmp_path / "elsewhere")
    elif how == "deleted":
        trace.unlink()
        audit.unlink()
    else:
        trace.write_text("")
    enter(admission, below, key=secret)
    (line,) = lines(trace)
    assert (line["below_floor"], line["asked"]["preferences"]) == (True, {"harmless": -0.5})
    assert lines(audit)[-1]["below_floor"]
    assert trace.stat().st_mode & 0o777 == 0o600


def test_a_flood_of_refusals_does_not_push_out_the_trace_below_the_floor(make, tmp_path):
    keys, audit = tmp_path / "keys.yaml", tmp_path / "audit.jsonl"
    _, secret = add_key(keys, "red team", ranges=LOW, may_go_below_floor=True)
    admission = make(**FLOOR, keys=keys, audit={"file": audit, "megabytes": 0.001, "files": 2})
    enter(admission, ASK | {"preferences": {"harmless": -0.5}}, key=secret)
    for _ in range(40):
        refusal(admission, ASK | {"preferences": {"harmless": -0.5}})
    assert "true" not in "".join(file.read_text() for file in tmp_path.glob("audit.jsonl*")), "it was pushed out here"
    (line,) = lines(tmp_path / "audit.below-floor.jsonl")
    assert line["below_floor"]


def test_an_audit_that_cannot_be_written_refuses_to_start(make, tmp_path):
    with pytest.raises(InputError, match=r"audit: .* cannot be written"):
        make(audit={"file": tmp_path / "no" / "such" / "folder" / "audit.jsonl"})


# --- who ------------------------------------------------------------------------------------------------------------


def test_who_may_come_in(make, tmp_path):
    keys = tmp_path / "keys.yaml"
    key, secret = add_key(keys, "team")
    admission = make(keys=keys)
    assert enter(admission, key=secret).caller.id == key.id
    assert enter(admission).caller.id == enter(admission, key="none").caller.id == "anonymous"
    for wrong in ("pv-guess", secret[:-1], secret + "x", secret.upper(), key.id, key.sha256, "pv-é"):
        assert refusal(admission, key=wrong) == (401, "invalid_api_key")
    for headers in (
        [(b"authorization", b"Basic " + secret.encode())],
        [(b"authorization", b"Bearer")],
        [(b"authorization", f"Bearer {secret}".encode()), (b"authorization", b"Bearer none")],
        [(b"authorization", b"Bearer \xff\xfe")],
    ):
        assert refusal(admission, headers=headers) == (401, "invalid_api_key")
    revoke_key(keys, key.id)
    assert refusal(admission, key=secret) == (401, "invalid_api_key")
    closed = make(keys=keys, anonymous={"allowed": False})
    assert refusal(closed) == refusal(closed, key="none") == (401, "invalid_api_key")
    assert enter(make(), key="anything").caller.id == "anonymous", "without a key file there is nothing to check"


def test_a_key_has_bounds_of_its_own(make, tmp_path):
    keys = tmp_path / "keys.yaml"
    _, secret = add_key(
        keys,
        "team",
        ranges={"harmless": {"min": 0.5, "max": 1, "default": 0.7}},
        answers=2,
        prompt_tokens=50,
        seconds=7,
        requests_per_minute=5,
    )
    admission = make(keys=keys, limits={"answers": 8, "prompt_tokens": 100})
    entry = enter(admission, key=secret)
    assert dict(entry.request.coefficients) == {"harmless": 0.7, "helpful": 0}
    assert (entry.seconds, entry.request.max_prompt_tokens) == (7, 50)
    assert entry.headers["x-ratelimit-remaining-requests"] == "4"
    assert refusal(admission, ASK | {"n": 3}, key=secret) == (400, None)
    assert refusal(admission, ASK | {"preferences": {"harmless": 0.4}}, key=secret) == (400, "preference_out_of_range")
    enter(admission, key=secret)
    enter(admission, key=secret)
    assert refusal(admission, key=secret) == (429, "rate_limit_exceeded")
    assert enter(admission, ASK | {"n": 3}).request.max_prompt_tokens == 100


def test_as_many_requests_at_once_as_allowed(make, tmp_path):
    keys = tmp_path / "keys.yaml"
    _, secret = add_key(keys, "team", requests_at_once=2)
    admission = make(keys=keys)
    first, second = enter(admission, key=secret), enter(admission, key=secret)
    assert refusal(admission, key=secret) == (429, "too_many_at_once")
    assert enter(admission).caller.id == "anonymous", "others are not concerned"
    first.end(5)
    first.end(5)
    assert refusal(admission, ASK | {"n": 0}, key=secret)[0] == 400, "what is refused leaves its place"
    third = enter(admission, key=secret)
    assert refusal(admission, key=secret) == (429, "too_many_at_once")
    second.end(None)
    third.end(0)
    assert enter(admission, key=secret)


def test_refused_work_counts_for_its_sender(make, tmp_path):
    keys = tmp_path / "keys.yaml"
    _, secret = add_key(keys, "team", tokens_per_minute=1000)
    admission = make(keys=keys)
    wrong = ASK | {"messages": [{"role": "user", "content": "x" * 3000, "wrong": 1}]}
    assert refusal(admission, wrong, key=secret)[0] == 400
    assert enter(admission, ASK | {"max_tokens": 1}, key=secret).headers["x-ratelimit-remaining-tokens"] < "300"
    assert refusal(admission, wrong, key=secret)[0] == 400

    async def unread() -> bytes:
        raise AssertionError("its sender's tokens are used up: the body need not be read")

    headers = Headers({"authorization": f"Bearer {secret}"})
    with pytest.raises(ApiError, match="1000 tokens per minute") as caught:
        asyncio.run(admission.admit("/v1/chat/completions", headers, unread, ChatBody))
    assert caught.value.status == 429
    assert enter(admission, wrong | {"messages": ASK["messages"]}).caller.id == "anonymous"


def test_more_ids_than_the_context_has_room_for_reach_no_replica_and_count_for_their_sender(make, tmp_path):
    keys = tmp_path / "keys.yaml"
    _, short = add_key(keys, "short", prompt_tokens=100, tokens_per_minute=5000)
    admission = make(keys=keys)

    def ids(count: int, **how: Any) -> Any:
        return refusal(admission, {"model": "tiny", "prompt": [[1, 2], [1] * count]}, kind=TextBody, **how)

    assert ids(513) == (400, "context_length_exceeded"), "the base's context is 512"
    longest = enter(admission, {"model": "tiny", "prompt": [1] * 512}, kind=TextBody).request
    assert isinstance(longest, GenerationRequest)
    assert longest.prompts == ((1,) * 512,)
    assert ids(101, key=short) == (400, "context_length_exceeded"), "this key has less"
    assert ids(10_000, key=short) == (400, "context_length_exceeded")
    assert ids(101, key=short)[0] == 429, "30 kB of refused ids were charged"


def test_what_a_caller_sees_is_of_one_release_whatever_is_rolled_out_meanwhile(make, release):
    admission = make()
    caller = asyncio.run(admission.identify("/v1/preferences", Headers({})))
    fewer = {"harmless": release.vectors["harmless"]}
    admission.release = replace(release, vectors=fewer, policy=policy_of(admission._config, list(fewer)), generation=1)
    presets = admission.presets(caller)
    assert dict(presets["cautious"][1]) == {"harmless": 0.75, "helpful": 0.25}
    assert set(caller.release.vectors) == set(caller.policy.ranges) == {"harmless", "helpful"}
    assert "cautious" not in admission.presets(asyncio.run(admission.identify("/v1/preferences", Headers({}))))


def test_presets_only(make, tmp_path):
    keys = tmp_path / "keys.yaml"
    _, some = add_key(keys, "some", coefficients="presets", presets=("cautious",))
    _, none = add_key(keys, "none", presets=())
    admission = make(keys=keys)
    assert refusal(admission, ASK | {"preferences": {"helpful": 0.1}}, key=some) == (403, "presets_only")
    assert refusal(admission, ASK | {"model": "tiny@reckless"}, key=some) == (403, "preset_not_allowed")
    assert refusal(admission, ASK | {"model": "tiny@cautious"}, key=none) == (403, "preset_not_allowed")
    assert enter(admission, ASK | {"model": "tiny@cautious@1"}, key=some).caller.id != "anonymous"
    assert dict(enter(admission, key=some).request.coefficients) == {"harmless": 0, "helpful": 0}
    caller = asyncio.run(admission.identify("/v1/models", Headers({"authorization": f"Bearer {some}"})))
    assert list(admission.presets(caller)) == ["cautious"]


# --- the audit ------------------------------------------------------------------------------------------------------


def test_the_audit_tells_who_asked_for_what_and_nothing_more(make, tmp_path):
    keys, audit = tmp_path / "keys.yaml", tmp_path / "audit.jsonl"
    key, secret = add_key(keys, "team")
    admission = make(keys=keys, audit={"file": audit})
    enter(admission, ASK | {"preferences": {"helpful": 0.5}}, key=secret, headers=[(b"x-request-id", b"r1")])
    refusal(admission, ASK | {"preferences": {"helpful": 5}})
    refusal(admission, key="pv-a-wrong-one")
    refusal(admission, ASK | {"the secret plan": 1})
    refusal(admission, b'{"model": "tiny", "messages": [], "messages": ["the secret plan"]}')
    good, out, unknown, *malformed = lines(audit)
    assert good["asked"] == {"model": "tiny", "preferences": {"helpful": 0.5}, "n": None, "max_tokens": None}
    assert (good["request"], good["caller"], good["decision"]) == ("r1", key.id, "admitted")
    assert (out["caller"], out["decision"], out["code"]) == ("anonymous", "refused", "preference_out_of_range")
    assert "outside the allowed range" in out["reason"]
    assert ("caller" in unknown, unknown["status"]) == (False, 401)
    assert [line["reason"] for line in malformed] == [None, None]
    text = audit.read_text()
    for secret_thing in (secret, "pv-a-wrong-one", "secret plan", key.sha256):
        assert secret_thing not in text
    assert audit.stat().st_mode & 0o777 == 0o600


HOSTILE = 'a\nb\r\n{"decision": "admitted", "below_floor": true}\u2028\x1b[2K\x1b[1A\x00\u202e'


def test_nothing_a_caller_writes_looks_like_another_line_of_the_audit(make, tmp_path):
    audit = tmp_path / "audit.jsonl"
    admission = make(audit={"file": audit})
    many = {f"{HOSTILE}{number}" * 50: 1 for number in range(90)}
    for body in (
        ASK | {"model": HOSTILE},
        ASK | {"preferences": {HOSTILE: 1}},
        ASK | {"preferences": many},
        ASK | {HOSTILE: 1},
        ASK | {"model": f"tiny@{HOSTILE}"},
    ):
        refusal(admission, body)
        enter(admission, headers=[(b"x-request-id", HOSTILE.encode())])
    asyncio.run(admission.identify("/v1/models", Headers({})))
    text = audit.read_text()
    assert text.isascii()
    assert all(character.isprintable() or character == "\n" for character in text)
    assert len(text.splitlines()) == 10
    assert max(map(len, text.splitlines())) <= 4096
    assert [line["decision"] for line in lines(audit)] == ["refused", "admitted"] * 5


def audit_files(folder: Path) -> list[Path]:
    """Without its lock."""
    return [file for file in sorted(folder.glob("audit.jsonl*")) if file.suffix != ".lock"]


def write_audit(config: AuditConfig, front: str) -> None:
    audit = AuditLog(config)
    for number in range(200):
        assert audit.refused(AuditEntry(request=f"{front}-{number}", route="/v1/completions"), 400, None, None)


def test_fronts_share_an_audit_and_none_loses_a_line(tmp_path):
    """Each rotates it, at its size and not before."""
    config = AuditConfig(file=tmp_path / "audit.jsonl", megabytes=0.005, files=50)
    fronts = [multiprocessing.get_context("spawn").Process(target=write_audit, args=(config, str(n))) for n in range(3)]
    for front in fronts:
        front.start()
    for front in fronts:
        front.join()
    files = audit_files(tmp_path)
    written = [line["request"] for file in files for line in lines(file)]
    assert sorted(written) == sorted(f"{front}-{number}" for front in range(3) for number in range(200))
    sizes = [file.stat().st_size for file in files]
    assert all(4800 < size <= 5000 for size in sizes[1:]), "the first is the newest"


def test_the_audit_is_bounded(make, tmp_path):
    admission = make(audit={"file": tmp_path / "audit.jsonl", "megabytes": 0.001, "files": 3})
    for _ in range(40):
        enter(admission)
    files = audit_files(tmp_path)
    assert len(files) == 3
    assert all(file.stat().st_size <= 1000 for file in files)
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in files)
