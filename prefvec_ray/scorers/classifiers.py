"""Hugging Face sequence classifiers as scorers: reward models, cost models, and the probability of chosen labels.

A folder may carry `scorer.json` (`ScorerFile`), which states what the model measures, and `audit.json`, the card of a
robustness audit. Weights are read from safetensors alone: a pickle can run code.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from blake3 import blake3
from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from prefvec_ray.artifacts.evaluation import Direction, Metric
from prefvec_ray.common.device import best_device
from prefvec_ray.common.errors import InputError
from prefvec_ray.common.files import read_json
from prefvec_ray.common.paths import check_visible
from prefvec_ray.common.pretrained import from_pretrained, position_room
from prefvec_ray.scorers.base import Scores, content_digest
from prefvec_ray.scorers.prompts import prompt_messages, prompt_text

Encoding = Literal["chat", "pair", "response"]
"""How prompt and answer reach the model: through the tokenizer's chat template, as a pair of texts, or the answer
alone."""

SCORER_FILE, AUDIT_FILE = "scorer.json", "audit.json"
VERDICTS = ("pass", "fail", "inconclusive")
INPUT_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.txt")


class ScorerFile(BaseModel):
    """`scorer.json`: what the classifier in this folder measures. Further fields record where it comes from."""

    model_config = ConfigDict(frozen=True, extra="allow")

    kind: Literal["reward-model", "cost-model", "classifier"]
    metric: str
    direction: Direction
    encoding: Encoding
    labels: tuple[str, ...] | None = None
    """Of a classifier: the labels whose probability is the score. None for a model with a single output."""
    safety: bool = False
    max_length: int | None = None


class ClassifierScorer:
    """Scores answers with the sequence classifier `model`, a folder or a name on the Hugging Face hub.

    One output: its raw value, unbounded. Several: the summed probability of `labels`, in [0, 1]. Everything left out
    is read from `scorer.json`; what that file states about direction, encoding and labels cannot be overruled.

    A text of more than `max_length` tokens (default: what tokenizer and model allow) loses its beginning, so that the
    answer is kept; `notes()` counts them. The model is loaded at the first call, in the process that scores;
    scores then depend on nothing but model, prompt and answer, up to the last bits that padding moves.

    Raises:
        InputError: no such folder; no safetensors; not a sequence classifier; something needed that neither the
            arguments nor `scorer.json` state, or that they state differently; an unknown label.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        metric: str | None = None,
        direction: Direction | None = None,
        labels: Sequence[str] | None = None,
        encoding: Encoding | None = None,
        safety: bool | None = None,
        max_length: int | None = None,
        batch_size: int = 32,
        device: str | None = None,
    ) -> None:
        self.folder = classifier_folder(model)
        config = from_pretrained(AutoConfig, self.folder, what="scorer")
        stated = read_scorer_file(self.folder)
        self._names = [str(config.id2label[i]) for i in range(config.num_labels)]
        self._sigmoid = config.problem_type == "multi_label_classification"
        self.labels = self._agree("labels", tuple(labels) if labels else None, stated and stated.labels)
        self.encoding: Encoding = self._needed(
            "encoding", self._agree("encoding", encoding, stated and stated.encoding)
        )
        way: Direction = self._needed("direction", self._agree("direction", direction, stated and stated.direction))
        name: str = self._needed("metric", metric or (stated and stated.metric))
        self._max_length = max_length or (stated.max_length if stated else None)
        self._check_labels()
        single = self.labels is None
        self.metrics: Mapping[str, Metric] = {
            name: Metric(
                direction=way,
                low=None if single else 0,
                high=None if single else 1,
                meaning=f"{self.folder.name}: "
                + ("its single output" if single else f"probability of {' or '.join(self.labels)}"),
                safety=(stated.safety if stated else False) if safety is None else safety,
            )
        }
        self.batch_size, self.device = batch_size, device
        self.truncated = self.scored = 0
        self._loaded: tuple[Any, Any] | None = None

    @property
    def card(self) -> dict[str, Any] | None:
        """The audit's card; its verdict is "stale" where the weights are not the audited ones."""
        return read_card(self.folder)

    @cached_property
    def digest(self) -> str:
        files = {
            file: (self.folder / file).read_text("utf-8") for file in INPUT_FILES if (self.folder / file).is_file()
        }
        settings = [list(self.metrics), self.labels, self.encoding, self._max_length]
        return content_digest(["classifier", model_digest(self.folder), files, settings])

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> Scores:
        model, tokenizer = self._load()
        rows = [self._encode(tokenizer, prompt, text) for prompt, text in zip(prompts, responses, strict=True)]
        self.scored += len(rows)
        values: list[float | None] = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))  # near-equal lengths: little padding
        for chunk in (order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)):
            for i, value in zip(chunk, self._scores(model, [rows[i] for i in chunk]), strict=True):
                values[i] = value
        return dict.fromkeys(self.metrics, values)

    def notes(self) -> list[str]:
        if not self.truncated:
            return []
        return [f"{self.folder.name}: {self.truncated} of {self.scored} texts lost their beginning (too long)"]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            check_visible(self.folder)
            device = self.device or best_device()
            tokenizer = from_pretrained(AutoTokenizer, self.folder, what="scorer", truncation_side="left")
            model, info = from_pretrained(
                AutoModelForSequenceClassification,
                self.folder,
                what="scorer",
                use_safetensors=True,
                dtype=torch.float32 if device == "cpu" else "auto",
                output_loading_info=True,
            )
            if info["missing_keys"]:
                missing = ", ".join(sorted(info["missing_keys"]))
                raise InputError(f"scorer {self.folder}: its weights lack {missing}, so its scores would be random")
            if self.encoding == "chat" and tokenizer.chat_template is None:
                raise InputError(f"scorer {self.folder}: encoding is chat, but its tokenizer has no chat template")
            room = [
                self._max_length,
                tokenizer.model_max_length,
                position_room(model),
            ]
            self.max_length = min(length for length in room if length)
            self._pad: int | None = model.config.get_text_config().pad_token_id
            self._loaded = model.to(device).eval(), tokenizer
        return self._loaded

    def _encode(self, tokenizer: Any, prompt: Any, response: str) -> dict[str, list[int]]:
        if self.encoding == "chat":
            messages = [*prompt_messages(prompt), {"role": "assistant", "content": response}]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            words: tuple[str, ...] = (text,)
        else:
            words = (prompt_text(prompt), response) if self.encoding == "pair" else (response,)
        special = self.encoding != "chat"  # a chat template writes its own
        row = tokenizer(*words, add_special_tokens=special, verbose=False)
        if len(row["input_ids"]) > self.max_length:
            self.truncated += 1
            row = tokenizer(*words, add_special_tokens=special, truncation=True, max_length=self.max_length)
        names = [name for name in ("input_ids", "token_type_ids") if name in row]
        if not row["input_ids"]:
            raise ValueError(f"answer {response[:60]!r} has no tokens under encoding {self.encoding!r}")
        return {name: list(row[name]) for name in names}

    def _scores(self, model: Any, rows: list[dict[str, list[int]]]) -> list[float]:
        pad = self._padding(model, rows)
        if pad is None:
            return [value for row in rows for value in self._scores(model, [row])]
        width = max(len(row["input_ids"]) for row in rows)
        batch = {
            name: torch.tensor(
                [row[name] + [pad if name == "input_ids" else 0] * (width - len(row[name])) for row in rows]
            )
            for name in rows[0]
        }
        lengths_N = torch.tensor([len(row["input_ids"]) for row in rows])
        batch["attention_mask"] = (torch.arange(width) < lengths_N[:, None]).long()
        logits_NC = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits.float()
        if self.labels is None:
            return logits_NC[:, 0].tolist()
        shares_NC = logits_NC.sigmoid() if self._sigmoid else logits_NC.softmax(-1)
        chosen = [self._names.index(label) for label in self.labels]
        return shares_NC[:, chosen].sum(-1).clamp(0, 1).tolist()

    def _padding(self, model: Any, rows: list[dict[str, list[int]]]) -> int | None:
        """The id to pad with; None where these rows cannot share a batch.

        A decoder's classifier reads the last token that is not `pad_token_id`. Where its config names none, any token
        that occurs in no row pads without changing which token that is.
        """
        if self._pad is not None:
            return self._pad
        config = model.config.get_text_config()
        config.pad_token_id = None  # what padded the batch before may be a token of these rows
        if len(rows) == 1:
            return 0  # nothing to pad
        used = {token for row in rows for token in row["input_ids"]}
        config.pad_token_id = next((token for token in range(config.vocab_size) if token not in used), None)
        return config.pad_token_id

    def _agree(self, what: str, given: Any, stated: Any) -> Any:
        if given is not None and stated is not None and given != stated:
            raise InputError(f"scorer {self.folder}: {what} {given!r} was asked for, its {SCORER_FILE} says {stated!r}")
        return stated if given is None else given

    def _needed(self, what: str, value: Any) -> Any:
        if value is None:
            raise InputError(f"scorer {self.folder}: has no {SCORER_FILE} that states its {what}; give `{what}`")
        return value

    def _check_labels(self) -> None:
        outputs = len(self._names)
        if outputs == 1 and self.labels:
            raise InputError(f"scorer {self.folder}: has a single output, so no labels can be chosen; leave them out")
        if outputs > 1 and not self.labels:
            raise InputError(f"scorer {self.folder}: choose `labels` among its {outputs}: {', '.join(self._names)}")
        for label in self.labels or ():
            if label not in self._names:
                raise InputError(f"scorer {self.folder}: no label {label!r}; it has: {', '.join(self._names)}")
        if self._sigmoid and len(self.labels or ()) > 1:
            raise InputError(f"scorer {self.folder}: its labels do not exclude each other; choose one of them")


