"""A harm classifier trained with TRADES in embedding space, and its audit. The folder is a Hugging Face sequence
classifier with `scorer.json`, as `scorers.classifiers.ClassifierScorer` reads it; the audit adds `audit.json`.

Epsilon counts in units of the root mean square of the embedding table, so a model gains nothing from growing its
embeddings.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from prefvec_ray.common.atomic import write_whole
from prefvec_ray.common.config import Config
from prefvec_ray.common.device import best_device
from prefvec_ray.common.errors import InputError, JobError
from prefvec_ray.common.files import read_json
from prefvec_ray.common.pretrained import from_pretrained
from prefvec_ray.robustness.audit import Audit, Ladder, audit
from prefvec_ray.robustness.intervals import Rate
from prefvec_ray.robustness.metrics import probe
from prefvec_ray.robustness.texts import SAFE, Texts
from prefvec_ray.robustness.threat import Ball
from prefvec_ray.robustness.train import Recipe, robust_loss
from prefvec_ray.robustness.words import WordAttack, attack_words
from prefvec_ray.scorers.classifiers import AUDIT_FILE, SCORER_FILE, ScorerFile, classifier_folder, model_digest

MARK = 64.0
"""What the two side channels hold, plus or minus: far out of reach of any epsilon, so an attack cannot touch the
mask."""
SPACE = "token embeddings, L-infinity, in units of their root mean square"


class ScorerRecipe(Config):
    """How a harm classifier is built and trained."""

    encoder: str | None = None
    """Folder or name of a Hugging Face encoder to start from; None: a small ModernBERT of its own, from nothing."""
    width: int = Field(default=64, ge=8)
    layers: int = Field(default=2, ge=1)
    vocabulary: int = Field(default=2000, ge=64)
    max_length: int = Field(default=96, ge=8, le=512)
    method: str = Field(default="trades", pattern="^(trades|adversarial|none)$")
    """`none` trains on clean texts alone, the control."""
    epsilon: float = Field(default=0.5, gt=0, lt=MARK)
    beta: float = Field(default=1.0, gt=0)
    inner_steps: int = Field(default=3, ge=1)
    ramp: float = Field(default=0.5, ge=0, lt=1)
    """Share of the steps over which epsilon grows from nearly nothing: from nothing at all, a network attacked at full
    strength learns to give one answer to everything (measured)."""
    epochs: int = Field(default=4, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    batch: int = Field(default=32, ge=2)
    metric: str = "harmless"
    safe: tuple[str, ...] = ()
    """The labels whose probability is the metric; default: those of `texts.SAFE` that the data has."""


class EmbeddingClassifier(nn.Module):
    """A sequence classifier over (N, L, D + 2): the token embeddings in units of their root mean square, and two
    channels of +/- MARK: real token or padding, first or second text. What an attack moves is the embeddings
    alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.typed = getattr(model.config, "type_vocab_size", 0) > 1

    @property
    def rms(self) -> Tensor:
        return self.model.get_input_embeddings().weight.detach().square().mean().sqrt()

    def embed(self, ids_NL: Tensor, mask_NL: Tensor, types_NL: Tensor) -> Tensor:
        """Token ids as this module's input, with the graph to the embedding table. Padding is 0."""
        embedded_NLD = self.model.get_input_embeddings()(ids_NL) / self.rms * mask_NL.unsqueeze(-1)
        marks = torch.stack([mask_NL, types_NL], dim=-1).to(embedded_NLD) * 2 - 1
        return torch.cat([embedded_NLD, MARK * marks], dim=-1)

    def forward(self, x_NLF: Tensor) -> Tensor:
        mask_NL, types_NL = (x_NLF[..., -2] > 0).long(), (x_NLF[..., -1] > 0).long()
        sides = {"token_type_ids": types_NL} if self.typed else {}
        embedded_NLD = x_NLF[..., :-2] * self.rms
        return self.model(inputs_embeds=embedded_NLD, attention_mask=mask_NL, **sides).logits

    @torch.no_grad()
    def check(self, ids_NL: Tensor, mask_NL: Tensor, types_NL: Tensor) -> None:
        """InputError where the model gives other logits for embeddings than for the tokens themselves: a decoder that
        finds its last token by its id, or a model that scales embeddings. An audit would attack another classifier."""
        sides = {"token_type_ids": types_NL} if self.typed else {}
        wanted = self.model(input_ids=ids_NL, attention_mask=mask_NL, **sides).logits
        found = self(self.embed(ids_NL, mask_NL, types_NL))
        if not torch.allclose(wanted, found, atol=1e-3, rtol=1e-3):
            kind = type(self.model).__name__
            raise InputError(
                f"a {kind} gives other answers for embeddings than for tokens: give an encoder, such as BERT"
            )


