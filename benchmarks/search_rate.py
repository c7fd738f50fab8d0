"""Settings measured a minute by one process with one thread, in the ways that there are to generate their answers.

Part of `make bench-search`; alone:

    python benchmarks/search_rate.py bench-results/search-tiny

`generate`: the vectors merged, then transformers' `model.generate`. `one by one`: merged, then
`evaluation.sample_ids`, as a search measures. `one batch`: rows of all settings together, steered, as `evaluate_many`
does. `slot engine`: the endpoint's engine, merged, the rows of one setting at a time. Answers are generated and turned
into text; scoring costs the same in each and is left out. Seconds are CPU seconds; the ways take turns; medians of the
rounds. Sampled answers of `generate` and of the engine differ by chance from the others', so what is compared is time a
token. The last line is JSON.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from search_world import build
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from prefvec_ray.evaluation import Sampling
from prefvec_ray.evaluation.generate import BATCH_SIZE, encode, sample_ids
from prefvec_ray.serving.engines.base import OutputDelta, Request
from prefvec_ray.serving.engines.sampling_params import SamplingParams
from prefvec_ray.serving.engines.slots.engine import SlotEngine
from prefvec_ray.serving.engines.slots.weights import MergedWeights
from prefvec_ray.tiny_world import TinyWorld
from prefvec_ray.vectors import LiveModel, PreferenceVector, Steering, fingerprint, load_vector, to_low_rank

SETTINGS = 8
ROUNDS = 5
Setting = Mapping[str, float]
Answers = list[list[list[int]]]
"""Token ids by prompt and sample."""


class Ways:
    """One model, and how the answers of some settings can be generated with it. Each way returns them by setting."""

    def __init__(self, base: Path, vectors: Mapping[str, PreferenceVector], prompts: Sequence[str]) -> None:
        self.vectors, self.fingerprint = vectors, fingerprint(base)
        self.model = AutoModelForCausalLM.from_pretrained(base).eval()
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base)
        self.live = LiveModel(self.model, vectors, base_fingerprint=self.fingerprint, threads=1)
        self.prompts = encode(self.tokenizer, [[{"role": "user", "content": text}] for text in prompts])

    def generate(self, settings: Sequence[Setting], sampling: Sampling) -> list[Answers]:
        return [self._generate(setting, sampling) for setting in settings]

    def one_by_one(self, settings: Sequence[Setting], sampling: Sampling) -> list[Answers]:
        found = []
        for setting in settings:
            self.live.set_coefficients(setting)
            found.append(sample_ids(self.model, self.tokenizer, self.prompts, sampling))
        return found

    def one_batch(self, settings: Sequence[Setting], sampling: Sampling) -> list[Answers]:
        self.live.set_coefficients({})
        many = len(self.prompts)
        with Steering(self.model, self.vectors, base_fingerprint=self.fingerprint) as steering:
            etas = torch.tensor([[setting[name] for name in steering.names] for setting in settings])
            found = sample_ids(
                self.model,
                self.tokenizer,
                self.prompts,
                sampling,
                copies=len(settings),
                steer=lambda places: steering.set_coefficients(etas[places // many]),
            )
        return [found[i : i + many] for i in range(0, len(found), many)]

    def slot_engine(self, settings: Sequence[Setting], sampling: Sampling) -> list[Answers]:
        engine = SlotEngine(MergedWeights(self.live), self.tokenizer, max_batch=BATCH_SIZE)
        found: list[Answers] = []
        params = SamplingParams(
            max_tokens=sampling.max_new_tokens, temperature=sampling.temperature, seed=sampling.seed
        )
        for setting in settings:
            answers: Answers = [[[] for _ in range(sampling.samples_per_prompt)] for _ in self.prompts]
            coefficients = tuple(sorted(setting.items()))
            for number, prompt in enumerate(self.prompts):
                for choice, answer in enumerate(answers[number]):
                    request = Request(tuple(prompt), coefficients, params, number * len(answers[number]) + choice)
                    engine.submit(request, partial(_take, answer))
            while engine.step():
                pass
            found.append(answers)
        return found

    @torch.inference_mode()
    def _generate(self, setting: Setting, sampling: Sampling) -> Answers:
        self.live.set_coefficients(setting)
        batch = self.tokenizer.pad({"input_ids": self.prompts}, return_tensors="pt", padding_side="left")
        how: dict[str, Any] = {"do_sample": False}
        if sampling.temperature:
            how = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0}
        samples = sampling.samples_per_prompt
        most = sampling.max_new_tokens
        out = self.model.generate(**batch, **how, max_new_tokens=most, num_return_sequences=samples)
        rows = [
            [token for token in row if token != self.tokenizer.pad_token_id]
            for row in out[:, batch["input_ids"].shape[1] :].tolist()
        ]
        return [rows[i : i + samples] for i in range(0, len(rows), samples)]


def rates(base: Path, vectors: Mapping[str, Path], world: TinyWorld) -> dict[str, Any]:
    """For the trained tiny world at several numbers of answers: settings a minute by each way."""
    low = {name: to_low_rank(load_vector(folder), rank=8) for name, folder in list(vectors.items())[:2]}
    texts = [prompt.text for prompt in world.prompts("search")]
    found = {}
    for prompts, samples in ((16, 1), (64, 1), (64, 4)):
        name = f"{prompts * samples} answers a setting"
        found[name] = _compare(Ways(base, low, texts[:prompts]), Sampling(samples_per_prompt=samples))
        print(f"  {name}: {found[name]}", flush=True)
    return found


def _compare(ways: Ways, sampling: Sampling) -> dict[str, float]:
    settings = _settings(list(ways.vectors))
    each: dict[str, Callable[[Sequence[Setting], Sampling], list[Answers]]] = {
        "generate": ways.generate,
        "one by one": ways.one_by_one,
        "one batch": ways.one_batch,
        "slot engine": ways.slot_engine,
    }
    greedy = sampling.model_copy(update={"temperature": 0.0, "samples_per_prompt": 1})
    first, *others = [way(settings[:2], greedy) for way in each.values()]
    if any(other != first for other in others):
        raise AssertionError("greedy answers differ between the ways")
    seconds: dict[str, list[float]] = {name: [] for name in each}
    tokens: dict[str, int] = {}
    for _ in range(ROUNDS):
        for name, way in each.items():
            began = time.process_time()
            answers = way(settings, sampling)
            for rows in answers:
                ways.tokenizer.batch_decode([row for samples in rows for row in samples], skip_special_tokens=True)
            seconds[name].append(time.process_time() - began)
            tokens[name] = sum(len(answer) for rows in answers for samples in rows for answer in samples)
    wanted = tokens["one by one"]
    return {
        name: round(60 * len(settings) / statistics.median(values) * tokens[name] / wanted, 1)
        for name, values in seconds.items()
    }


def _settings(names: Sequence[str]) -> list[dict[str, float]]:
    rows = torch.quasirandom.SobolEngine(len(names), scramble=True, seed=0).draw(SETTINGS).tolist()
    return [{name: round(2 * u - 1, 2) for name, u in zip(names, row, strict=True)} for row in rows]


def _take(answer: list[int], output: OutputDelta | Exception) -> None:
    if isinstance(output, Exception):
        raise output
    answer.extend(output.tokens)


if __name__ == "__main__":
    torch.set_num_threads(1)
    made = build("tiny", Path(sys.argv[1]), Console())
    print(json.dumps(rates(*made, TinyWorld("tiny"))))
