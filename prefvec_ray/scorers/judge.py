"""A language model as judge, over any OpenAI-compatible endpoint: a mark for each answer, or a verdict against a
baseline's answer in both orders (MT-Bench, arXiv 2306.05685, section 3: judges favour a position).

A judge reads what it judges: an answer can talk to it. Where that matters, do not let a judge alone decide.
"""

import asyncio
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from prefvec_ray.artifacts.evaluation import Metric
from prefvec_ray.common.errors import InputError
from prefvec_ray.scorers.base import ScorerError, Scores, content_digest
from prefvec_ray.scorers.cache import ScoreCache, score_key
from prefvec_ray.scorers.judge_config import AGAIN, JudgeConfig, load_baseline, load_template, marks, read_verdict
from prefvec_ray.scorers.prompts import prompt_text


class JudgeScorer:
    """Asks a judge about every answer.

    Pointwise: its mark, in [low, high], higher is better. Pairwise: 1 where the answer beats the baseline's in both
    orders, 0 where it loses in both, else 0.5; the same text as the baseline's is 0.5 unasked.

    A reply counts only if its last line, and no other, states the verdict; else the judge is asked again, and after
    `attempts` the answer has no score (None). The same goes for calls that fail after their retries. More than
    `max_missing` of either in a call is an error, so that no average rests on the few that were easy to judge.
    Verdicts are kept in `cache` as they come. `counts` (of this object) and `notes()` (of all processes that share the
    cache) tell how it went.

    Raises:
        InputError: a template without its fields, a baseline without an answer, an unset key variable.
        ScorerError: at a call: too much is missing, or the endpoint refuses the key or the model.
    """

    card = None

    def __init__(self, config: JudgeConfig, *, cache: ScoreCache | None = None) -> None:
        self.config, self.cache = config, cache
        self.template = load_template(config)
        self.baseline = load_baseline(config.baseline) if config.baseline else {}
        pairwise = config.mode == "pairwise"
        self.metrics: Mapping[str, Metric] = {
            config.metric: Metric(
                direction="maximize",
                low=0 if pairwise else config.low,
                high=1 if pairwise else config.high,
                meaning=f"{config.model} on: {config.criterion}" + (", against a baseline" if pairwise else ""),
                safety=config.safety,
            )
        }
        asked = {"base_url", "model", "mode", "temperature", "max_tokens", "extra", "low", "high", "criterion"}
        settings = config.model_dump(mode="json", include=asked)
        self.digest = content_digest(["judge", settings, config.metric, self.template, self.baseline])
        self.counts: Counter[str] = Counter()
        self._key()

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> Scores:
        questions = [self._questions(prompt, text) for prompt, text in zip(prompts, responses, strict=True)]
        different = list(dict.fromkeys(question for asked in questions for question in asked))
        verdicts = self._known(different)
        missing = [question for question in different if question not in verdicts]
        before = self.counts.copy()
        self.counts["known"] += len(verdicts)
        try:
            if missing:
                # A thread of its own: the caller may be inside a running event loop.
                with ThreadPoolExecutor(1) as pool:
                    verdicts.update(pool.submit(asyncio.run, self._ask_all(missing, len(different))).result())
            return {self.config.metric: [self._score(asked, verdicts) for asked in questions]}
        finally:
            if self.cache is not None:
                new = self.counts - before
                self.cache.count({f"{self.digest} {name}": value for name, value in new.items()})

    def notes(self) -> list[str]:
        count = self.counts
        if self.cache is not None:  # of all processes
            mine = f"{self.digest} "
            count = Counter({n.removeprefix(mine): v for n, v in self.cache.counts().items() if n.startswith(mine)})
        note = (
            f"judge {self.config.model}: {count['asked']} verdicts asked for, {count['known']} known; "
            f"{count['unread']} replies could not be read, {count['failed']} calls failed for good, "
            f"{count['missing']} verdicts are missing; {count['input_tokens']} tokens read, "
            f"{count['output_tokens']} written"
        )
        if self.config.mode == "pairwise":
            note += f"; {count['disagreed']} of {count['pairs']} pairs were judged otherwise in the other order"
        return [note]

    def _questions(self, prompt: Any, response: str) -> tuple[str, ...]:
        """What the judge is asked about one answer: one text, two in both orders, or nothing."""
        text = prompt_text(prompt)
        if self.config.mode == "pointwise":
            return (self._fill(prompt=text, answer=response),)
        if text not in self.baseline:
            raise InputError(f"judge: {self.config.baseline} has no answer to {text[:60]!r}; it needs one a prompt")
        other = self.baseline[text]
        if other == response:
            return ()
        return (
            self._fill(prompt=text, answer_a=response, answer_b=other),
            self._fill(prompt=text, answer_a=other, answer_b=response),
        )

    def _fill(self, **values: str) -> str:
        known = {"criterion": self.config.criterion, **marks(self.config), **values}
        # In one pass: braces within a prompt or an answer are text.
        return re.sub(r"\{(\w+)\}", lambda found: known.get(found[1], found[0]), self.template)

    def _score(self, asked: tuple[str, ...], verdicts: Mapping[str, float | None]) -> float | None:
        if self.config.mode == "pointwise":
            return verdicts[asked[0]]
        self.counts["pairs"] += 1
        if not asked:
            return 0.5
        first, swapped = (verdicts[question] for question in asked)
        if first is None or swapped is None:
            return None
        if first != 1 - swapped:
            self.counts["disagreed"] += 1
            return 0.5
        return first

    def _known(self, questions: list[str]) -> dict[str, float | None]:
        if self.cache is None:
            return {}
        found = self.cache.get([score_key(self.digest, question) for question in questions])
        return {q: found[score_key(self.digest, q)] for q in questions if score_key(self.digest, q) in found}

    async def _ask_all(self, questions: list[str], total: int) -> dict[str, float | None]:
        from openai import AsyncOpenAI

        room = asyncio.Semaphore(self.config.concurrency)
        verdicts: dict[str, float | None] = {}
        allowed = self.config.max_missing * total
        lost = 0

        async def ask(question: str) -> None:
            nonlocal lost
            async with room:
                verdict, problem = await self._ask(client, question)
            verdicts[question] = verdict
            if verdict is not None:
                if self.cache is not None:
                    self.cache.put({score_key(self.digest, question): verdict})
                return
            lost += 1
            self.counts["missing"] += 1
            if lost > allowed:
                raise ScorerError(
                    f"judge {self.config.model} at {self.config.base_url}: more than {self.config.max_missing:.0%} of "
                    f"{total} verdicts are missing; the last: {problem}"
                )

        async with AsyncOpenAI(
            base_url=self.config.base_url,
            api_key=self._key(),
            max_retries=self.config.retries,
            timeout=self.config.timeout,
        ) as client:
            try:
                async with asyncio.TaskGroup() as tasks:
                    for question in questions:
                        tasks.create_task(ask(question))
            except ExceptionGroup as group:  # the first error ends all
                raise group.exceptions[0] from None
        return verdicts

    async def _ask(self, client: Any, question: str) -> tuple[float | None, str]:
        """The verdict, or None and why there is none."""
        import openai

        self.counts["asked"] += 1
        messages = [{"role": "user", "content": question}]
        problem = ""
        for _ in range(self.config.attempts):
            try:
                # The client's own timeout is for silence; an endpoint that drips bytes must end too.
                async with asyncio.timeout((self.config.timeout + 10) * (self.config.retries + 1)):
                    done = await client.chat.completions.create(
                        model=self.config.model,
                        messages=messages,
                        extra_body=self.config.extra,
                        **self.config.model_dump(include={"temperature", "max_tokens"}, exclude_none=True),
                    )
            except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
                raise ScorerError(f"judge {self.config.model} at {self.config.base_url}: {error}") from error
            except (openai.OpenAIError, TimeoutError, ValueError) as error:
                self.counts["failed"] += 1
                return None, f"{type(error).__name__} {error}".strip()
            if done.usage is not None:
                self.counts["input_tokens"] += done.usage.prompt_tokens
                self.counts["output_tokens"] += done.usage.completion_tokens
            reply = (done.choices[0].message.content if done.choices else None) or ""
            verdict = read_verdict(reply, self.config)
            if verdict is not None:
                return verdict, ""
            self.counts["unread"] += 1
            problem = f"a reply that states no verdict: {reply[-80:]!r}"
            again = AGAIN[self.config.mode].format(**marks(self.config))
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": reply or "(nothing)"},
                {"role": "user", "content": again},
            ]
        return None, problem

    def _key(self) -> str:
        name = self.config.api_key_env
        if name is None:
            return "none"
        key = os.environ.get(name)
        if not key:
            raise InputError(f"judge: the environment variable {name} is not set; it must hold the endpoint's key")
        return key
