"""DPO steps over a large vocabulary: log-probs of the answers in tiles of tokens, against all logits at once.

    python benchmarks/gpu/dpo.py --sizes 110M 1.1B

bf16 weights, AdamW on all of them, gradient checkpointing, half of each conversation is the answer; the reference's
log-probs, which the package computes once beforehand, are 0. `tiles` is the principle of TRL's fused head, which
the package trains with, in plain torch: the head is applied to so many answer tokens at once, and again on the way
back. TRL itself is not needed here, and not measured. `loss` must agree between the two ways.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
from cases import Result, parser, random_llama, run_cases
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

BETA, TILE = 0.1, 1024


def log_probs(hidden_TD: Tensor, head_VD: Tensor, ids_T: Tensor) -> Tensor:
    """log p of each token, (T,), in fp32."""
    logits_TV = (hidden_TD @ head_VD.T).float()
    return logits_TV.gather(1, ids_T[:, None])[:, 0] - logits_TV.logsumexp(1)


def answers(model: PreTrainedModel, ids_BL: Tensor, way: str) -> Tensor:
    """The log-prob of the second half of every row, (B,)."""
    first = ids_BL.shape[1] // 2
    hidden_BLD = model.model(input_ids=ids_BL, use_cache=False).last_hidden_state
    head, targets = model.lm_head.weight, ids_BL[:, first:]
    if way == "logits":
        logps_BL = log_probs(hidden_BLD[:, :-1].flatten(0, 1), head, ids_BL[:, 1:].flatten())
        return logps_BL.view(len(ids_BL), -1)[:, first - 1 :].sum(1)
    hidden_TD, flat_T = hidden_BLD[:, first - 1 : -1].flatten(0, 1), targets.flatten()
    tiles = zip(hidden_TD.split(TILE), flat_T.split(TILE), strict=True)
    parts = [checkpoint(log_probs, hidden, head, ids, use_reentrant=False) for hidden, ids in tiles]
    return torch.cat(parts).view(len(ids_BL), -1).sum(1)


def measure(way: str, size: str, device: str, pairs: int, length: int, rounds: int) -> Result:
    """Seconds of a step, tokens of it, and the most memory above that of the weights and their optimizer."""
    model = random_llama(size, device).requires_grad_(True).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device == "cuda")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (2 * pairs, length), generator=generator).to(device)
    seconds, losses, resting = [], [], 0
    for step in range(rounds + 1):  # the first makes the optimizer's state
        if device == "cuda" and step == 1:
            resting = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        chosen, rejected = answers(model, ids, way).chunk(2)
        loss = -logsigmoid(BETA * (chosen - rejected)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    median = sorted(seconds[1:])[len(seconds[1:]) // 2]
    peak = torch.cuda.max_memory_allocated() - resting if device == "cuda" else None
    return {
        "step_s": round(median, 4),
        "tokens_per_s": round(ids.numel() / median, 1),
        "peak_bytes_above_rest": peak,
        "loss": round(losses[0], 4),
        "pairs": pairs,
        "length": length,
        "vocabulary": model.config.vocab_size,
    }


def main() -> None:
    options = parser(__doc__, "110M 1.1B")
    options.add_argument("--pairs", nargs="+", type=int, default=[4, 16])
    options.add_argument("--length", type=int, default=1024)
    options.set_defaults(rounds=5)
    given = options.parse_args()
    cases: dict[str, Callable[[], Result]] = {
        f"{size} {way} pairs {pairs}": partial(measure, way, size, given.device, pairs, given.length, given.rounds)
        for size in given.sizes
        for pairs in given.pairs
        for way in ("tiles", "logits")
    }
    run_cases("dpo", given, cases)


if __name__ == "__main__":
    main()
