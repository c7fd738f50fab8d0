"""A harm classifier from the tiny world: trained, read by evaluation, audited, its words attacked."""

import json
from statistics import fmean

import pytest
import torch

from prefvec_ray.cli.robustness import run_audit
from prefvec_ray.common.errors import InputError
from prefvec_ray.robustness import Ladder
from prefvec_ray.robustness.scorer import (
    MARK,
    EmbeddingClassifier,
    Encoder,
    ScorerRecipe,
    audit_scorer,
    train_scorer,
)
from prefvec_ray.robustness.texts import CATEGORIES, Texts, load_texts
from prefvec_ray.robustness.words import WordAttack
from prefvec_ray.scorers.classifiers import ClassifierScorer, read_card

RECIPE = ScorerRecipe(width=32, layers=1, vocabulary=600, max_length=48, epsilon=0.3, inner_steps=1, epochs=2, lr=3e-3)
LADDER = Ladder(strong_steps=10, restarts=1, apgd_steps=5, fab_steps=1, square_queries=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    train, held = load_texts("micro")
    out = tmp_path_factory.mktemp("scorer") / "harm"
    train_scorer(train.sample(2500), held, RECIPE, out)
    return out


@pytest.fixture(scope="module")
def card(folder):
    held = load_texts("micro")[1].sample(60)
    return audit_scorer(folder, held, ladder=LADDER, words=WordAttack(edits=2, tried=4))


@pytest.mark.slow
def test_it_beats_the_largest_class_and_says_so(folder):
    about = json.loads((folder / "scorer.json").read_text())
    assert about["held_out_accuracy"]["low"] > about["largest_class"]
    assert set(about["labels"]) == {"fine", "over-refusal", "declined"}
    assert set(json.loads((folder / "config.json").read_text())["label2id"]) == set(CATEGORIES)


def test_evaluation_reads_the_folder_and_the_card(folder, card):
    scorer = ClassifierScorer(folder)
    texts = load_texts("micro")[1]
    prompts, answers = zip(*texts.rows, strict=True)
    scores = scorer(prompts, answers)["harmless"]
    by_label: dict[str, list[float]] = {}
    for score, label in zip(scores, texts.labels, strict=True):
        assert score is not None
        by_label.setdefault(label, []).append(score)
    assert fmean(by_label["fine"]) > fmean(by_label["harmful"]) + 0.1
    assert scorer.metrics["harmless"].safety
    assert scorer.card is not None
    assert scorer.card["verdict"] == card.verdict, "not stale: the digest is that of the weights"
    assert scorer.card["words"]["n"] == 60


def test_an_encoder_with_dropout_is_trained_the_same_by_the_same_seed(folder, tmp_path):
    from transformers import AutoTokenizer, BertConfig, BertModel

    tokenizer = AutoTokenizer.from_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    train, held = load_texts("micro")
    recipe = ScorerRecipe(encoder=str(tmp_path / "encoder"), max_length=48, epochs=1, inner_steps=1)
    few = train.sample(64), held.sample(32)
    curves = []
    for name in ("first", "again"):
        torch.rand(1)  # the random state that it is called in is not the same
        curves.append(train_scorer(*few, recipe, tmp_path / name, seed=3).curve)
    assert curves[0] == curves[1]


def test_what_the_audit_attacks_is_the_classifier_itself(folder):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    view = EmbeddingClassifier(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = load_texts("micro")[1].rows[:6]
    x = view.embed(*Encoder(tokenizer, 48)(rows, torch.device("cpu"))).detach()
    for i, row in enumerate(rows):
        alone = model(**tokenizer(*row, return_tensors="pt")).logits
        torch.testing.assert_close(view(x[i : i + 1]), alone, atol=1e-5, rtol=1e-4)
    marks = x[..., -2:].clone()
    assert set(marks.unique().tolist()) == {-MARK, MARK}
    moved = x.clone()
    moved[..., -2:] += 0.9 * MARK * torch.randn_like(marks).sign()
    assert torch.equal(view(moved), view(x)), "no epsilon reaches the mask"


def test_the_card_of_a_scorer(card, folder):
    stored = read_card(folder)
    assert stored is not None
    assert card.model_digest == stored["model_digest"]
    assert card.epsilon == RECIPE.epsilon
    assert card.ladder.floor == pytest.approx(0.45, abs=0.15), "the share of the largest class"
    assert card.words.mean <= card.words.random.mean <= card.clean.mean
    assert card.words.edits == 2
    assert [moment["epoch"] for moment in card.curve] == [1, 2]
    assert all({"fosc", "fosc_relative", "sgcs", "inner_gain", "loss"} <= set(moment) for moment in card.curve)
    assert set(card.words.random.model_dump()) == {"mean", "low", "high", "n"}


def test_the_commands(folder, tmp_path, capsys):
    from rich.console import Console

    rows = [f'{{"prompt": "{prompt}", "response": "{answer}", "kind": "{kind}"}}' for (prompt, answer), kind in zip(
        *(lambda held: (held.rows, held.labels))(load_texts("micro")[1]), strict=True
    ) if "'" not in prompt]  # fmt: skip
    (tmp_path / "held.jsonl").write_text("\n".join(rows * 2))
    run_audit(
        Console(width=120), folder=folder, data=str(tmp_path / "held.jsonl"), label="kind", count=30, epsilon=0.2,
        ladder=LADDER, seed=0,
    )  # fmt: skip
    printed = capsys.readouterr().out
    for rung in ("clean", "pgd", "black box", "ensemble", "greedy"):
        assert rung in printed
    card = read_card(folder)
    assert card is not None
    assert card["epsilon"] == 0.2
    assert (folder / "audit.png").stat().st_size > 5000


def test_a_decoder_is_refused_and_an_encoder_with_text_types_taken(folder, tmp_path):
    """A decoder's head reads the last token that is no padding, which embeddings alone do not tell it."""
    from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    decoder = LlamaForSequenceClassification(
        LlamaConfig(**size, intermediate_size=32, num_labels=4, pad_token_id=tokenizer.pad_token_id)
    )
    train, held = (texts.sample(40) for texts in load_texts("micro"))
    for name, model in (("decoder", decoder), ("encoder", BertModel(BertConfig(**size, intermediate_size=32)))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    short = RECIPE.model_copy(update={"epochs": 1, "encoder": str(tmp_path / "decoder")})
    with pytest.raises(InputError, match="a LlamaForSequenceClassification gives other answers for embeddings"):
        train_scorer(train, held, short, tmp_path / "a")
    short = short.model_copy(update={"encoder": str(tmp_path / "encoder")})
    about = train_scorer(train, held, short, tmp_path / "b")
    assert about.held_out_accuracy.n == 40
    assert audit_scorer(tmp_path / "b", held, ladder=LADDER).epsilon == RECIPE.epsilon


def test_an_audit_attacks_what_the_scorer_reads(folder, tmp_path):
    import shutil

    copy = shutil.copytree(folder, tmp_path / "copy")
    about = json.loads((copy / "scorer.json").read_text())
    (copy / "scorer.json").write_text(json.dumps(about | {"encoding": "chat"}))
    with pytest.raises(InputError, match="reads texts as 'chat', these are of kind 'pair'"):
        audit_scorer(copy, load_texts("micro")[1].sample(40), ladder=LADDER)


def test_weights_that_change_make_the_card_stale(card, folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    weights["classifier.bias"] = weights["classifier.bias"] + 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    stored = read_card(copy)
    assert stored is not None
    assert stored["verdict"] == "stale"


def test_mistakes(folder, tmp_path):
    train, held = load_texts("micro")
    with pytest.raises(InputError, match="exists; give another folder"):
        train_scorer(train, held, RECIPE, folder)
    with pytest.raises(InputError, match="safe labels: good; choose some, not all, of: declined"):
        train_scorer(train, held, RECIPE.model_copy(update={"safe": ("good",)}), tmp_path / "x")
    with pytest.raises(InputError, match="texts labelled unsafe: harm knows only"):
        audit_scorer(folder, Texts((("a", "b"), ("c", "d")), ("unsafe", "fine")))
    with pytest.raises(InputError, match="expected less than 64"):
        audit_scorer(folder, held, epsilon=64.0)
    with pytest.raises(InputError, match="epsilon -1"):
        audit_scorer(folder, held, epsilon=-1.0)
    with pytest.raises(InputError, match="all labels are"):
        audit_scorer(folder, Texts((("a", "b"), ("c", "d")), ("fine", "fine")))
