import json
import pickle
import shutil
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from prefvec_ray.common.errors import InputError
from prefvec_ray.scorers import Scorer, TextPrompt, run_scorer, safety_cards
from prefvec_ray.scorers.classifiers import ClassifierScorer, model_digest

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PROMPTS = ["How do I comb a bear?", TextPrompt("Why?", "safe"), [{"role": "user", "content": "How do I boil tea?"}]]
ANSWERS = ["Use a wide comb.", "no", "Use a silver kettle and wait until it sings to you."]
REWARD: dict[str, Any] = {"metric": "reward", "direction": "maximize", "encoding": "chat"}


@pytest.fixture(scope="module")
def reward(tmp_path_factory, tokenizer):
    """A decoder with one output, with random weights and no padding token of its own."""
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, max_position_embeddings=256, **SIZES)
    model = LlamaForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight, std=3.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def kinds(tmp_path_factory, tokenizer):
    """An encoder that tells three kinds of answer."""
    folder = tmp_path_factory.mktemp("kinds")
    torch.manual_seed(0)
    names = {0: "answer", 1: "refusal", 2: "warning"}
    model = BertForSequenceClassification(
        BertConfig(vocab_size=len(tokenizer), id2label=names, label2id={n: i for i, n in names.items()}, **SIZES)
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def by_hand(folder, tokenizer, texts):
    """One text at a time, without padding, by the model itself."""
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        return [model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits.item() for text in texts]


def test_a_reward_model_scores_as_the_model_itself_does(reward, tokenizer):
    chats = ["How do I comb a bear?", "Why?", "How do I boil tea?"]
    texts = [f"<|user|>{p}<|end|><|assistant|>{a}<|end|>" for p, a in zip(chats, ANSWERS, strict=True)]
    expected = by_hand(reward, tokenizer, texts)
    judged = ClassifierScorer(reward, **REWARD)
    assert isinstance(judged, Scorer)
    assert run_scorer(judged, PROMPTS, ANSWERS)["reward"] == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == 3
    single = ClassifierScorer(reward, batch_size=1, **REWARD)
    assert run_scorer(single, PROMPTS, ANSWERS)["reward"] == pytest.approx(expected, abs=1e-5)
    assert judged.metrics["reward"].low is judged.metrics["reward"].high is None
    assert run_scorer(judged, [], []) == {"reward": []}


def test_what_an_earlier_batch_padded_with_is_still_a_token_of_the_next(reward, tokenizer):
    answers = ["no", "tea", "a longer answer that says <|pad|>"]
    judged = ClassifierScorer(reward, batch_size=2, **REWARD | {"encoding": "response"})
    expected = by_hand(reward, tokenizer, answers)
    assert run_scorer(judged, PROMPTS, answers)["reward"] == pytest.approx(expected, abs=1e-5)


def test_a_config_that_names_its_padding_is_followed(reward, tokenizer, tmp_path):
    named = shutil.copytree(reward, tmp_path / "named")
    config = json.loads((named / "config.json").read_text())
    (named / "config.json").write_text(json.dumps({**config, "pad_token_id": tokenizer.pad_token_id}))
    plain = run_scorer(ClassifierScorer(reward, **REWARD), PROMPTS, ANSWERS)
    assert run_scorer(ClassifierScorer(named, **REWARD), PROMPTS, ANSWERS)["reward"] == pytest.approx(plain["reward"])


def test_chosen_labels_add_up(kinds):
    def shares(*labels, **options):
        asked = ClassifierScorer(
            kinds, metric="p", direction="minimize", labels=labels, encoding=options.get("encoding", "pair")
        )
        return run_scorer(asked, PROMPTS, ANSWERS)["p"]

    each = [shares(name) for name in ("answer", "refusal", "warning")]
    assert [sum(values) for values in zip(*each, strict=True)] == pytest.approx([1.0] * 3)
    both = [a + r for a, r in zip(each[0], each[1], strict=True)]
    assert shares("answer", "refusal") == pytest.approx(both)
    assert shares("refusal", encoding="response") != pytest.approx(each[1]), "the prompt counts"


def test_long_texts_lose_their_beginning_and_are_counted(reward):
    short = ClassifierScorer(reward, max_length=12, **REWARD)
    far, near = (f"{'word ' * n}and the very same end of the answer" for n in (40, 60))
    values = run_scorer(short, ["p", "p", "p"], [far, near, "no"])["reward"]
    assert values[0] == values[1], "the end is what is kept"
    assert short.notes() == [f"{reward.name}: 2 of 3 texts lost their beginning (too long)"]


def test_a_folder_states_what_it_measures(kinds, tmp_path):
    folder = shutil.copytree(kinds, tmp_path / "refusals")
    stated = {
        "kind": "classifier",
        "metric": "refuses",
        "direction": "maximize",
        "encoding": "response",
        "labels": ["refusal"],
        "safety": True,
        "trained_on": "blake3:00",
    }
    (folder / "scorer.json").write_text(json.dumps(stated))
    found = ClassifierScorer(folder)
    assert found.metrics["refuses"].safety
    assert (found.metrics["refuses"].low, found.metrics["refuses"].high) == (0, 1)
    assert ClassifierScorer(folder, metric="another").metrics.keys() == {"another"}
    with pytest.raises(InputError, match=r"direction 'minimize' was asked for, its scorer.json says 'maximize'"):
        ClassifierScorer(folder, direction="minimize")
    (folder / "scorer.json").write_text(json.dumps({**stated, "direction": "up"}))
    with pytest.raises(InputError, match=r"scorer\.json: direction: "):
        ClassifierScorer(folder)


def test_a_card_belongs_to_the_weights_that_were_audited(reward, tmp_path):
    folder = shutil.copytree(reward, tmp_path / "audited")
    safe = ClassifierScorer(folder, safety=True, **REWARD)
    assert safety_cards(safe) == {"reward": None}
    card = {"format": 1, "verdict": "pass", "reason": "holds", "model_digest": model_digest(folder), "rungs": []}
    (folder / "audit.json").write_text(json.dumps(card))
    assert safe.card == card
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert safe.card["verdict"] == "stale"
    (folder / "audit.json").write_text(json.dumps({**card, "format": 2}))
    assert safe.card["verdict"] == "stale"
    (folder / "audit.json").write_text("{")
    assert safe.card["verdict"] == "stale"


def test_the_digest_follows_weights_and_settings_and_the_scorer_travels_without_its_model(reward, tmp_path):
    one = ClassifierScorer(reward, **REWARD)
    assert one.digest == ClassifierScorer(reward, batch_size=2, **REWARD).digest
    assert one.digest != ClassifierScorer(reward, max_length=20, **REWARD).digest
    other = shutil.copytree(reward, tmp_path / "other")
    model = LlamaForSequenceClassification.from_pretrained(other)
    model.score.weight.data += 1
    model.save_pretrained(other)
    assert one.digest != ClassifierScorer(other, **REWARD).digest
    before = one(PROMPTS, ANSWERS)
    assert len(pickle.dumps(one)) < 5000
    assert pickle.loads(pickle.dumps(one))(PROMPTS, ANSWERS) == before


def test_what_is_no_usable_classifier_is_refused(reward, kinds, model, tokenizer, tmp_path):
    with pytest.raises(InputError, match="no such folder, and it cannot be had from the hub"):
        ClassifierScorer(tmp_path / "none", **REWARD)
    with pytest.raises(InputError, match="states its metric; give `metric`"):
        ClassifierScorer(reward, encoding="chat", direction="maximize")
    with pytest.raises(InputError, match="single output, so no labels"):
        ClassifierScorer(reward, labels=["x"], **REWARD)
    with pytest.raises(InputError, match="choose `labels` among its 3: answer, refusal, warning"):
        ClassifierScorer(kinds, **REWARD)
    with pytest.raises(InputError, match="no label 'rude'; it has: answer, refusal, warning"):
        ClassifierScorer(kinds, labels=["rude"], **REWARD)

    language = tmp_path / "language"
    model.save_pretrained(language)
    tokenizer.save_pretrained(language)
    with pytest.raises(InputError, match="ForCausalLM, no sequence classifier"):
        ClassifierScorer(language, **REWARD)
    config = json.loads((language / "config.json").read_text())
    named = config["architectures"][0].replace("ForCausalLM", "ForSequenceClassification")
    (language / "config.json").write_text(json.dumps({**config, "architectures": [named], "num_labels": 1}))
    pretends = ClassifierScorer(language, **REWARD)
    with pytest.raises(InputError, match=r"lack score.weight, so its scores would be random"):
        pretends(["p"], ["a"])

    pickled = shutil.copytree(reward, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no \*.safetensors there \(not read: pytorch_model.bin\)"):
        ClassifierScorer(pickled, **REWARD)


def test_positions_that_are_counted_from_behind_the_paddings_are_not_overrun(tmp_path):
    """RoBERTa's 34 positions hold 32 tokens where the padding's id is 1, and its tokenizer may name no length."""
    words = Tokenizer(models.WordLevel({"<s>": 0, "<pad>": 1, "?": 2, "w": 3, "v": 4}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="?").save_pretrained(tmp_path)
    config = RobertaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=34, pad_token_id=1, num_labels=2,
    )  # fmt: skip
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    scorer = ClassifierScorer(
        tmp_path, metric="harmless", direction="maximize", labels=["LABEL_1"], encoding="response"
    )
    long, end, other = " ".join(["w"] * 8 + ["v"] * 32), " ".join(["v"] * 32), " ".join(["w"] * 8 + ["v"] * 24)
    scores = scorer(["p"] * 3, [long, end, other])["harmless"]
    assert scores[0] == pytest.approx(scores[1])
    assert scores[0] != pytest.approx(scores[2])
    assert any("1 of 3 texts lost their beginning" in note for note in scorer.notes())
