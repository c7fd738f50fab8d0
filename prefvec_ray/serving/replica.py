"""A replica: one engine in one process, which turns prompts into answers. No HTTP and no policy here."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import replace

import torch
from ray import serve

from prefvec_ray.common.chat import fold_system
from prefvec_ray.common.errors import InputError
from prefvec_ray.serving.config import ServingConfig
from prefvec_ray.serving.encoding import PromptEncoder, Tokenization, check_stops, load_tokenizer
from prefvec_ray.serving.engines.base import EngineStatus, OutputDelta, PromptTooLongError, Request, Timeline
from prefvec_ray.serving.engines.load import load_engine
from prefvec_ray.serving.engines.output import stream_outputs
from prefvec_ray.serving.engines.sampling_params import SamplingParams
from prefvec_ray.serving.metrics import ReplicaMetrics
from prefvec_ray.serving.release.loaded import LoadedReleases
from prefvec_ray.serving.release.release import Release
from prefvec_ray.serving.release.rollout import ReleaseBook
from prefvec_ray.serving.request import Event, GenerationRequest, Prompt, ReleaseId, Started
from prefvec_ray.serving.spending import Spending, SpentTokens
from prefvec_ray.serving.traces import RequestTrace, Traces
from prefvec_ray.vectors import PreferenceVector


class Replica:
    """Loads base and vectors into the slot engine, and answers requests. Serve awaits the constructor, which returns
    only once a token has been generated; meanwhile the event loop goes on.

    Raises JobError, before anything is loaded, where this node does not see the base or the registry's folder.
    """

    async def __init__(  # type: ignore[misc]  # Ray knows asynchronous constructors, mypy does not
        self, config: ServingConfig, release: Release, book: ReleaseBook | None = None
    ) -> None:
        self._config = config
        self._spent = SpentTokens()
        self._metrics = ReplicaMetrics(config.model, serve.get_replica_context().replica_tag) if book else None
        self._traces = Traces(config.traces, config.model, "replica")
        self._releases = LoadedReleases(config.base, config.registry, release, book, self._change, self._generate_once)
        release = await asyncio.to_thread(self._begin)
        self.engine = await load_engine(config, release.base_fingerprint, self._tokenizer, self._releases.vectors)
        await self._generate_once(release)

    def _begin(self) -> Release:
        """The release that is served now, which it returns, and the tokenizer."""
        config = self._config
        release = self._releases.begin()
        torch.set_num_threads(config.engine.threads)
        self._tokenizer = load_tokenizer(config.base)
        self._encoder = PromptEncoder(self._tokenizer, lambda: load_tokenizer(config.base))
        return release

    async def stream(self, asked: GenerationRequest) -> AsyncIterator[Started | list[Event]]:
        """`Started`, then lists of events until every answer has its finish_reason.

        Closing the iterator stops all of the request's generation. Raises InputError, before `Started`, for prompts
        that do not fit and chats that the template refuses, and EngineError where generation failed.
        """
        spent, trace = self._spent.begin(asked.id), self._traces.begin("answer", asked.trace)
        try:
            async with self._releases.running(asked.release) as release:
                asked = replace(asked, coefficients=release.columns(asked.coefficients))
                async with contextlib.aclosing(self._answers(asked, spent, trace)) as items:
                    async for item in items:
                        yield item
        finally:
            spent.end()
            trace.end()

    async def spent(self, request_id: str) -> int | None:
        """Tokens that were generated here for the request of this id, once it has ended; None: it was not here."""
        return await self._spent.of(request_id)

    async def _answers(
        self, asked: GenerationRequest, spent: Spending, trace: RequestTrace
    ) -> AsyncGenerator[Started | list[Event]]:
        requests = await self._encoder.run(asked.caller, asked.prompts, self._requests, asked)
        yield Started(sum(len(r.prompt) for r in requests[:: asked.sampling.n]))

        def count(delta: OutputDelta) -> None:
            spent.tokens += len(delta.tokens)

        timelines = [request.timeline for request in requests]
        try:
            async with contextlib.aclosing(stream_outputs(self.engine, requests, count)) as outputs:
                async for deltas in outputs:
                    yield deltas
        finally:
            trace.worked(timelines)
            if self._metrics:
                self._metrics.worked(timelines)

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
        self._releases.check()

    async def prepare(self, release: Release, beside: ReleaseId) -> None:
        """See `LoadedReleases.prepare`."""
        await self._releases.prepare(release, beside)

    async def _change(self, vectors: Mapping[str, PreferenceVector]) -> None:
        await self.engine.change(vectors)

    async def _generate_once(self, release: Release) -> None:
        """One token, so that a replica which reports ready has answered."""
        coefficients = release.columns(release.policy.coefficients({}))
        async for _ in stream_outputs(self.engine, [Request((0,), coefficients, SamplingParams(max_tokens=1))]):
            pass

    # --- prompts ------------------------------------------------------------------------------------------------------

    def _requests(self, encoder: Tokenization, asked: GenerationRequest) -> list[Request]:
        """One for each answer, prompt by prompt; all are checked before any of them starts."""
        check_stops(asked.sampling.stop_texts, encoder.special)
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
                requests.append(replace(first, choice=choice, resume_tokens=resume_tokens, timeline=Timeline()))
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
