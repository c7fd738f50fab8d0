"""Admission control: authenticate the caller, check the policy, build the generation request. No Ray and no HTTP here.

The checks come in this order: key, requests per minute, body, coefficients, size, tokens. A request that fails one is
refused with an `ApiError` that says what to change, and the audit gets a line. One that passes becomes a
`GenerationRequest` within its caller's policy.
"""

import asyncio
import json
import logging
import math
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace

from starlette.datastructures import Headers

from prefvec_ray.common.errors import InputError
from prefvec_ray.registry import PresetVersion, Registry
from prefvec_ray.serving.access.audit import Asked, AuditEntry, AuditLog
from prefvec_ray.serving.access.errors import ApiError, explained, no_model
from prefvec_ray.serving.access.keys import Key, Keys, KeysUnreadableError
from prefvec_ray.serving.access.policy import LONGEST_NAME, Policy, policy_for
from prefvec_ray.serving.access.usage import Usage, Usages, local_usages
from prefvec_ray.serving.config import Allowance, ServingConfig
from prefvec_ray.serving.engines.base import Coefficients
from prefvec_ray.serving.http.openai_protocol import BYTES_PER_TOKEN, Body
from prefvec_ray.serving.http.parsing import MostIds, parse_body
from prefvec_ray.serving.release.release import Release
from prefvec_ray.serving.request import ReplicaRequest
from prefvec_ray.serving.turns import Turns

log = logging.getLogger("ray.serve")

ANONYMOUS = "anonymous"
NO_KEY = "none"
"""the key of callers who have none: OpenAI's client insists on sending one"""
INLINE_BYTES = 8_000
"""bodies up to this are parsed at once, larger ones in a thread, callers in turn"""
MOST_NAMED = 20
"""preferences of one request that the audit keeps"""


@dataclass(frozen=True)
class Caller:
    """Who is calling: a key's id or `anonymous`, and what that allows at what is served now."""

    id: str
    allowance: Allowance
    policy: Policy
    release: Release
    """the release that was served when it called. Policy, lists and answers are all of this one, whatever is rolled out
    meanwhile"""


@dataclass(frozen=True)
class AdmittedRequest:
    """A request that may be answered."""

    caller: Caller
    body: Body
    request: ReplicaRequest
    seconds: float
    """until its deadline"""
    usage: Usage
    headers: Mapping[str, str]
    """for its answer: what the caller has left"""

    @property
    def release(self) -> Release:
        """Its coefficients are of these vectors, to the end."""
        return self.caller.release

    @property
    def fingerprint(self) -> str:
        """Of its release at its coefficients."""
        return self.release.fingerprint(self.request.coefficients)

    @property
    def traced(self) -> dict[str, str]:
        """What its trace says of it."""
        return {
            "enduser.id": self.caller.id,
            "gen_ai.request.model": self.body.model,
            "prefvec.request": self.request.id,
            "prefvec.fingerprint": self.fingerprint,
            "prefvec.coefficients": json.dumps(dict(self.request.coefficients)),
        }

    def end(self, used: int | None) -> None:
        """See `Usage.end`. Call this once for every admitted request."""
        self.usage.end(used)