class Encoder:
    """Texts as token ids of one length: (N, L) ids, mask and types."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        if tokenizer.pad_token is None:
            raise InputError(
                "the tokenizer has no padding token: give an encoder, such as BERT, with its own tokenizer"
            )
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, rows: Sequence[tuple[str, ...]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        parts = [list(column) for column in zip(*rows, strict=True)]
        batch = self.tokenizer(
            *parts, truncation=True, max_length=self.max_length, padding="longest", return_tensors="pt"
        )
        ids, mask = batch["input_ids"], batch["attention_mask"]
        types = batch.get("token_type_ids", torch.zeros_like(ids))
        return ids.to(device), mask.to(device), types.to(device)


class HarmScorerFile(ScorerFile):
    """`scorer.json` of a harm classifier."""

    recipe: ScorerRecipe
    seed: int
    data_digest: str
    held_out_digest: str
    rows: int
    """Texts that it was trained on."""
    held_out_accuracy: Rate
    largest_class: float
    """The accuracy of an answer that is always the largest class."""
    curve: list[dict[str, int | float]]
    """The last loss of every epoch, and a `Probe` of 128 training texts."""


@torch.random.fork_rng()
def train_scorer(
    train: Texts,
    held: Texts,
    recipe: ScorerRecipe,
    out: str | Path,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> HarmScorerFile:
    """Train a harm classifier and write it to the folder `out`: weights, tokenizer and `scorer.json`, which is also
    returned.

    The held-out texts are only counted at the end. The same seed gives the same weights on the same device.

    Raises:
        InputError: `out` exists; labels of the held-out texts are unknown; no label counts as safe, or all do.
        JobError: the run diverged.
    """
    out = Path(out)
    if out.exists():
        raise InputError(f"{out} exists; give another folder or delete it")
    names = train.names
    safe = recipe.safe or tuple(name for name in names if name in SAFE)
    _check_labels(names, held, safe)
    torch.manual_seed(seed)  # of new weights, and of an encoder's dropout
    model, tokenizer = _build(train, recipe, names)
    encoder, view = Encoder(tokenizer, recipe.max_length), EmbeddingClassifier(model.to(best_device()))
    view.eval().check(*encoder(train.rows[:16], best_device()))
    curve = _fit(view, encoder, train, recipe, seed, progress)
    about = HarmScorerFile(
        kind="classifier",
        metric=recipe.metric,
        direction="maximize",
        encoding=train.encoding,
        labels=safe,
        safety=True,
        max_length=recipe.max_length,
        recipe=recipe,
        seed=seed,
        data_digest=train.digest,
        held_out_digest=held.digest,
        rows=len(train.rows),
        held_out_accuracy=Rate.of("clean", _right(view, encoder, held, names)),
        largest_class=_largest_class(held, names),
        curve=curve,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / SCORER_FILE).write_text(json.dumps(about.model_dump(mode="json"), indent=2) + "\n")
    return about


def _fit(
    view: EmbeddingClassifier,
    encoder: Encoder,
    train: Texts,
    recipe: ScorerRecipe,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> list[dict[str, int | float]]:
    """Train `view` in place; its curve, see `HarmScorerFile`."""
    device, model = best_device(), view.model
    y = _targets(train, train.names).to(device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.01)
    steps = recipe.epochs * math.ceil(len(y) / recipe.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps + 1), (steps - step) / steps)
    )
    step, loss_now, curve = 0, 0.0, list[dict[str, int | float]]()
    watched = torch.randperm(len(y), generator=generator)[:128]
    for epoch in range(1, recipe.epochs + 1):
        model.train()
        for rows in torch.randperm(len(y), generator=generator).split(recipe.batch):
            x = view.embed(*encoder([train.rows[i] for i in rows.tolist()], device))
            share = min(1.0, (step + 1) / max(1.0, recipe.ramp * steps))
            loss = _loss(view, x, y[rows], recipe, share * recipe.epsilon, generator)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step, loss_now = step + 1, float(loss.detach())
            if not math.isfinite(loss_now):
                raise JobError(f"the loss is {loss_now} at step {step}; lower the learning rate {recipe.lr}")
            if progress:
                progress(step, steps)
        with torch.no_grad():
            x = view.embed(*encoder([train.rows[i] for i in watched.tolist()], device))
        seen = probe(view, x, y[watched], Ball(recipe.epsilon, None, None), seed=seed)
        curve.append({"epoch": epoch, "loss": loss_now, **{k: round(v, 5) for k, v in vars(seen).items()}})
    return curve


def audit_scorer(
    folder: str | Path,
    texts: Texts,
    *,
    epsilon: float | None = None,
    ladder: Ladder | None = None,
    words: WordAttack | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Audit:
    """Audit the scorer in `folder` on held-out `texts` and store the card beside it as `audit.json`.

    Any Hugging Face sequence classifier with two labels or more; the texts' labels are its labels. `epsilon` defaults
    to the one that it was trained with. The ladder's floor defaults to the share of an answer that is always the
    largest class: a scorer that does worse under attack is not robust, however honest its figure.

    Raises:
        InputError: not a classifier folder; one that reads other texts (answers alone, or chats); a label that it does
            not know; no epsilon; as `check_data`.
    """
    folder = classifier_folder(folder)
    stated = read_json(folder / SCORER_FILE, "train it again") if (folder / SCORER_FILE).is_file() else {}
    if stated.get("encoding", texts.encoding) != texts.encoding:
        raise InputError(f"{folder} reads texts as {stated['encoding']!r}, these are of kind {texts.encoding!r}")
    ball = Ball(_epsilon(folder, stated, epsilon), None, None)
    view, encoder, names = _load(folder, stated, texts)
    y = _targets(texts, names).to(best_device())
    tokens = encoder(texts.rows, best_device())
    view.check(*(part[:16] for part in tokens))
    with torch.no_grad():
        x = view.embed(*tokens)
    ladder = ladder or Ladder()
    if ladder.floor is None:
        ladder = ladder.model_copy(update={"floor": _largest_class(texts, names)})
    card = audit(view, x, y, ball, ladder, space=SPACE, seed=seed, progress=progress)
    found = attack_words(
        lambda rows: _logits(view, encoder, rows), texts.rows, y.cpu(), words or WordAttack(), seed=seed
    )
    card = card.model_copy(
        update={"words": found, "model_digest": model_digest(folder), "curve": tuple(stated.get("curve", ()))}
    )
    write_whole(folder / AUDIT_FILE, card.model_dump_json(indent=2) + "\n")
    return card


def _epsilon(folder: Path, stated: dict[str, Any], given: float | None) -> float:
    """The one that is given, else the one that the scorer was trained with."""
    epsilon = given if given is not None else stated.get("recipe", {}).get("epsilon")
    if epsilon is None:
        raise InputError(f"{folder} does not say which epsilon it was trained with; give one, in {SPACE}")
    if epsilon >= MARK:
        raise InputError(f"epsilon {epsilon}: expected less than {MARK:g} {SPACE}")
    return float(epsilon)


def _load(folder: Path, stated: dict[str, Any], texts: Texts) -> tuple[EmbeddingClassifier, Encoder, tuple[str, ...]]:
    """The classifier in `folder`, its encoder, and its labels; InputError where `texts` have others."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = from_pretrained(
        AutoModelForSequenceClassification, folder, what="scorer", use_safetensors=True, dtype=torch.float32
    )
    names = tuple(model.config.id2label[i] for i in range(model.config.num_labels))
    unknown = sorted(set(texts.labels) - set(names))
    if unknown:
        raise InputError(f"texts labelled {', '.join(unknown)}: {folder.name} knows only {', '.join(names)}")
    length = stated.get("max_length") or min(512, getattr(model.config, "max_position_embeddings", 512))
    encoder = Encoder(from_pretrained(AutoTokenizer, folder, what="scorer", truncation_side="left"), length)
    return EmbeddingClassifier(model.to(best_device())).eval(), encoder, names


