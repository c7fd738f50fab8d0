"""A replica: one engine in one process, which turns prompts into answers. No HTTP and no policy here."""

import asyncio
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace

import jinja2
import torch
from ray import serve
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from prefvec_ray.common.errors import InputError
from prefvec_ray.common.paths import check_visible
from prefvec_ray.common.pretrained import from_pretrained
from prefvec_ray.registry import VectorVersion, open_registry
from prefvec_ray.registry.cache import entry_key
from prefvec_ray.serving.chat import fold_system
from prefvec_ray.serving.config import ServingConfig
from prefvec_ray.serving.encoding import PromptEncoder, Tokenization
from prefvec_ray.serving.engines.base import Engine, EngineError, EngineStatus, OutputDelta, PromptTooLongError, Request
from prefvec_ray.serving.engines.slots.engine import SlotEngine
from prefvec_ray.serving.engines.slots.weights import MergedWeights, SteeredWeights, WeightBackend
from prefvec_ray.serving.metrics import ReplicaMetrics
from prefvec_ray.serving.release.release import Release, ServedVector
from prefvec_ray.serving.release.rollout import ReleaseBook
from prefvec_ray.serving.request import Event, GenerationRequest, Prompt, ReleaseId, Started
from prefvec_ray.serving.spending import Spending, SpentTokens
from prefvec_ray.vectors import LiveModel, PreferenceVector, Steering, fingerprint, load_vector


