"""A replica: one engine in one process, which turns prompts into answers. No HTTP and no policy here."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace

import torch
from ray import serve
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from prefvec_ray.common.chat import fold_system
from prefvec_ray.common.errors import InputError
from prefvec_ray.common.paths import check_visible
from prefvec_ray.common.pretrained import from_pretrained
from prefvec_ray.registry import VectorVersion, open_registry
from prefvec_ray.registry.cache import entry_key
from prefvec_ray.serving.config import ServingConfig
from prefvec_ray.serving.encoding import PromptEncoder, Tokenization
from prefvec_ray.serving.engines.base import EngineError, EngineStatus, OutputDelta, PromptTooLongError, Request
from prefvec_ray.serving.engines.load import load_engine
from prefvec_ray.serving.engines.output import stream_outputs
from prefvec_ray.serving.engines.sampling_params import SamplingParams
from prefvec_ray.serving.metrics import ReplicaMetrics
from prefvec_ray.serving.release.release import Release, ServedVector
from prefvec_ray.serving.release.rollout import ReleaseBook
from prefvec_ray.serving.request import Event, GenerationRequest, Prompt, ReleaseId, Started
from prefvec_ray.serving.spending import Spending, SpentTokens
from prefvec_ray.vectors import PreferenceVector, load_vector


class Replica:
    """Loads base and vectors, and answers requests. Serve awaits the constructor, which returns only once a token has
    been generated; meanwhile the event loop goes on.

    A replica begins with the release that its book says is committed. It learns others by `prepare`, or when a request
    is of one that it does not have yet. Vectors that no running request needs are dropped at the next change.

    Raises JobError, before anything is loaded, where this node does not see the base or the registry's folder.
    """

    async def __init__(  # type: ignore[misc]  # Ray knows asynchronous constructors, mypy does not
        self, config: ServingConfig, release: Release, book: ReleaseBook | None = None
    ) -> None:
        self._config, self._book, self._first = config, book, release
        self._running: Counter[ReleaseId] = Counter()
        """requests, by release"""
        self._changing = asyncio.Lock()
        self._unfit: Exception | None = None
        self._spent = SpentTokens()
        self._metrics = ReplicaMetrics(config.model, serve.get_replica_context().replica_tag) if book else None
        self._fetched: dict[str, VectorVersion] = {}
        """what is pinned in the node's cache, by column"""
        self._vectors: dict[str, PreferenceVector] = {}
        release = await asyncio.to_thread(self._load_release)
        self._releases = {release.id: release}
        self.engine = await load_engine(config, release.base_fingerprint, self._tokenizer, self._vectors)
        await self._generate_once(release)

    def _load_release(self) -> Release:
        """The tokenizer, and the vectors of the release that is served now, which it returns."""
        config = self._config
        check_visible(config.base, *([] if ":" in config.registry else [config.registry]))
        torch.set_num_threads(config.engine.threads)
        self._tokenizer = load_tokenizer(config)
        self._encoder = PromptEncoder(self._tokenizer, lambda: load_tokenizer(config))
        self._registry = open_registry(config.registry)
        release = (self._book and self._book.newest()) or self._first
        self._vectors = self._loaded([release])
        return release

    async def stream(self, asked: GenerationRequest) -> AsyncIterator[Started | list[Event]]:
        """`Started`, then lists of events until every answer has its finish_reason.

        Closing the iterator stops all of the request's generation. Raises InputError, before `Started`, for prompts
        that do not fit and chats that the template refuses, and EngineError where generation failed.
        """
        spent = self._spent.begin(asked.id)
        try:
            release = await self._release_of(asked.release)
            self._running[release.id] += 1
            asked = replace(asked, coefficients=release.columns(asked.coefficients))
            try:
                async with contextlib.aclosing(self._answers(asked, spent)) as items:
                    async for item in items:
                        yield item
            finally:
                self._running[release.id] -= 1
        finally:
            spent.end()

    async def spent(self, request_id: str) -> int | None:
        """Tokens that were generated here for the request of this id, once it has ended; None: it was not here."""
        return await self._spent.of(request_id)

    async def _answers(self, asked: GenerationRequest, spent: Spending) -> AsyncGenerator[Started | list[Event]]:
        requests = await self._encoder.run(asked.caller, asked.prompts, self._requests, asked)
        yield Started(sum(len(r.prompt) for r in requests[:: asked.sampling.n]))

        def count(delta: OutputDelta) -> None:
            spent.tokens += len(delta.tokens)

        async with contextlib.aclosing(stream_outputs(self.engine, requests, count)) as outputs:
            async for deltas in outputs:
                yield deltas

    async def answer(self, asked: GenerationRequest) -> tuple[int, list[OutputDelta]]:
        """Number of prompt tokens, and every answer whole."""
        prompt_tokens = 0
        answers = [OutputDelta("", ())] * asked.answers
        async for item in self.stream(asked):
            if isinstance(item, Started):
                prompt_tokens = item.prompt_tokens
            else:
                for index, delta in item:
                    answers[index] = answers[index].followed_by(delta)
        return prompt_tokens, answers

    def status(self) -> EngineStatus:
        return self.engine.status()

    def check_health(self) -> None:
        """Serve calls this every few seconds, so metrics are reported here. It replaces a replica that raises."""
        if self._metrics:
            self._metrics.report(self.engine.status())
        self.engine.check_alive()
        if self._unfit:
            raise EngineError(f"this replica cannot load the release that is served: {self._unfit}")

    # --- releases -----------------------------------------------------------------------------------------------------

    async def prepare(self, release: Release, beside: ReleaseId) -> None:
        """Load this release beside the release `beside` and those of running requests, and generate a token with it.

        Running requests go on. Raises InputError or StoreError where it cannot be loaded; nothing has changed then.
        """
        async with self._changing:
            await self._learn(release, beside)

    async def _release_of(self, wanted: ReleaseId) -> Release:
        if wanted not in self._releases:
            async with self._changing:
                if wanted not in self._releases:
                    await self._catch_up(wanted)
        return self._releases[wanted]

    async def _catch_up(self, wanted: ReleaseId) -> None:
        """Load a release that was committed while this replica started or before it did, or one of the deployment
        before this one or after it."""
        found = self._first if wanted == self._first.id else None
        if found is None and self._book:
            found = await asyncio.to_thread(self._book.read, wanted)
        if found is None or found.base_fingerprint != self._first.base_fingerprint:
            raise EngineError(f"no release of generation {wanted[1]} was committed for this base")
        try:
            await self._learn(found, next(reversed(self._releases)))  # the one learned last
        except Exception as error:
            if found.deployment == self._first.deployment:
                self._unfit = error
            raise EngineError(f"generation {wanted[1]} cannot be served here: {error}") from error

    async def _learn(self, release: Release, beside: ReleaseId) -> None:
        before = self._releases
        try:
            new = await asyncio.to_thread(self._loaded, [release])
            used = {beside, *(name for name, running in self._running.items() if running)}
            # Requests of what is dropped may come meanwhile: they wait, and load it again.
            self._releases = {name: known for name, known in before.items() if name in used}
            vectors = self._loaded(list(self._releases.values())) | new
            await self.engine.change(vectors)
            self._vectors = vectors
        except BaseException:
            self._releases = before
            raise
        finally:
            self._unpin_unused()
        await self._generate_once(release)
        self._releases[release.id] = release

    async def _generate_once(self, release: Release) -> None:
        """One token, so that a replica which reports ready has answered."""
        coefficients = release.columns(release.policy.coefficients({}))
        async for _ in stream_outputs(self.engine, [Request((0,), coefficients, SamplingParams(max_tokens=1))]):
            pass

    def _loaded(self, releases: list[Release]) -> dict[str, PreferenceVector]:
        """The vectors of these releases under their engine's names; those that are loaded are not read again.

        Raises InputError where a reference no longer is the vector that it was when the release was resolved.
        """
        known, vectors = self._vectors, {}
        for release in releases:
            for name, vector in release.vectors.items():
                column = release.column(name)
                if column not in vectors:
                    vectors[column] = known[column] if column in known else self._load(column, vector)
        return vectors

    def _load(self, column: str, vector: ServedVector) -> PreferenceVector:
        found = self._registry.resolve(vector.ref)
        if found.digest != vector.digest:
            raise InputError(
                f"{vector.ref} is another vector in {self._config.registry} than at the roll-out; resolve again"
            )
        self._fetched[column] = found
        return load_vector(self._registry.fetch(vector.ref))

    def _unpin_unused(self) -> None:
        """Release the node's cache of vectors that the engine no longer has, or never got. Several may share files."""
        unused = self._fetched.keys() - self._vectors.keys()
        dropped = [self._fetched.pop(column) for column in unused]
        kept = {entry_key(version) for version in self._fetched.values()}
        for version in dropped:
            if entry_key(version) not in kept:
                self._registry.cache.unpin(version)

    # --- prompts ------------------------------------------------------------------------------------------------------

    def _requests(self, encoder: Tokenization, asked: GenerationRequest) -> list[Request]:
        """One for each answer, prompt by prompt; all are checked before any of them starts."""
        for text in asked.sampling.stop_texts:
            for token in encoder.special:
                if token in text:
                    raise InputError(f"stop: {token!r} is a token that is never part of an answer's text; leave it out")
        requests: list[Request] = []
        context, allowed = self.engine.context, asked.max_prompt_tokens
        for prompt in asked.prompts:
            ids = self._tokens(encoder, prompt, min(allowed or context, context))
            if allowed is not None and len(ids) > allowed:
                raise PromptTooLongError(f"prompt of {len(ids)} tokens; at most {allowed} are allowed here; shorten it")
            sampling = asked.sampling
            if sampling.max_tokens is None:
                room = min(self._config.engine.max_new_tokens, max(1, context - len(ids)))
                sampling = sampling.model_copy(update={"max_tokens": room})
            caller = asked.caller if self._config.keys else ""  # without keys all are one, and may have all rows
            first = Request(ids, asked.coefficients, sampling, caller=caller)
            self.engine.check(first)
            for choice in range(sampling.n):
                resume_tokens = asked.resume_tokens[len(requests)] if asked.resume_tokens else ()
                requests.append(replace(first, choice=choice, resume_tokens=resume_tokens))
        return requests

    def _tokens(self, encoder: Tokenization, prompt: Prompt, most: int) -> tuple[int, ...]:
        """The prompt's tokens. Raises PromptTooLongError, before any work, for text that cannot fit into `most`."""
        if isinstance(prompt, str):
            return encoder.encode(prompt, most)
        if not prompt or isinstance(prompt[0], int):
            return prompt  # type: ignore[return-value]  # then all are
        if self._tokenizer.chat_template is None:
            raise InputError("this model has no chat template; use /v1/completions")
        chat = [message for message in prompt if not isinstance(message, int)]
        if self._config.system == "fold":
            chat = fold_system(chat)
        return encoder.encode_chat(chat, most)


def load_tokenizer(config: ServingConfig) -> PreTrainedTokenizerBase:
    """The base folder's tokenizer."""
    tokenizer: PreTrainedTokenizerBase = from_pretrained(AutoTokenizer, config.base, local_files_only=True)
    return tokenizer
