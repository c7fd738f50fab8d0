"""The slot engine at many settings at once, against the same engine without vectors.

    python benchmarks/gpu/engine.py --sizes 1.1B

bf16; requests with prompts of 8 to 199 tokens and answers of 16 to 127, greedy, all submitted at once. `plain` ignores
coefficients, `steered` has every request at its own, `merged` rewrites the weights between 4 settings.
"""

import random
import time
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from cases import (
    BASE,
    Result,
    low_rank_pair,
    parser,
    random_llama,
    run_cases,
    without_front_door,
)
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

without_front_door("prefvec_ray.serving")
from prefvec_ray.serving.engines.base import Coefficients, Request
from prefvec_ray.serving.engines.sampling_params import SamplingParams
from prefvec_ray.serving.engines.slots.engine import SlotEngine
from prefvec_ray.serving.engines.slots.weights import MergedWeights, SteeredWeights
from prefvec_ray.vectors import LiveModel, Steering


class Plain(MergedWeights):
    """The base model, whatever the requests say."""

    def group(self, coefficients: Coefficients) -> Hashable:
        return None

    def apply(self, rows: Sequence[Coefficients]) -> None:
        pass


def requests(count: int, settings: int) -> list[Request]:
    draw = random.Random(0)
    made = []
    for i in range(count):
        prompt = tuple(draw.randrange(1000) for _ in range(draw.randrange(8, 200)))
        eta = 2 * (i % settings) / max(1, settings - 1) - 1
        sampling = SamplingParams(max_tokens=draw.randrange(16, 128), temperature=0.0)
        made.append(Request(prompt, (("harmless", eta), ("helpful", 0.5)), sampling))
    return made


def measure(way: str, size: str, device: str, rows: int, rounds: int) -> Result:
    """Tokens a second, over all requests from the first submission to the last token; the best of the rounds."""
    model = random_llama(size, device)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(model.config.vocab_size)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    vectors = low_rank_pair(model, 16)
    if way == "steered":
        backend: Any = SteeredWeights(Steering(model, vectors, base_fingerprint=BASE))
    else:
        backend = (Plain if way == "plain" else MergedWeights)(LiveModel(model, vectors, base_fingerprint=BASE))
    engine = SlotEngine(backend, tokenizer, max_batch=rows)
    best, settings = 0.0, 4 if way == "merged" else rows
    for _ in range(max(2, rounds)):  # the first one pays for everything that is made once
        asked = requests(2 * rows, settings)
        pieces: list[Any] = []
        start = time.perf_counter()
        for request in asked:
            engine.submit(request, pieces.append)
        while engine.step():
            pass
        if device == "cuda":
            torch.cuda.synchronize()
        tokens = sum(len(piece.tokens) for piece in pieces)
        best = max(best, tokens / (time.perf_counter() - start))
    return {"tokens_per_s": round(best, 1), "tokens": tokens, "requests": 2 * rows, "rows": rows, "settings": settings}


def main() -> None:
    options = parser(__doc__, "1.1B")
    options.add_argument("--batches", nargs="+", type=int, default=[8, 32, 128])
    options.set_defaults(rounds=3)
    given = options.parse_args()
    cases: dict[str, Callable[[], Result]] = {
        f"{size} {way} rows {rows}": partial(measure, way, size, given.device, rows, given.rounds)
        for size in given.sizes
        for rows in given.batches
        for way in ("plain", "steered", "merged")
    }
    run_cases("engine", given, cases)


if __name__ == "__main__":
    main()