def _targets(texts: Texts, names: tuple[str, ...]) -> Tensor:
    return torch.tensor([names.index(label) for label in texts.labels])


def _largest_class(texts: Texts, names: tuple[str, ...]) -> float:
    """The accuracy of an answer that is always the largest class."""
    return max(texts.labels.count(name) for name in names) / len(texts.labels)


def _check_labels(names: tuple[str, ...], held: Texts, safe: tuple[str, ...]) -> None:
    unknown = sorted(set(held.labels) - set(names))
    if unknown:
        raise InputError(f"held-out texts are labelled {', '.join(unknown)}, which no training text is")
    wrong = [name for name in safe if name not in names]
    if wrong or not safe or len(safe) == len(names):
        chosen = ", ".join(safe) or "none"
        raise InputError(f"safe labels: {chosen}; choose some, not all, of: {', '.join(names)}")


def _build(train: Texts, recipe: ScorerRecipe, names: tuple[str, ...]) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, ModernBertConfig

    labels: dict[str, Any] = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    if recipe.encoder:
        tokenizer = from_pretrained(AutoTokenizer, recipe.encoder, what="encoder", truncation_side="left")
        labels |= {"num_labels": len(names), "use_safetensors": True, "dtype": torch.float32}
        model = from_pretrained(AutoModelForSequenceClassification, recipe.encoder, what="encoder", **labels)
        return model, tokenizer
    tokenizer = _tokenizer(train, recipe.vocabulary)
    # No dropout: TRADES compares two answers, and noise between them would count as divergence. The mean over tokens,
    # since a first token that sums up the text is learned late, if at all, from a few thousand texts.
    config = ModernBertConfig(
        vocab_size=len(tokenizer), hidden_size=recipe.width, num_hidden_layers=recipe.layers,
        num_attention_heads=max(1, recipe.width // 16), intermediate_size=2 * recipe.width,
        max_position_embeddings=recipe.max_length, classifier_pooling="mean", classifier_bias=True,
        pad_token_id=tokenizer.pad_token_id, cls_token_id=tokenizer.cls_token_id, sep_token_id=tokenizer.sep_token_id,
        bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id, num_labels=len(names), **labels,
    )  # fmt: skip
    return AutoModelForSequenceClassification.from_config(config), tokenizer


def _tokenizer(train: Texts, vocabulary: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False)
    pieces.train_from_iterator((text for row in train.rows for text in row), trainer)
    pieces.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        truncation_side="left", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def _loss(
    view: nn.Module, x: Tensor, y: Tensor, recipe: ScorerRecipe, epsilon: float, generator: torch.Generator
) -> Tensor:
    if recipe.method == "none":
        return nn.functional.cross_entropy(view(x), y)
    wanted = Recipe.model_validate(
        {"method": recipe.method, "epsilon": epsilon, "beta": recipe.beta, "inner_steps": recipe.inner_steps}
    )
    return robust_loss(view, x, y, Ball(epsilon, None, None), wanted, generator).total


@torch.no_grad()
def _logits(view: EmbeddingClassifier, encoder: Encoder, rows: Sequence[tuple[str, ...]]) -> Tensor:
    parts = [view(view.embed(*encoder(rows[i : i + 256], best_device()))).cpu() for i in range(0, len(rows), 256)]
    return torch.cat(parts)


def _right(view: EmbeddingClassifier, encoder: Encoder, texts: Texts, names: tuple[str, ...]) -> Tensor:
    view.eval()
    return _logits(view, encoder, texts.rows).argmax(1) == _targets(texts, names)
