"""Settings measured a minute by one process with one thread: re-merging for each, against many in flight in one engine.

Both ways generate the same number of answers of the same length at the same settings, and score them. Before that they
answer greedily, and must agree token for token. Part of `make bench-search`; alone:

    python benchmarks/search_rate.py bench-results/search-tiny
"""

import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from plain_sampling import sample_ids
from rich.console import Console
from search_world import build
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from prefvec_ray.common.chat import end_tokens
from prefvec_ray.evaluation import Evaluator, Sampling
from prefvec_ray.evaluation.generate import encode
from prefvec_ray.generation.offline import OfflineEngine
from prefvec_ray.generation.slots.weights import MergedWeights, SteeredWeights
from prefvec_ray.scorers import Scorer, TinyWorldScorer
from prefvec_ray.tiny_world import TinyWorld
from prefvec_ray.vectors import (
    LiveModel,
    LowRank,
    PreferenceVector,
    Steering,
    VectorInfo,
    fingerprint,
    load_vector,
    to_low_rank,
)

IN_FLIGHT = 8
SETTINGS = 16


@dataclass(frozen=True)
class Case:
    """A base, its vectors, and how much is asked of each setting."""

    base: Path
    vectors: Mapping[str, PreferenceVector]
    prompts: Sequence[Any]
    scorer: Scorer
    sampling: Sampling
    mode: str


def rates(base: Path, vectors: Mapping[str, Path], prompts: Sequence[Any], scorer: Scorer, out: Path) -> dict[str, Any]:
    """The medians of three rounds for the trained tiny world, and for a random Llama of 30M parameters."""
    full = {name: load_vector(folder) for name, folder in list(vectors.items())[:2]}
    low = {name: to_low_rank(vector, rank=8) for name, vector in full.items()}
    large = _random_llama(base, out / "llama-30m")
    factors = {name: _factors(large, seed) for seed, name in enumerate(full)}
    few, short = Sampling(samples_per_prompt=1), Sampling(samples_per_prompt=2, max_new_tokens=32)
    cases = {
        "tiny, full vectors, 256 answers": Case(base, full, prompts, scorer, Sampling(), "merged"),
        "tiny, rank 8, 256 answers": Case(base, low, prompts, scorer, Sampling(), "steered"),
        "tiny, rank 8, 16 answers": Case(base, low, prompts[:16], scorer, few, "steered"),
        "30M, rank 16, 16 answers": Case(large, factors, prompts[:8], scorer, short, "steered"),
    }
    found = {}
    for name, case in cases.items():
        found[name] = _compare(case)
        print(f"  {name}: {found[name]}", flush=True)
    return found


def _compare(case: Case, rounds: int = 3) -> dict[str, float]:
    settings = _settings(case.vectors)
    plain, engine = _plain(case), _engine(case)
    greedy = case.sampling.model_copy(update={"temperature": 0.0, "max_new_tokens": 16, "samples_per_prompt": 1})
    assert plain(settings[:3], greedy) == engine(settings[:3], greedy), "the answers differ"
    seconds: dict[str, list[float]] = {"plain": [], "engine": []}
    tokens = {}
    for _ in range(rounds):
        for name, way in (("plain", plain), ("engine", engine)):
            began = time.process_time()
            answers = way(settings, case.sampling)
            seconds[name].append(time.process_time() - began)
            tokens[name] = sum(len(answer) for rows in answers for row in rows for answer in row)
    a_minute = {name: 60 * len(settings) / statistics.median(values) for name, values in seconds.items()}
    # Sampled answers differ in length by chance; what is compared is time a token.
    a_minute["engine"] *= tokens["engine"] / tokens["plain"]
    ratio = a_minute["engine"] / a_minute["plain"]
    return {name: round(value, 2) for name, value in {**a_minute, "ratio": ratio}.items()}


Way = Callable[[Sequence[Mapping[str, float]], Sampling], list[list[list[list[int]]]]]


def _plain(case: Case) -> Way:
    model = AutoModelForCausalLM.from_pretrained(case.base).eval()
    tokenizer = AutoTokenizer.from_pretrained(case.base)
    live = LiveModel(model, case.vectors, base_fingerprint=fingerprint(case.base), threads=1)
    ids = encode(tokenizer, [[{"role": "user", "content": prompt.text}] for prompt in case.prompts])

    def measure(settings: Sequence[Mapping[str, float]], sampling: Sampling) -> list[list[list[list[int]]]]:
        found = []
        for setting in settings:
            live.set_coefficients(setting)
            answers = sample_ids(
                model,
                ids,
                samples=sampling.samples_per_prompt,
                temperature=sampling.temperature,
                max_new_tokens=sampling.max_new_tokens,
                ends=set(end_tokens(model.generation_config, tokenizer)),
            )
            texts = [text for rows in answers for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]
            case.scorer([prompt for prompt in case.prompts for _ in range(sampling.samples_per_prompt)], texts)
            found.append(answers)
        return found

    return measure


def _engine(case: Case) -> Way:
    model = AutoModelForCausalLM.from_pretrained(case.base).eval()
    tokenizer = AutoTokenizer.from_pretrained(case.base)
    base = fingerprint(case.base)
    steered = case.mode == "steered"
    engine = OfflineEngine.of(
        SteeredWeights(Steering(model, case.vectors, base_fingerprint=base))
        if steered
        else MergedWeights(LiveModel(model, case.vectors, base_fingerprint=base, threads=1)),
        tokenizer,
    )

    def measure(settings: Sequence[Mapping[str, float]], sampling: Sampling) -> list[list[list[list[int]]]]:
        evaluator = Evaluator(engine, tokenizer, case.prompts, case.scorer, sampling)

        def one(setting: Mapping[str, float]) -> list[list[list[int]]]:
            (answers,) = evaluator.generate([setting])
            evaluator.score(setting, answers)
            return answers

        with ThreadPoolExecutor(IN_FLIGHT) as threads:
            return list(threads.map(one, settings))

    return measure


def _settings(names: Mapping[str, object]) -> list[dict[str, float]]:
    draw = torch.quasirandom.SobolEngine(len(names), scramble=True, seed=0).draw(SETTINGS).tolist()
    return [{name: round(2 * u - 1, 2) for name, u in zip(names, row, strict=True)} for row in draw]


def _random_llama(like: Path, folder: Path) -> Path:
    """30M parameters, with the tokenizer of `like`."""
    torch.manual_seed(0)
    sizes = LlamaConfig.from_pretrained(like)
    sizes.update(
        {
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 9,
            "head_dim": 64,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "initializer_range": 0.1,
        }
    )
    LlamaForCausalLM(sizes).save_pretrained(folder)
    for pattern in ("*token*", "chat_template*"):
        for file in like.glob(pattern):
            shutil.copy(file, folder)
    return folder


def _factors(base: Path, seed: int) -> PreferenceVector:
    """Rank 16 in every linear layer."""
    draw = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    entries = {
        name: LowRank(
            torch.randn(16, weight.shape[1], generator=draw) * 0.02,
            torch.randn(weight.shape[0], 16, generator=draw) * 0.02,
        )
        for name, weight in model.named_parameters()
        if name.endswith("proj.weight")
    }
    info = VectorInfo(preference=f"p{seed}", form="low-rank", dtype="float32", base_fingerprint=fingerprint(base))
    return PreferenceVector(info, entries)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, world = Path(sys.argv[1]), TinyWorld("tiny")
    made = build("tiny", folder, Console())
    print(json.dumps(rates(*made, world.prompts("search"), TinyWorldScorer(world), folder)))
