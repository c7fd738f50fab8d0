"""Measures that need the model itself: KL from the base and the base's perplexity of the sampled answers, and
DPO's implicit margins on held-out pairs, which need no answers at all.

`use(coefficients)` puts the model at a setting: `LiveModel.set_coefficients`, or `Steering`'s.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefvec_ray.artifacts.evaluation import Metric
from prefvec_ray.common.errors import InputError, JobError
from prefvec_ray.evaluation.generate import encode

Use = Callable[[Mapping[str, float]], None]

MEASURES: dict[str, Metric] = {
    "kl": Metric(
        direction="minimize", low=0, meaning="nats an answer by which the setting has moved away from the base model"
    ),
    "perplexity": Metric(
        direction="minimize", low=1, meaning="how surprised the base model is by a token of the answer"
    ),
}
"""Measures of sampled answers, by name."""

LOGITS = 2**27
"""Logits held at once, in fp32: half a GiB. """


class TokenPair(NamedTuple):
    """One held-out preference pair as token ids; the answers include their end token."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@torch.inference_mode()
def answer_measures(
    model: PreTrainedModel,
    use: Use,
    coefficients: Mapping[str, float],
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    *,
    measures: Sequence[str],
    temperature: float,
    logits: int = LOGITS,
) -> dict[str, list[float | None]]:
    """`MEASURES` of answers that were sampled from the model at `coefficients`, one value an answer.

    `kl` is KL(pi_eta || pi_base) of whole answers, both at the sampling temperature: for each answer the sum over its
    tokens of the exact KL between the two next-token distributions. Given that the answers were drawn from pi_eta, its
    mean is unbiased by the chain rule (for answers as long as sampled: one that was cut off counts up to the cut). It
    is the Rao-Blackwellized estimator of arXiv 2504.10637: never negative, and its error is below that of the mean
    log-ratio of the sampled tokens.

    `perplexity` is exp of the base's mean negative log-probability of the answer's tokens, end token included, at
    temperature 1.

    `logits` bounds what is held at once; more answers than that are measured in several rounds, each of two merges.
    Leaves the model at another setting. None for an answer without tokens.

    Raises:
        InputError: an unknown measure, or `kl` of greedy answers, where the policies are single points.
        JobError: a value is not finite: the model gives no finite logits, or the base no probability to a token.
    """
    check_measures(measures, temperature)
    found: dict[str, list[float | None]] = {name: [None] * len(answers) for name in measures}
    rows = [i for i, answer in enumerate(answers) if answer]
    width = int(model.config.vocab_size)
    for block in _blocks(rows, [len(answers[i]) for i in rows], logits // width):
        pairs = [(prompts[i], answers[i]) for i in block]
        policy: list[Tensor] = []
        if "kl" in measures:
            use(coefficients)
            policy = [_log_softmax(logits_TV, temperature) for logits_TV, _ in _answer_logits(model, pairs)]
        use({})
        for place, (logits_TV, answer_T) in enumerate(_answer_logits(model, pairs)):
            if "kl" in measures:
                p_TV, q_TV = policy[place], _log_softmax(logits_TV, temperature)
                terms_TV = torch.where(p_TV.isneginf(), 0.0, p_TV.exp() * (p_TV - q_TV))  # 0 log 0 = 0
                found["kl"][block[place]] = _finite("kl", terms_TV.sum(-1).clamp(min=0).double().sum())
            if "perplexity" in measures:
                logp_T = _log_softmax(logits_TV, 1.0).gather(-1, answer_T[:, None])
                found["perplexity"][block[place]] = _finite(
                    "perplexity", logp_T.double().mean().neg().exp().clamp(min=1)
                )
    return found


def _finite(name: str, value: Tensor) -> float:
    if not value.isfinite():
        raise JobError(f"{name} of an answer is {float(value)}: the model's logits or their ratio are not finite")
    return float(value)


def check_measures(measures: Sequence[str], temperature: float) -> None:
    """InputError for unknown measures, and for a KL of greedy answers."""
    for name in measures:
        if name not in MEASURES:
            raise InputError(f"unknown measure {name!r}; known: {', '.join(MEASURES)}")
    if "kl" in measures and temperature == 0:
        raise InputError("measure 'kl' needs a temperature above 0: greedy answers have no distribution to compare")


@torch.inference_mode()
def log_probs(model: PreTrainedModel, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> list[float]:
    """The summed log-probability of each answer after its prompt, in nats, at temperature 1."""
    found = [0.0] * len(answers)
    width = int(model.config.vocab_size)
    order = sorted(range(len(answers)), key=lambda i: len(prompts[i]) + len(answers[i]))
    for block in _blocks(order, [len(answers[i]) for i in order], LOGITS // width):
        pairs = [(prompts[i], answers[i]) for i in block]
        for place, (logits_TV, answer_T) in enumerate(_answer_logits(model, pairs)):
            logp_T = _log_softmax(logits_TV, 1.0).gather(-1, answer_T[:, None])
            found[block[place]] = float(logp_T.double().sum())
    return found


class Margins:
    """How a setting ranks held-out pairs, without generating: DPO's implicit reward (arXiv 2305.18290, section 4)
    without its beta,

        margin = [log pi_eta(chosen) - log pi_base(chosen)] - [log pi_eta(rejected) - log pi_base(rejected)],

    in nats, as metric `margin_<preference>`, and the share of pairs with a margin above 0 as `accuracy_<preference>`
    (a margin of exactly 0, as the base has, counts half). A value is the mean over the pairs of one prompt.

    The cheap fidelity of a search: one pass over fixed texts. It measures how probabilities moved, not the answers.
    """

    def __init__(self, model: PreTrainedModel, use: Use, pairs: Mapping[str, Sequence[TokenPair]]) -> None:
        empty = [name for name, rows in pairs.items() if not rows]
        if empty:
            raise InputError(f"no held-out pairs for {', '.join(empty)}; give at least one, or leave the name out")
        self.model, self.pairs = model, {name: list(rows) for name, rows in pairs.items()}
        use({})
        self._base = {name: self._log_ratio(name) for name in self.pairs}

    def measure(self) -> dict[str, list[float | None]]:
        """Metric -> one value a distinct prompt, of the model as it stands."""
        found: dict[str, list[float | None]] = {}
        for name, pairs in self.pairs.items():
            margins: dict[tuple[int, ...], list[float]] = defaultdict(list)
            for pair, now, before in zip(pairs, self._log_ratio(name), self._base[name], strict=True):
                margins[tuple(pair.prompt)].append(now - before)
            groups = list(margins.values())
            found[f"margin_{name}"] = [sum(group) / len(group) for group in groups]
            found[f"accuracy_{name}"] = [sum((m > 0) + 0.5 * (m == 0) for m in group) / len(group) for group in groups]
        return found

    def _log_ratio(self, name: str) -> list[float]:
        """log pi(chosen) - log pi(rejected) of every pair."""
        pairs = self.pairs[name]
        prompts = [pair.prompt for pair in pairs] * 2
        both = log_probs(self.model, prompts, [p.chosen for p in pairs] + [p.rejected for p in pairs])
        return [chosen - rejected for chosen, rejected in zip(both[: len(pairs)], both[len(pairs) :], strict=True)]


def margin_metrics(preferences: Iterable[str]) -> dict[str, Metric]:
    """The metrics of held-out pairs of these preferences."""
    found = {}
    for name in preferences:
        found[f"margin_{name}"] = Metric(
            direction="maximize", meaning=f"nats by which {name!r} pairs are ranked better than by the base"
        )
        found[f"accuracy_{name}"] = Metric(
            direction="maximize", low=0, high=1, meaning=f"share of held-out {name!r} pairs moved the right way"
        )
    return found


def token_pairs(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]], *, max_length: int | None = None
) -> list[TokenPair]:
    """Rows of prompt, chosen, rejected (texts, or lists of messages, as in `load_preferences`) as token ids, taken
    apart as TRL's DPOTrainer does it: an answer begins where its tokens leave those of the prompt. Tokens beyond
    `max_length` are cut off; pairs of which no answer token is left are left out.
    """
    prompts = encode(tokenizer, [row["prompt"] for row in rows])
    found = []
    for row, prompt in zip(rows, prompts, strict=True):
        if isinstance(row["prompt"], str):
            end = tokenizer.eos_token or ""
            wholes = [tokenizer(row["prompt"] + row[side] + end)["input_ids"] for side in ("chosen", "rejected")]
        else:
            talks = [[*row["prompt"], *row[side]] for side in ("chosen", "rejected")]
            wholes = [tokenizer.apply_chat_template(talk, return_dict=False) for talk in talks]
        shared = min(_shared(prompt, whole) for whole in wholes)
        found.append(TokenPair(prompt[:shared], *(whole[shared:] for whole in wholes)))
    return cut_pairs(found, max_length)


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first items are the same."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def cut_pairs(pairs: Iterable[TokenPair], max_length: int | None) -> list[TokenPair]:
    """The pairs with each prompt and answer cut to `max_length` tokens together, as TRL trains on them."""
    if max_length is None:
        return list(pairs)
    rooms = ((pair, max(0, max_length - len(pair.prompt))) for pair in pairs)
    cut = [TokenPair(pair.prompt, pair.chosen[:room], pair.rejected[:room]) for pair, room in rooms]
    return [pair for pair in cut if pair.chosen and pair.rejected]


def _answer_logits(
    model: PreTrainedModel, pairs: Sequence[tuple[list[int], list[int]]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each (prompt, answer) the logits that predict the answer's tokens, (T, V), and those tokens, (T,)."""
    step = max(1, LOGITS // (int(model.config.vocab_size) * (1 + max(len(answer) for _, answer in pairs))))
    device = model.device
    for start in range(0, len(pairs), step):
        some = pairs[start : start + step]
        whole = [prompt + answer for prompt, answer in some]
        width, longest = max(map(len, whole)), max(len(answer) for _, answer in some)
        ids_BL = torch.tensor([[0] * (width - len(ids)) + ids for ids in whole], device=device)
        mask_BL = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in whole], device=device)
        logits_BTV = model(
            input_ids=ids_BL,
            attention_mask=mask_BL,
            position_ids=(mask_BL.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=longest + 1,
        ).logits
        for logits_TV, (_, answer) in zip(logits_BTV, some, strict=True):
            yield logits_TV[-len(answer) - 1 : -1], torch.tensor(answer, device=device)


def _log_softmax(logits_TV: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits_TV.float() / temperature, -1)


def _blocks(rows: Sequence[int], sizes: Sequence[int], room: int) -> Iterator[list[int]]:
    """`rows` in order, in blocks whose sizes add up to at most `room`, and of one row at least."""
    block: list[int] = []
    used = 0
    for row, size in zip(rows, sizes, strict=True):
        if block and used + size > room:
            yield block
            block, used = [], 0
        block.append(row)
        used += size
    if block:
        yield block
