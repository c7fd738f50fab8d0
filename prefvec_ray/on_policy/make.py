"""The work of `prefvec data make`: generate and score on the cluster, keep every answer, then choose the pairs."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3
from pydantic import BaseModel, ConfigDict
from rich.console import Console

from prefvec_ray.common.atomic import write_whole
from prefvec_ray.common.errors import InputError, JobError
from prefvec_ray.common.files import parse_models
from prefvec_ray.common.lines import LineWriter
from prefvec_ray.common.paths import check_visible, this_node
from prefvec_ray.common.pool import share
from prefvec_ray.common.scheduling import bundle_of
from prefvec_ray.evaluation.generate import BATCH_SIZE, Sampling, encode, sample_ids
from prefvec_ray.evaluation.prompts import normalised
from prefvec_ray.on_policy.config import OnPolicyConfig
from prefvec_ray.on_policy.pairs import Counts, MadePairs, RankedPair, ScoredAnswer, rank_answers, summarise
from prefvec_ray.scorers.base import Scorer, check_prompts, run_scorer, scorer_digest
from prefvec_ray.scorers.config import read_prompts
from prefvec_ray.scorers.prompts import prompt_messages

PAIRS, ANSWERS, RECORD = "pairs.jsonl", "answers.jsonl", "made.json"
ADVICE = "delete the file, and its answers are generated again"


class Answered(BaseModel):
    """A line of `answers.jsonl`: all answers to some prompts."""

    model_config = ConfigDict(frozen=True)

    key: str
    """Of all that the answers and their scores depend on."""
    answers: list[list[ScoredAnswer]]
    """By prompt."""


@dataclass(frozen=True)
class _Part:
    """Prompts that are answered in one batch."""

    prompts: list[Any]
    sampling: Sampling


@dataclass(frozen=True)
class _Task:
    """Travels to the processes; the model travels as a folder."""

    base: Path
    scorer: Scorer


class _Answerer:
    def __init__(self, task: _Task) -> None:
        self.task = task

    def load(self) -> None:
        from prefvec_ray.common.chat import end_tokens
        from prefvec_ray.common.pretrained import load_for_sampling

        check_visible(self.task.base)
        try:
            self.model, self.tokenizer = load_for_sampling(self.task.base)
        except InputError as error:  # the driver has read this base: it is this node that cannot
            raise JobError(f"node {this_node()}: {error}") from error
        self.ends = end_tokens(getattr(self.model, "generation_config", None), self.tokenizer)

    def work(self, part: _Part) -> list[list[dict[str, Any]]]:
        prompts = encode(self.tokenizer, [prompt_messages(prompt) for prompt in part.prompts])
        answers = sample_ids(self.model, self.tokenizer, prompts, part.sampling)
        rows = [(prompt, ids) for prompt, of_prompt in zip(part.prompts, answers, strict=True) for ids in of_prompt]
        texts = self.tokenizer.batch_decode([ids for _, ids in rows], skip_special_tokens=True)
        scores = run_scorer(self.task.scorer, [prompt for prompt, _ in rows], texts)
        found = [
            {
                "text": text,
                "tokens": len(ids),
                "ended": ids[-1] in self.ends,
                "scores": {name: column[row] for name, column in scores.items()},
            }
            for row, (text, (_, ids)) in enumerate(zip(texts, rows, strict=True))
        ]
        samples = part.sampling.samples_per_prompt
        return [found[start : start + samples] for start in range(0, len(found), samples)]


def make_pairs(
    config: OnPolicyConfig,
    console: Console,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> MadePairs:
    """Answer every prompt, score, rank, and write `pairs.jsonl`, which `prefvec train` reads, and `made.json`.

    Every batch of answers is a line of `answers.jsonl` before the next one begins. A run that was interrupted continues
    from them, and another margin or metric of the same scorers takes them without generating anything. The same
    seed gives the same answers, however many processes there are. `progress(done, total)` counts prompts.

    Raises:
        InputError: prompts or a scorer that cannot be used, a base without a chat template, or no pair at all.
        JobError: a scorer failed, processes died again and again, or another process is making pairs in the folder.
    """
    scorer, rank_by = config.ranking()
    prompts, counts = _distinct(config)
    check_prompts(scorer, prompts)
    fingerprint = _check_base(config.base)
    parts = _parts(config, prompts)
    keys = [_key(part, fingerprint, scorer) for part in parts]
    config.output.mkdir(parents=True, exist_ok=True)
    path = config.output / ANSWERS
    busy = f"pairs are being made in {config.output}: wait for it, or give another output"
    with LineWriter(path, busy) as lines:
        known = {found.key: found.answers for found in parse_models(lines.lines, Answered, str(path), ADVICE)}
        missing = [place for place, key in enumerate(keys) if key not in known]
        done = sum(len(part.prompts) for part, key in zip(parts, keys, strict=True) if key in known)
        for number, answers in share(
            _Answerer,
            _Task(config.base.absolute(), scorer),
            [parts[place] for place in missing],
            processes=config.actors,
            bundle=bundle_of(config.resources),
            doing="answering",
            console=console,
        ):
            line = Answered.model_validate({"key": keys[missing[number]], "answers": answers})
            lines.add(line.model_dump_json())
            known[line.key] = line.answers
            done += len(answers)
            if progress:
                progress(done, len(prompts))
        answered = [each for key in keys for each in known[key]]
        return _write(config, scorer, rank_by, fingerprint, list(zip(prompts, answered, strict=True)), counts)


def _distinct(config: OnPolicyConfig) -> tuple[list[Any], dict[str, int]]:
    """The prompts to answer; how many were left out, and why."""
    excluded = {normalised(prompt) for source in config.exclude for prompt in read_prompts(source)}
    given = read_prompts(config.prompts)
    first: dict[str, Any] = {}
    for prompt in given:
        first.setdefault(normalised(prompt), prompt)
    kept = [prompt for words, prompt in first.items() if words not in excluded]
    if not kept:
        raise InputError(f"prompts {config.prompts}: all are among those of `exclude`; give others")
    counts = {"repeated_prompts": len(given) - len(first), "excluded_prompts": len(first) - len(kept)}
    return kept, counts


def _check_base(base: Path) -> str:
    """Its fingerprint; InputError where it is none, or has no chat template."""
    from transformers import AutoTokenizer

    from prefvec_ray.common.pretrained import from_pretrained
    from prefvec_ray.vectors import fingerprint

    if from_pretrained(AutoTokenizer, base).chat_template is None:
        raise InputError(f"base {base}: its tokenizer has no chat template; give a base that chats (`sft` writes one)")
    return fingerprint(base)


def _parts(config: OnPolicyConfig, prompts: Sequence[Any]) -> list[_Part]:
    size = max(1, BATCH_SIZE // config.samples_per_prompt)
    sampling = Sampling(**config.model_dump(include=set(Sampling.model_fields)))
    parts = []
    for start in range(0, len(prompts), size):
        seed = random.Random(f"{config.seed} {start}").getrandbits(63)
        parts.append(_Part(list(prompts[start : start + size]), sampling.model_copy(update={"seed": seed})))
    return parts


def _key(part: _Part, base_fingerprint: str, scorer: Scorer) -> str:
    prompts = [[prompt_messages(prompt), repr(prompt)] for prompt in part.prompts]
    content = [base_fingerprint, prompts, part.sampling.model_dump(), scorer_digest(scorer)]
    return blake3(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write(
    config: OnPolicyConfig,
    scorer: Scorer,
    rank_by: str,
    base_fingerprint: str,
    answered: Sequence[tuple[Any, list[ScoredAnswer]]],
    left_out: Mapping[str, int],
) -> MadePairs:
    metric = scorer.metrics[rank_by]
    rankings = [
        rank_answers(answers, rank_by, metric, margin=config.margin, most=config.pairs_per_prompt)
        for _, answers in answered
    ]
    pairs = [pair for ranking in rankings for pair in ranking.pairs]
    dropped = {
        name: sum(getattr(ranking, name) for ranking in rankings)
        for name in ("cut_off", "unusable", "repeated", "unscored")
    }
    counts = Counts(
        prompts=len(answered),
        answers=sum(len(answers) for _, answers in answered),
        without_pair=sum(not ranking.pairs for ranking in rankings),
        pairs=len(pairs),
        **dropped,
        **left_out,
    )
    if not pairs:
        why = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in dropped.items())
        raise InputError(
            f"no pair: no prompt has two answers that differ by more than {config.margin:g} in {rank_by} "
            f"(answers: {counts.answers}; {why}); lower margin, or raise samples_per_prompt or max_new_tokens"
        )
    made = MadePairs(
        preference=config.preference,
        base=str(config.base),
        base_fingerprint=base_fingerprint,
        prompts=config.prompts,
        exclude=config.exclude,
        scorer=scorer_digest(scorer),
        rank_by=rank_by,
        metric=metric,
        sampling=config.model_dump(mode="json", include=set(Sampling.model_fields)),
        margin=config.margin,
        pairs_per_prompt=config.pairs_per_prompt,
        counts=counts,
        **summarise(pairs),
    )
    rows = [
        _row(prompt, pair) for (prompt, _), ranking in zip(answered, rankings, strict=True) for pair in ranking.pairs
    ]
    write_whole(config.output / PAIRS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_whole(config.output / RECORD, made.model_dump_json(indent=2) + "\n")
    return made


def _row(prompt: Any, pair: RankedPair) -> dict[str, Any]:
    return {
        "prompt": prompt_messages(prompt),
        "chosen": [{"role": "assistant", "content": pair.chosen.text}],
        "rejected": [{"role": "assistant", "content": pair.rejected.text}],
        "score_chosen": pair.chosen_gain,
        "score_rejected": pair.rejected_gain,
    }