class Replica:
    """Loads base and vectors, and answers jobs. Construction returns only once a token has been generated.

    It begins with the release that its book says is committed, and learns others by `prepare`, or when a job is of one
    that it does not have yet. Vectors that no running job needs are dropped at the next change.

    Raises JobError, before anything is loaded, where this node does not see the base or the registry's folder.
    """

    def __init__(self, config: ServingConfig, release: Release, book: ReleaseBook | None = None):
        check_visible(config.base, *([] if ":" in config.registry else [config.registry]))
        torch.set_num_threads(config.engine.threads)
        self._config, self._book = config, book
        self._first = release
        release = (book and book.newest()) or release
        self._releases = {release.id: release}
        self._jobs: Counter[ReleaseId] = Counter()
        """running, by release"""
        self._changing = asyncio.Lock()
        self._unfit: Exception | None = None
        self._tokenizer = load_tokenizer(config)
        self._encoder = PromptEncoder(self._tokenizer, lambda: load_tokenizer(config))
        self._spent = SpentTokens()
        self._metrics = ReplicaMetrics(config.model, serve.get_replica_context().replica_tag) if book else None
        self._registry = open_registry(config.registry)
        self._fetched: dict[str, VectorVersion] = {}
        """what is pinned in the node's cache, by column"""
        self._vectors = self._loaded([release])
        self.engine = build_engine(config, release, self._vectors)

    async def stream(self, job: GenerationRequest) -> AsyncIterator[Started | list[Event]]:
        """`Started`, then lists of events until every answer has its finish_reason.

        Closing the iterator stops all of the job's generation. Raises InputError (as the first thing) for
        prompts that do not fit and chats that the template refuses, EngineError where generation failed.
        """
        spent = self._spent.begin(job.id)
        try:
            release = await self._release_of(job.release)
            self._jobs[release.id] += 1
            try:
                async for item in self._answers(replace(job, coefficients=release.columns(job.coefficients)), spent):
                    yield item
            finally:
                self._jobs[release.id] -= 1
        finally:
            spent.end()

    async def spent(self, job: str) -> int | None:
        """Tokens of answers that were generated here for the job of this id, once it has ended; None: none of ours."""
        return await self._spent.of(job)

    async def _answers(self, job: GenerationRequest, spent: Spending) -> AsyncIterator[Started | list[Event]]:
        requests = await self._encoder.run(job.caller, job.prompts, self._requests, job)
        yield Started(sum(len(r.prompt) for r in requests[:: job.n]))
        events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        tasks = [asyncio.create_task(self._feed(i, request, events, spent)) for i, request in enumerate(requests)]
        try:
            left = len(tasks)
            while left:
                items = [await events.get()]
                while not events.empty():
                    items.append(events.get_nowait())
                batch = [_event(item) for item in items]
                left -= sum(piece.finish_reason is not None for _, piece in batch)
                yield batch
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def answer(self, job: GenerationRequest) -> tuple[int, list[OutputDelta]]:
        """Number of prompt tokens, and every answer as one piece."""
        prompt_tokens = 0
        answers: dict[int, OutputDelta] = {}
        async for item in self.stream(job):
            if isinstance(item, Started):
                prompt_tokens = item.prompt_tokens
                continue
            for index, piece in item:
                before = answers.get(index, OutputDelta("", ()))
                answers[index] = OutputDelta(
                    before.text + piece.text,
                    before.tokens + piece.tokens,
                    piece.finish_reason,
                    before.logprobs + piece.logprobs,
                )
        return prompt_tokens, [answers[index] for index in sorted(answers)]

    def status(self) -> EngineStatus:
        return self.engine.status()

    def check_health(self) -> None:
        """Serve asks this every few seconds and replaces a replica that raises; so the metrics are reported here."""
        if self._metrics:
            self._metrics.report(self.engine.status())
        self.engine.check_alive()
        if self._unfit:
            raise EngineError(f"this replica cannot load the release that is served: {self._unfit}")

    # --- releases -----------------------------------------------------------------------------------------------------

    async def prepare(self, release: Release, beside: ReleaseId) -> None:
        """Load this release beside the release `beside` and those of running jobs, and generate a token with it.

        Running jobs go on. Raises InputError or StoreError where it cannot be had; all goes on as before then.
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
        """A job of a release that was committed while this replica started or before it did; or of the deployment
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
        try:
            await self._change(release, beside)
        finally:
            self._unpin_unused()

    async def _change(self, release: Release, beside: ReleaseId) -> None:
        new = await asyncio.to_thread(self._loaded, [release])
        used = {beside, *(name for name, jobs in self._jobs.items() if jobs)}
        # Jobs of what is dropped may come meanwhile: they wait, and load it again.
        before, self._releases = self._releases, {name: known for name, known in self._releases.items() if name in used}
        vectors = self._loaded(list(self._releases.values())) | new
        try:
            await asyncio.wrap_future(self.engine.change(vectors))
        except BaseException:
            self._releases = before
            raise
        self._vectors = vectors
        coefficients = release.columns(release.policy.coefficients({}))
        async for _ in self.engine.stream(Request((0,), coefficients, max_new_tokens=1)):
            pass
        self._releases[release.id] = release

    def _loaded(self, releases: list[Release]) -> dict[str, PreferenceVector]:
        """The vectors of these releases under their engine's names; those that are loaded are not read again.

        Raises InputError where a reference no longer is the vector that it was when the release was resolved.
        """
        known: dict[str, PreferenceVector] = getattr(self, "_vectors", {})
        vectors = {}
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

    # --- jobs --------------------------------------------------------------------------------------------------------

    def _requests(self, encoder: Tokenization, job: GenerationRequest) -> list[Request]:
        """The job's requests, prompt by prompt; all are checked before any of them starts."""
        requests: list[Request] = []
        for prompt in job.prompts:
            ids = self._tokens(encoder, prompt, min(job.max_prompt_tokens or self.engine.context, self.engine.context))
            if job.max_prompt_tokens is not None and len(ids) > job.max_prompt_tokens:
                raise PromptTooLongError(
                    f"prompt of {len(ids)} tokens; at most {job.max_prompt_tokens} are allowed here; shorten it"
                )
            room = min(self._config.engine.max_new_tokens, max(1, self.engine.context - len(ids)))
            first = Request(
                ids,
                job.coefficients,
                max_new_tokens=room if job.max_new_tokens is None else job.max_new_tokens,
                temperature=job.temperature,
                top_p=job.top_p,
                stop=job.stop,
                logprobs=job.logprobs,
                caller=job.caller if self._config.keys else "",  # without keys all are one, and may have all rows
            )
            self.engine.check(first)
            for choice in range(job.n):
                seed = secrets.token_hex(8) if job.seed is None else str(job.seed)
                resume_tokens = job.resume_tokens[len(requests)] if job.resume_tokens else ()
                requests.append(replace(first, seed=f"{seed}/{choice}", resume_tokens=resume_tokens))
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
        try:
            text = str(encoder.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
        except jinja2.TemplateError as error:
            raise InputError(f"the model's chat template refuses these messages: {error}") from None
        return encoder.encode(text, most, add_special_tokens=False)

    async def _feed(
        self, index: int, request: Request, events: "asyncio.Queue[Event | Exception]", spent: Spending
    ) -> None:
        try:
            async for piece in self.engine.stream(request):
                spent.tokens += len(piece.tokens)
                events.put_nowait((index, piece))
        except (EngineError, InputError) as error:
            events.put_nowait(error)


def _event(item: Event | Exception) -> Event:
    if isinstance(item, Exception):
        raise item
    return item


def load_tokenizer(config: ServingConfig) -> PreTrainedTokenizerBase:
    """The base folder's tokenizer."""
    tokenizer: PreTrainedTokenizerBase = from_pretrained(AutoTokenizer, config.base, local_files_only=True)
    return tokenizer


def build_engine(config: ServingConfig, release: Release, vectors: Mapping[str, PreferenceVector]) -> Engine:
    """Load the base with the release's vectors as the config says, generate one token, and start.

    Raises InputError where the base is no longer what it was at deployment, or cannot be served in this mode.
    """
    found = fingerprint(config.base)
    if found != release.base_fingerprint:
        raise InputError(
            f"base {config.base}: {found[:23]}… here, {release.base_fingerprint[:23]}… at deployment;"
            " put the same base on every node, or deploy again"
        )
    tokenizer, base = load_tokenizer(config), release.base_fingerprint
    coefficients = release.columns(release.policy.coefficients({}))
    if config.engine.kind == "vllm":
        from prefvec_ray.serving.engines.vllm.engine import VllmEngine

        served = VllmEngine(config.base, base, tokenizer, vectors, config.engine)
        served.warm_up(coefficients)
        return served
    device = config.engine.device
    if device == "auto":
        device = "cuda" if config.replicas.gpus and torch.cuda.is_available() else "cpu"
    model = from_pretrained(
        AutoModelForCausalLM, config.base, dtype=config.engine.dtype, local_files_only=True, use_safetensors=True
    ).to(device)
    weights: WeightBackend
    if config.engine.mode == "steered":
        weights = SteeredWeights(Steering(model, vectors, base_fingerprint=base))
    else:
        weights = MergedWeights(LiveModel(model, vectors, base_fingerprint=base, threads=config.engine.threads))
    engine = SlotEngine(weights, tokenizer, max_batch=config.engine.max_batch, switch_share=config.engine.switch_share)
    engine.warm_up(coefficients)
    return engine.start()
