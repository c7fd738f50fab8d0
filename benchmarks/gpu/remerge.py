"""Rewriting a live model's weights to other coefficients, against a device copy and against chains of torch.add.

    python benchmarks/gpu/remerge.py --sizes 1.1B 8B

GB/s count useful bytes: the base and every vector are read once, the weights are written once. The goal is 0.8 of what
a plain device-to-device copy of the weights moves (which reads and writes them once each). `torch_add` is the usual
way: for every tensor, base + eta_1 phi_1, then + eta_2 phi_2 in bf16.
"""

import gc
from collections.abc import Callable
from functools import partial

import torch
from cases import BASE, Result, information, low_rank_pair, median_seconds, parser, random_llama, run_cases
from torch import Tensor

from prefvec_ray.vectors import LiveModel, PreferenceVector, checkpoint_state
from prefvec_ray.vectors.entries import Full


def full_vectors(state: dict[str, Tensor], count: int) -> dict[str, PreferenceVector]:
    """Dense vectors of all parameters. Their numbers lie in one block on the CPU, from where the model takes copies."""
    largest = max(tensor.numel() for tensor in state.values())
    torch.manual_seed(1)
    block = torch.randn(min(largest, 1 << 22)).mul_(1e-3).bfloat16().repeat(-(-largest // (1 << 22)))[:largest]
    vectors = {}
    for index in range(count):
        entries = {name: Full(block[: tensor.numel()].view(tensor.shape)) for name, tensor in state.items()}
        vectors[f"p{index}"] = PreferenceVector(information(f"p{index}", "full"), entries)
    return vectors


def copied(size: str, device: str, rounds: int) -> Result:
    """The limit: the weights, copied on the device."""
    n = sum(tensor.numel() for tensor in checkpoint_state(random_llama(size, device)).values())
    source, target = (torch.ones(n, dtype=torch.bfloat16, device=device) for _ in range(2))
    seconds = median_seconds(lambda: target.copy_(source), device, rounds)
    return {"ms": round(1000 * seconds, 3), "gb_per_s": round(2 * 2 * n / seconds / 1e9, 1)}


def added(size: str, device: str, rounds: int, count: int) -> Result:
    """torch.add, tensor by tensor."""
    out = list(checkpoint_state(random_llama(size, device)).values())
    base = [tensor.clone() for tensor in out]
    phis = [[torch.full_like(tensor, 1e-3) for tensor in out] for _ in range(count)]

    def chain() -> None:
        for i, tensor in enumerate(out):
            torch.add(base[i], phis[0][i], alpha=0.7, out=tensor)
            for phi in phis[1:]:
                tensor.add_(phi[i], alpha=0.7)

    seconds = median_seconds(chain, device, rounds)
    return rated(seconds, sum(tensor.numel() for tensor in out), count)


def remerged(size: str, device: str, rounds: int, count: int) -> Result:
    """`LiveModel.set_coefficients` with dense vectors."""
    model = random_llama(size, device)
    n = sum(tensor.numel() for tensor in checkpoint_state(model).values())
    live = LiveModel(model, full_vectors(checkpoint_state(model), count), base_fingerprint=BASE)
    return rated(median_seconds(turns(live), device, rounds), n, count)


def low_rank(size: str, device: str, rounds: int, rank: int) -> Result:
    """The same with two low-rank vectors, which are multiplied out on the way: bytes of base and weights alone."""
    model = random_llama(size, device)
    vectors = low_rank_pair(model, rank)
    state = checkpoint_state(model)
    n = sum(state[name].numel() for name in next(iter(vectors.values())).names())
    live = LiveModel(model, vectors, base_fingerprint=BASE)
    return rated(median_seconds(turns(live), device, rounds), n, 0)


def turns(live: LiveModel) -> Callable[[], None]:
    """Each call sets other coefficients than the one before."""
    settings = [dict.fromkeys(live.vectors, 0.7), dict.fromkeys(live.vectors, -0.3)]

    def turn() -> None:
        settings.reverse()
        live.set_coefficients(settings[0])

    return turn


def rated(seconds: float, n: int, count: int) -> Result:
    return {"ms": round(1000 * seconds, 3), "gb_per_s": round(2 * (2 + count) * n / seconds / 1e9, 1), "parameters": n}


def freed(case: Callable[[], Result]) -> Result:
    gc.collect()
    return case()


def main() -> None:
    given = parser(__doc__, "1.1B 8B").parse_args()
    cases: dict[str, Callable[[], Result]] = {}
    for size in given.sizes:
        common = (size, given.device, given.rounds)
        cases[f"{size} copy"] = partial(freed, partial(copied, *common))
        for count in (1, 2):
            cases[f"{size} torch_add k={count}"] = partial(freed, partial(added, *common, count))
            cases[f"{size} remerge k={count}"] = partial(freed, partial(remerged, *common, count))
        cases[f"{size} remerge rank 16 k=2"] = partial(freed, partial(low_rank, *common, 16))
    run_cases("remerge", given, cases)


if __name__ == "__main__":
    main()
