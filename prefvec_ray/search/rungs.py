"""A setting measured in parts: a cheap rung of few answers first, the rest only where it is still in question.

The rungs of a search are shares of all answers (prompts x samples per prompt), such as (0.25, 1). Every prompt is
answered once, in a seeded random order, before any is answered a second time: any part of it is a fair sample. Every
setting is measured on the same rungs with the same prompts and random numbers, so two settings are paired at each of
them. What a rung has measured is never measured again.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blake3 import blake3

from prefvec_ray.common.errors import InputError

if TYPE_CHECKING:
    from prefvec_ray.artifacts.evaluation import Evaluation
    from prefvec_ray.evaluation import Evaluator


@dataclass(frozen=True)
class Block:
    """`samples` answers to each of some prompts, sampled with `seed`."""

    prompts: tuple[int, ...]
    samples: int
    seed: int

    @property
    def answers(self) -> int:
        return len(self.prompts) * self.samples


def plan_rungs(prompts: int, samples: int, shares: Sequence[float], seed: int = 0) -> list[list[Block]]:
    """The blocks that each rung adds; together they are every prompt with `samples` answers.

    A share below one answer to all prompts is that share of the prompts with one answer; larger ones are rounded
    down to whole answers a prompt. Shares that come out equal are one rung.

    Raises:
        InputError: shares that do not rise, or that do not end at 1.
    """
    rising = all(a < b for a, b in itertools.pairwise(shares))
    if not shares or shares[0] <= 0 or shares[-1] != 1 or not rising:
        raise InputError(f"rungs {list(shares)}: expected rising shares of all answers that end at 1, such as 0.25, 1")
    if shares[0] == 1:
        return [[Block(tuple(range(prompts)), samples, seed)]]
    order = random.Random(seed).sample(range(prompts), prompts)
    rungs: list[list[Block]] = []
    asked, whole = 0, 0  # what earlier rungs have: prompts with one answer, and whole answers of all
    for share in shares:
        blocks = []
        depth = int(share * samples + 1e-9)
        if asked < prompts:
            wanted = prompts if depth >= 1 else max(1, round(share * samples * prompts))
            if wanted > asked:
                blocks.append(Block(tuple(sorted(order[asked:wanted])), 1, seed + asked))
                asked = wanted
            whole = int(asked == prompts)
        if depth > whole and asked == prompts:
            blocks.append(Block(tuple(range(prompts)), depth - whole, seed + prompts + whole))
            whole = depth
        if blocks:
            rungs.append(blocks)
    return rungs


class FidelitySchedule:
    """Measures settings rung by rung. `make(block, first)` builds the evaluator of a block."""

    def __init__(self, make: "Callable[[Block, bool], Evaluator]", rungs: Sequence[Sequence[Block]]) -> None:
        self.rungs = rungs
        self.evaluators = [make(block, i == 0) for i, block in enumerate(block for blocks in rungs for block in blocks)]
        self._prompts = 1 + max(i for blocks in rungs for block in blocks for i in block.prompts)
        # Metrics of pairs and of tasks, which have nothing to do with prompts, are the first block's alone.
        self._without_prompts = set(self.evaluators[0].metrics) - set(self.evaluators[-1].metrics)

    def evaluate_rungs(self, coefficients: Mapping[str, float]) -> "Iterator[Evaluation]":
        """What `coefficients` score after each rung; the work of a rung is done when its evaluation is asked for.

        Of a prompt that several blocks ask, the mean is weighted by their samples. The whole schedule as one rung gives
        what `Evaluator.evaluate` gives.
        """
        parts: list[tuple[Block, Evaluation]] = []
        evaluators = iter(self.evaluators)
        for blocks in self.rungs:
            parts += [(block, next(evaluators).evaluate(coefficients)) for block in blocks]
            yield parts[0][1] if len(self.evaluators) == 1 else _joined(parts, self._prompts, self._without_prompts)


def _joined(parts: "Sequence[tuple[Block, Evaluation]]", prompts: int, without_prompts: set[str]) -> "Evaluation":
    from prefvec_ray.common.estimates import estimate

    first = parts[0][1]
    per_prompt = {
        name: values
        if name in without_prompts
        else _over_blocks([(block, evaluation.per_prompt[name]) for block, evaluation in parts], prompts)
        for name, values in first.per_prompt.items()
    }
    return first.model_copy(
        update={
            "metrics": {name: estimate(values) for name, values in per_prompt.items()},
            "per_prompt": per_prompt,
            "prompts_digest": blake3("/".join(e.prompts_digest for _, e in parts).encode()).hexdigest()[:16],
            "seconds": sum(e.seconds for _, e in parts),
            "tokens": sum(e.tokens for _, e in parts),
        }
    )


def _over_blocks(columns: "Sequence[tuple[Block, list[float | None]]]", prompts: int) -> list[float | None]:
    total, weight = [0.0] * prompts, [0] * prompts
    for block, values in columns:
        for i, value in zip(block.prompts, values, strict=True):
            if value is not None:
                total[i] += block.samples * value
                weight[i] += block.samples
    return [t / w if w else None for t, w in zip(total, weight, strict=True)]
