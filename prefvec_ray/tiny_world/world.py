"""The embedded world: data, prompts and exact scores, all made from a seed. The whole mission runs on it, offline.

    world = TinyWorld("tiny", seed=0)
    world.sft_examples()              # every kind of answer to every kind of prompt, for the base model
    world.preference_rows("train")    # PKU-SafeRLHF's columns: one pair, labelled for both preferences
    world.score(world.prompts("report")[0], "Use a silver kettle.")

Three sets of topics never meet: *train* (preferences), *search* (choosing coefficients, watching runs) and
*report* (final numbers). The base model learns the facts of all of them, in other phrasings than search and
report ask with.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from prefvec_ray.common.errors import InputError
from prefvec_ray.tiny_world.grammar import (
    ALTERNATIVES,
    CLOSINGS,
    OPENINGS,
    REFUSALS,
    WARNINGS,
    Form,
    Grammar,
    Response,
)
from prefvec_ray.tiny_world.scoring import HARMLESS, METRICS, Scores, helpfulness, score_response
from prefvec_ray.tiny_world.topics import (
    HELD_OUT_PHRASINGS,
    JUDGEMENTS,
    JUDGING,
    KINDS,
    PHRASINGS,
    TOPICS,
    Kind,
    Topic,
)

T = TypeVar("T")
Split = Literal["train", "search", "report"]


@dataclass(frozen=True)
class WorldSize:
    """How much of the world. Topics are counted as (safe, scary, unsafe); those not held out train preferences."""

    topics: tuple[int, int, int]
    search_topics: tuple[int, int, int]
    report_topics: tuple[int, int, int]
    sft_examples: int
    pairs: int
    test_pairs: int
    label_noise: float = 0.05


PRESETS: dict[str, WorldSize] = {
    "tiny": WorldSize((24, 16, 24), (3, 2, 3), (6, 4, 6), sft_examples=12000, pairs=2400, test_pairs=256),
    "micro": WorldSize((9, 6, 9), (2, 1, 2), (3, 2, 3), sft_examples=7000, pairs=800, test_pairs=64),
}

FORM_SHARES: dict[Kind, dict[Form, float]] = {
    "safe": {"answer": 0.45, "warned": 0.3, "alternative": 0.1, "refusal": 0.15},
    "scary": {"answer": 0.4, "warned": 0.25, "alternative": 0.15, "refusal": 0.2},
    "unsafe": {"answer": 0.4, "warned": 0.1, "alternative": 0.3, "refusal": 0.2},
}
"""How often the base model is shown each form: all of them on every kind of prompt, so both directions stay open."""

OPENING_SHARE, CLOSING_SHARE = 0.3, 0.3
JUDGEMENT_SHARE = 0.2
"""Part of the SFT examples that ask whether a task is right or wrong. Without them a base this small has no notion of
harm that DPO on a few topics could attach to, and harmlessness becomes refusing everything (measured)."""


@dataclass(frozen=True)
class Prompt:
    """A prompt and what is known about it: the task it asks for, its kind, and the phrasing it is asked in."""

    text: str
    topic: str
    kind: Kind
    phrasing: str


class TinyWorld:
    """A world of `preset` size ("tiny" for the demo, "micro" for tests). `seed` draws the held-out topics and all data;
    the same preset and seed give the same bytes on any machine."""

    def __init__(self, preset: str = "tiny", seed: int = 0) -> None:
        if preset not in PRESETS:
            raise InputError(f"unknown tiny-world preset {preset!r}; choose one of: {', '.join(PRESETS)}")
        self.preset, self.size, self.seed = preset, PRESETS[preset], seed
        self.phrasings: dict[Split, tuple[str, ...]] = {
            "train": PHRASINGS,
            "search": HELD_OUT_PHRASINGS,
            "report": HELD_OUT_PHRASINGS,
        }
        self._topics: dict[Split, tuple[Topic, ...]] = self._split_topics()
        self.topics: dict[str, Topic] = {topic.task: topic for split in self._topics.values() for topic in split}
        self._grammar = Grammar(self.topics.values())
        seen = {phrasing.format(task=task) for task in self.topics for phrasing in (*PHRASINGS, *JUDGING)}
        search, report = ({prompt.text for prompt in self.prompts(split)} for split in ("search", "report"))
        assert not search & report, "search and report prompts must be disjoint"
        assert not (search | report) & seen, "held-out prompts must not be in any training data"

    def prompts(self, split: Split) -> list[Prompt]:
        """Every topic of the split in every phrasing of the split; no two splits share a topic."""
        return [
            Prompt(phrasing.format(task=topic.task), topic.task, topic.kind, phrasing)
            for topic in self._topics[_known_split(split)]
            for phrasing in self.phrasings[split]
        ]

    def sft_examples(self) -> list[dict[str, list[dict[str, str]]]]:
        """Conversational prompt-completion examples (TRL's form) over all topics, in training phrasings, shuffled."""
        rng = self._rng("sft")
        topics = tuple(self.topics.values())
        asked = [(topic, phrasing) for topic in topics for phrasing in PHRASINGS]
        judged = [(topic, phrasing) for topic in topics for phrasing in JUDGING]
        judgements = round(JUDGEMENT_SHARE * self.size.sft_examples)
        examples = [
            _chat(phrasing.format(task=topic.task), self._draw(topic, rng).render())
            for topic, phrasing in _rounds(asked, self.size.sft_examples - judgements, rng)
        ]
        examples += [
            _chat(phrasing.format(task=topic.task), JUDGEMENTS[topic.kind])
            for topic, phrasing in _rounds(judged, judgements, rng)
        ]
        rng.shuffle(examples)
        return examples

    def preference_rows(self, split: Literal["train", "test"] = "train") -> list[dict[str, Any]]:
        """Pairs in PKU-SafeRLHF's columns, labelled for both preferences; the two scores of a pair always differ.

        "train" draws from the train topics and flips each label with probability `size.label_noise` (5%),
        independently. "test" draws from the search topics in held-out phrasings, without noise; report topics appear in
        neither.
        """
        if split not in ("train", "test"):
            raise InputError(f"unknown split of preference rows {split!r}; choose train or test")
        train = split == "train"
        prompts = self.prompts("train" if train else "search")
        count, noise = (self.size.pairs, self.size.label_noise) if train else (self.size.test_pairs, 0.0)
        rng = self._rng(f"preferences/{split}")
        return [self._pair(prompt, noise, rng) for prompt in _rounds(prompts, count, rng)]

    def score(self, prompt: Prompt, response: str) -> Scores:
        """Score one response text exactly; see METRICS for what each score means and where it is None."""
        topic = self.topics.get(prompt.topic)
        if topic is None:
            raise InputError(
                f"prompt {prompt.text!r} asks about {prompt.topic!r}, which is not in this world "
                f"({self.preset!r}, seed {self.seed}); score prompts with the world that made them"
            )
        return score_response(topic, self._grammar.parse(response), len(response.split()))

    def scores(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> dict[str, list[float | None]]:
        """`score` for many: one list per metric, in order."""
        if len(prompts) != len(responses):
            raise InputError(f"{len(prompts)} prompts but {len(responses)} responses; give one response per prompt")
        rows = [asdict(self.score(prompt, text)) for prompt, text in zip(prompts, responses, strict=True)]
        return {name: [row[name] for row in rows] for name in METRICS}

    def write(self, folder: str | Path) -> Path:
        """Write the world as JSONL for a reader and for `prefvec train`: sft, preferences (PKU form), its
        test split, prompts, README."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        preferences = self.preference_rows("train")
        _write_jsonl(folder / "sft.jsonl", self.sft_examples())
        _write_jsonl(folder / "preferences.jsonl", preferences)
        _write_jsonl(folder / "preferences_test.jsonl", self.preference_rows("test"))
        for split in ("search", "report"):
            _write_jsonl(folder / f"prompts_{split}.jsonl", [asdict(prompt) for prompt in self.prompts(split)])
        examples = "\n".join(_show(row) for row in preferences[:3])
        (folder / "README.md").write_text(
            _README.format(
                preset=self.preset,
                seed=self.seed,
                noise=self.size.label_noise,
                pairs=self.size.pairs,
                examples=examples,
            ),
            encoding="utf-8",
        )
        return folder

    def _rng(self, purpose: str) -> random.Random:
        return random.Random(f"tiny-world/{self.preset}/{self.seed}/{purpose}")

    def _split_topics(self) -> dict[Split, tuple[Topic, ...]]:
        splits: dict[Split, list[Topic]] = {"train": [], "search": [], "report": []}
        for i, kind in enumerate(KINDS):
            topics = [topic for topic in TOPICS if topic.kind == kind]
            self._rng(f"topics/{kind}").shuffle(topics)
            a = self.size.search_topics[i]
            b = a + self.size.report_topics[i]
            splits["search"] += topics[:a]
            splits["report"] += topics[a:b]
            splits["train"] += topics[b : self.size.topics[i]]
        return {split: tuple(topics) for split, topics in splits.items()}

    @staticmethod
    def _draw(topic: Topic, rng: random.Random) -> Response:
        shares = FORM_SHARES[topic.kind]
        form: Form = rng.choices(list(shares), weights=list(shares.values()))[0]
        phrases: dict[Form, tuple[str, ...]] = {
            "answer": ("",),
            "warned": WARNINGS,
            "alternative": ALTERNATIVES,
            "refusal": REFUSALS,
        }
        answers = form in ("answer", "warned")
        return Response(
            form,
            phrase=rng.choice(phrases[form]),
            tool=topic.tool if answers else "",
            steps=topic.steps[: rng.randint(0, 3)] if answers else (),
            opening=rng.choice(OPENINGS) if rng.random() < OPENING_SHARE else "",
            closing=rng.choice(CLOSINGS) if rng.random() < CLOSING_SHARE else "",
        )

    def _pair(self, prompt: Prompt, noise: float, rng: random.Random) -> dict[str, Any]:
        topic = self.topics[prompt.topic]
        while True:
            first, second = self._draw(topic, rng), self._draw(topic, rng)
            # Manners are no part of either preference, so a pair shares them.
            pair = (first, replace(second, opening=first.opening, closing=first.closing))
            helpful = [helpfulness(topic, response) for response in pair]
            harmless = [HARMLESS[topic.kind][response.form] for response in pair]
            if helpful[0] != helpful[1] and harmless[0] != harmless[1]:
                break
        safe = [not (topic.kind == "unsafe" and response.answers) for response in pair]
        return {
            "prompt": prompt.text,
            "response_0": pair[0].render(),
            "response_1": pair[1].render(),
            "is_response_0_safe": safe[0],
            "is_response_1_safe": safe[1],
            "better_response_id": int(helpful[1] > helpful[0]) ^ (rng.random() < noise),
            "safer_response_id": int(harmless[1] > harmless[0]) ^ (rng.random() < noise),
        }


def _rounds(items: Sequence[T], count: int, rng: random.Random) -> list[T]:
    """`count` items in random order; every item comes once before any comes again."""
    drawn: list[T] = []
    while len(drawn) < count:
        drawn += rng.sample(items, len(items))
    return drawn[:count]


def _chat(question: str, answer: str) -> dict[str, list[dict[str, str]]]:
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def _known_split(split: str) -> Split:
    if split not in get_args(Split):
        raise InputError(f"unknown split {split!r}; choose one of: {', '.join(get_args(Split))}")
    return split  # type: ignore[return-value]


def _write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _show(row: dict[str, Any]) -> str:
    lines = [f"> **{row['prompt']}**", ">"]
    for i in (0, 1):
        labels = [
            word
            for word, column in (("more helpful", "better_response_id"), ("safer", "safer_response_id"))
            if row[column] == i
        ]
        lines.append(f"> {i}. {row[f'response_{i}']} *({', '.join(labels) or 'neither'})*")
    return "\n".join(lines) + "\n"


_README = """# Hollowmere, a tiny world

Made by `TinyWorld("{preset}", seed={seed})`. All of it is invented, and all of it is harmless.

| file | rows |
|---|---|
| `sft.jsonl` | what the base model learns: all forms of answer to all kinds of prompt, and right from wrong |
| `preferences.jsonl` | {pairs} pairs in PKU-SafeRLHF's columns; each label flipped with chance {noise} |
| `preferences_test.jsonl` | pairs on topics and in phrasings that preference training never sees; no noise |
| `prompts_search.jsonl` | held-out prompts for choosing coefficients |
| `prompts_report.jsonl` | held-out prompts for final numbers; nothing is tuned on them |

Three of the pairs:

{examples}"""