def classifier_folder(model: str | Path) -> Path:
    """The folder of a sequence classifier, fetched from the hub where `model` is a name.

    Raises:
        InputError: it is not there, holds no safetensors, or is another kind of model.
    """
    folder = Path(model)
    if not folder.is_dir():
        folder = _fetch(str(model))
    config = read_json(folder / "config.json")
    kinds = config.get("architectures") or []
    if not any(str(kind).endswith("ForSequenceClassification") for kind in kinds):
        raise InputError(f"scorer {folder}: a {', '.join(kinds) or 'model of unknown kind'}, no sequence classifier")
    if not any(folder.glob("*.safetensors")):
        pickles = ", ".join(file.name for file in sorted(folder.iterdir()) if file.suffix in (".bin", ".pt"))
        found = f" (not read: {pickles})" if pickles else ""
        raise InputError(f"scorer {folder}: no *.safetensors there{found}; convert it with save_pretrained")
    return folder.absolute()


def read_scorer_file(folder: Path) -> ScorerFile | None:
    """What `scorer.json` states, None where there is none; InputError where it cannot be used."""
    path = folder / SCORER_FILE
    if not path.is_file():
        return None
    try:
        return ScorerFile.model_validate(read_json(path))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise InputError(f"{path}: {where}: {problem['msg']}") from error