class AdmissionController:
    """New requests get `release`. `usages`: who counts what callers use; None: this process. Raises InputError where
    the key file or the audit cannot be used, or a key could go below a floor without an audit."""

    def __init__(self, config: ServingConfig, release: Release, registry: Registry, usages: Usages | None = None):
        self._config, self._registry, self.release = config, registry, release
        self._audit = AuditLog(config.audit)
        self._usages = usages or local_usages()
        self._parsing = Turns("parsing")
        self._keys = Keys(config.keys, self._check_key) if config.keys else None

    def check(self, release: Release) -> None:
        """Raises InputError where a key or a floor would lose its meaning with this release."""
        AdmissionController(self._config, release, self._registry)

    async def admit(
        self, route: str, headers: Headers, read: Callable[[], Awaitable[bytes]], kind: type[Body]
    ) -> AdmittedRequest:
        """Check a request from its headers on; `read` returns its body. Raises ApiError.

        A refused request counts as a request, and as the tokens that its body would have had.
        """
        known = _of_request(route, headers)
        usage, content = None, b""
        try:
            caller = self._identify(headers, known)
            usage = await self._usages(caller.id, caller.allowance)
            content = await read()
            body = await self._parsed(caller, content, kind)
            known.asked = _asked(body)
            caller = self._identify(headers, known)  # once more: the release may have changed meanwhile
            coefficients = await self._coefficients(caller, body.model, body.preferences)
            request = self._sized(caller, body, coefficients)
            most = body.prompt_tokens + body.answers * (body.new_tokens or self._config.engine.max_new_tokens)
            left = await usage.reserve(most)
            self._admitted(known, coefficients)
        except BaseException as error:
            if usage:
                usage.refuse(self._cost(content, error))
            if isinstance(error, ApiError):
                self._refused(known, error)
            raise
        seconds = min(self._config.limits.seconds, caller.allowance.seconds or math.inf)
        return AdmittedRequest(caller, body, request, seconds, usage, left)

    async def _parsed(self, caller: Caller, content: bytes, kind: type[Body]) -> Body:
        most = self._most_ids(caller)
        if len(content) <= INLINE_BYTES:
            return parse_body(content, kind, most)
        return await self._parsing.run(caller.id, parse_body, content, kind, most)

    def _most_ids(self, caller: Caller) -> MostIds:
        """What prompts of token ids can have: more would be refused after it was parsed and sent to a replica."""
        one = _least(caller.release.context, self._prompt_tokens(caller))
        answers = _least(self._config.limits.answers, caller.allowance.answers)
        return MostIds(one, one * answers if one and answers else None)

    def _prompt_tokens(self, caller: Caller) -> int | None:
        return _least(self._config.limits.prompt_tokens, caller.allowance.prompt_tokens)

    def _cost(self, content: bytes, error: BaseException) -> int:
        """Tokens that a request is charged that was refused for its content: those of its body."""
        if not isinstance(error, ApiError) or error.status >= 429:
            return 0
        size = self._config.limits.body_bytes if error.status == 413 else len(content)
        return size // BYTES_PER_TOKEN + 1

    def _admitted(self, known: AuditEntry, coefficients: Coefficients) -> None:
        policy, floors = self.release.policy, self._config.floors
        below = any(eta < floors.get(policy.preference_of(name), -math.inf) for name, eta in coefficients)
        if not self._audit.admitted(known, below_floor=below) and below:
            # Without a record there is no answer below a floor.
            raise ApiError(503, "the server cannot answer at these coefficients now; try again", code="unavailable")

    async def identify(self, route: str, headers: Headers, model: str | None = None) -> Caller:
        """The caller of a route that gives no answers. Raises ApiError, also where they may not ask for `model`."""
        known = _of_request(route, headers)
        try:
            caller = self._identify(headers, known)
            if model is not None:
                known.asked = Asked(model=model[:LONGEST_NAME])
                await self._coefficients(caller, model, None)
        except ApiError as error:
            self._refused(known, error)
            raise
        return caller

    def presets(self, caller: Caller) -> dict[str, tuple[PresetVersion, Coefficients]]:
        """The newest version of every preset that this caller may ask for, by name, with its coefficients at the
        caller's release. Reads the registry."""
        found = {}
        for preset in self._registry.list_presets(skip_damaged=True):
            if not _may_name(caller, preset.name):
                continue
            try:
                found[preset.name] = preset, caller.release.preset(preset, caller.policy)
            except InputError:  # made for another base or other vectors, or outside this caller's policy
                continue
        return found

    # --- who ---------------------------------------------------------------------------------------------------------

    def _identify(self, headers: Headers, known: AuditEntry) -> Caller:
        secret, release = self._secret(headers), self.release
        if self._keys is None or secret is None:
            known.caller = ANONYMOUS
            if not self._config.anonymous.allowed:
                raise _no_entry("this server asks for a key: Authorization: Bearer <key>")
            return Caller(ANONYMOUS, self._config.anonymous, release.policy, release)
        try:
            key = self._keys.find(secret)
        except KeysUnreadableError:
            raise ApiError(503, "the server cannot check keys now; try again", code="unavailable") from None
        if key is None:
            raise _no_entry("this key is not known here; check it, or ask the operator for one")
        known.caller = key.id
        if key.revoked is not None:
            raise _no_entry("this key was revoked; ask the operator for another")
        try:
            return Caller(key.id, key, policy_for(key, release.policy), release)
        except InputError as error:  # the vectors have changed since the key was read
            log.error("%s cannot be used: %s", key.id, error)
            raise ApiError(503, "this key does not fit what is served now; tell the operator") from None

    def _secret(self, headers: Headers) -> str | None:
        """The key that the caller sends, None for none. It is not checked here."""
        given = headers.getlist("authorization")
        if self._keys is None or not given:
            return None
        scheme, _, secret = given[0].partition(" ")
        if len(given) > 1 or scheme.lower() != "bearer" or not secret.strip():
            raise _no_entry("expected one header Authorization: Bearer <key>")
        return None if secret.strip() == NO_KEY else secret.strip()

    def _check_key(self, key: Key) -> None:
        if key.revoked is not None:
            return
        policy_for(key, self.release.policy)
        if key.may_go_below_floor and self._config.audit is None:
            raise InputError(f"{key.id} ({key.name}) may go below a floor, which must leave a trace: set 'audit'")

    # --- what --------------------------------------------------------------------------------------------------------

    async def _coefficients(self, caller: Caller, model: str, preferences: Mapping[str, float] | None) -> Coefficients:
        """The coefficients that the caller asks for, by preset or by name. Raises ApiError where they are not served or
        not allowed."""
        name, at, preset = model.partition("@")
        if name != self._config.model or (at and not preset):
            raise no_model(model, [self._config.model])
        if preset and preferences is not None:
            raise ApiError(
                400,
                f"'{model}' names a preset, and 'preferences' was given too; choose one of the two",
                code="preset_and_preferences",
                param="preferences",
            )
        if preferences and caller.allowance.coefficients == "presets":
            raise ApiError(
                403,
                f"only presets may be asked for here, as model '{name}@<preset>'; see /v1/preferences",
                code="presets_only",
                param="preferences",
            )
        try:
            if not preset:
                return caller.policy.coefficients(preferences or {})
            return caller.release.preset(await self._preset(caller, model, preset), caller.policy)
        except InputError as error:
            raise explained(error) from None

    async def _preset(self, caller: Caller, model: str, ref: str) -> PresetVersion:
        if not _may_name(caller, ref.partition("@")[0]):
            allowed = ", ".join(caller.allowance.presets or ())
            raise ApiError(
                403, f"'{model}' may not be asked for here; allowed presets: {allowed}", code="preset_not_allowed"
            )
        try:
            version: PresetVersion = await asyncio.to_thread(self._registry.resolve_preset, ref)
        except InputError:
            served = await asyncio.to_thread(self.presets, caller)
            raise no_model(model, [self._config.model, *(f"{self._config.model}@{each}" for each in served)]) from None
        if not _may_name(caller, version.name):
            raise no_model(model, [self._config.model])
        return version

    def _sized(self, caller: Caller, body: Body, coefficients: Coefficients) -> ReplicaRequest:
        request = body.replica_request(coefficients, self._prompt_tokens(caller))
        most = _least(self._config.limits.answers, caller.allowance.answers)
        if most is not None and body.answers > most:
            prompts = body.answers // body.n
            raise ApiError(400, f"{prompts} prompts x n = {body.n}: at most {most} answers", param="n")
        longest, asked = self._config.engine.max_new_tokens, body.new_tokens or 0
        if asked > longest:
            param = "max_tokens" if body.max_tokens else "max_completion_tokens"
            raise ApiError(400, f"{param}: {asked} is more than {longest}", param=param)
        return replace(request, release=caller.release.id, caller=caller.id, id=uuid.uuid4().hex)

    def _refused(self, known: AuditEntry, error: ApiError) -> None:
        if error.status < 500:
            message = error.error.message if error.error.code else None  # others may quote the body
            self._audit.refused(known, error.status, error.error.code, message)


def _no_entry(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def _may_name(caller: Caller, preset: str) -> bool:
    return caller.allowance.presets is None or preset in caller.allowance.presets


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _of_request(route: str, headers: Headers) -> AuditEntry:
    """What the audit keeps of a request's head."""
    return AuditEntry(request=headers.get("x-request-id", "")[:LONGEST_NAME], route=route[:LONGEST_NAME])


def _asked(body: Body) -> Asked:
    """What the audit keeps of a body."""
    named = list((body.preferences or {}).items())
    preferences = {name[:LONGEST_NAME]: eta for name, eta in named[:MOST_NAMED]}
    n = body.n if "n" in body.model_fields_set else None
    asked = Asked(model=body.model, preferences=preferences, n=n, max_tokens=body.new_tokens)
    if len(named) > MOST_NAMED:
        asked.more_preferences = len(named) - MOST_NAMED
    return asked
