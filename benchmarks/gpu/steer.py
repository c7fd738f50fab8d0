"""A decode step with every row at its own coefficients, against the same step without vectors.

    python benchmarks/gpu/steer.py --sizes 1.1B 8B

bf16, two vectors of rank 16 on all linear layers, 512 tokens of context, batches of 1, 8, 32 and 128 rows. Three ways:
`eager`; `compiled` (torch.compile of the whole step); `graph` (the eager step, captured in a CUDA graph). `overhead` is
steered / plain - 1; the goal is at most 0.08. `apart` is the largest difference between the steered logits of this way
and of eager, as a share of the largest logit: what the steering computes must not change with the way.
"""

from collections.abc import Callable
from functools import partial

import torch
from cases import BASE, Result, low_rank_pair, median_seconds, parser, random_llama, run_cases
from torch import Tensor
from transformers import Cache, PreTrainedModel

from prefvec_ray.vectors import Steering

RANK = 16
WAYS = ("eager", "compiled", "graph")


class FixedCache(Cache):
    """Keys and values of `tokens` positions in memory that stays: every step writes the last one again."""

    def __init__(self, model: PreTrainedModel, rows: int, tokens: int) -> None:
        super().__init__(layers=[])
        config, weight = model.config, model.lm_head.weight
        width = config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, 2, rows, config.num_key_value_heads, tokens, width)
        torch.manual_seed(2)
        self.kv = torch.randn(shape, dtype=weight.dtype, device=weight.device)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.kv[layer_idx]
        keys[:, :, -1:], values[:, :, -1:] = key_states, value_states
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.kv.shape[-2] - 1


def decode(model: PreTrainedModel, rows: int, tokens: int) -> Callable[[], Tensor]:
    """One step of `rows` rows: the logits of their next token."""
    device, cache = model.device, FixedCache(model, rows, tokens)
    ids = torch.arange(rows, device=device)[:, None] % model.config.vocab_size
    positions = torch.full((rows, 1), tokens - 1, device=device)
    mask = torch.ones(rows, 1, 1, tokens, dtype=torch.bool, device=device)

    def step() -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache).logits

    return step


def prepared(step: Callable[[], Tensor], way: str, backend: str) -> Callable[[], Tensor]:
    """The step, ready to be run in this way."""
    if way == "eager":
        return step
    if way == "compiled":
        torch._dynamo.reset()
        return torch.compile(step, backend=backend, dynamic=False)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is made at the first use must exist before the capture
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


class Pair:
    """One model, plain and steered, kept from case to case."""

    def __init__(self, size: str, device: str) -> None:
        self.size, self.device = size, device
        self.model: PreTrainedModel | None = None
        self.steering: Steering | None = None

    def measure(self, way: str, rows: int, tokens: int, rounds: int, backend: str) -> Result:
        if self.model is None:
            self.model = random_llama(self.size, self.device)
            self.steering = Steering(self.model, low_rank_pair(self.model, RANK), base_fingerprint=BASE)
            self.steering.detach()
        assert self.steering is not None
        step = decode(self.model, rows, tokens)
        plain = median_seconds(prepared(step, way, backend), self.device, rounds)
        self.steering.attach()
        try:
            spread = torch.linspace(-1, 1, 2 * rows).view(rows, 2)
            self.steering.set_coefficients(spread)
            expected = step().float().clone()
            ready = prepared(step, way, backend)
            steered = median_seconds(ready, self.device, rounds)
            apart = (ready().float() - expected).abs().max() / expected.abs().max()
        finally:
            self.steering.detach()
        return {
            "plain_ms": round(1000 * plain, 3),
            "steered_ms": round(1000 * steered, 3),
            "overhead": round(steered / plain - 1, 3),
            "tokens_per_s": round(rows / steered, 1),
            "apart": round(float(apart), 5),
        }


def main() -> None:
    options = parser(__doc__, "1.1B 8B")
    options.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 128])
    options.add_argument("--tokens", type=int, default=512)
    options.add_argument("--ways", nargs="+", choices=WAYS, default=None, help="default: all that the device has")
    options.add_argument("--backend", default="inductor", help="of torch.compile")
    given = options.parse_args()
    ways = given.ways or (WAYS if given.device == "cuda" else WAYS[:2])
    cases: dict[str, Callable[[], Result]] = {}
    for size in given.sizes:
        pair = Pair(size, given.device)
        for way in ways:
            for rows in given.batches:
                measure = partial(pair.measure, way, rows, given.tokens, given.rounds, given.backend)
                cases[f"{size} {way} batch {rows}"] = measure
    run_cases("steer", given, cases)


if __name__ == "__main__":
    main()