def read_card(folder: Path) -> dict[str, Any] | None:
    """The card in `audit.json`, None where there is none.

    A card of other weights does not apply to these: it comes back as `{"verdict": "stale", "reason": ...}`.
    """
    path = folder / AUDIT_FILE
    if not path.is_file():
        return None
    try:
        card = read_json(path)
    except InputError as error:
        return {"verdict": "stale", "reason": f"the card cannot be read: {error}"}
    if card.get("format") != 1 or card.get("verdict") not in VERDICTS:
        return {"verdict": "stale", "reason": f"{path} is no audit card of format 1"}
    if card.get("model_digest") != model_digest(folder):
        return {"verdict": "stale", "reason": "the weights are not the audited ones; audit the scorer again"}
    return card


def model_digest(folder: Path) -> str:
    """`blake3:<hex>` of the bytes of the folder's *.safetensors, in the order of their names."""
    files = sorted(folder.glob("*.safetensors"))
    return _digest(tuple((file.absolute(), file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=64)
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Read once a process: size and time of change stand in the key."""
    hasher = blake3(max_threads=blake3.AUTO)
    for file, _, _ in files:
        hasher.update_mmap(file)
    return f"blake3:{hasher.hexdigest()}"


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's many errors: bad name, no network, no such model, no access
        problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"scorer {name}: no such folder, and it cannot be had from the hub: {problem}") from error
