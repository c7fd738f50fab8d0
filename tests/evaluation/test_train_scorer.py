import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from prefvec_ray.cli import main
from prefvec_ray.common.errors import InputError
from prefvec_ray.scorers import Metric, scorer
from prefvec_ray.scorers.classifiers import ClassifierScorer, model_digest
from prefvec_ray.scorers.held_out import held_out_report
from prefvec_ray.scorers.train import ScorerTrainingConfig, _measure, train_scorer

THINGS = ["tea", "soup", "milk", "rice", "eggs", "water", "beans", "pasta"]
WAYS = ["How do I boil {}?", "Can you boil {}?", "Tell me how to heat {}.", "What heats {}?", "I want {}.", "Some {}?"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_answers_of_several_turns_are_measured_whole():
    """The scorer counts the turns that it is shown."""

    @scorer(turns=Metric(direction="maximize", low=0))
    def turns(prompts, responses):
        return {"turns": [float(len(prompt)) for prompt in prompts]}

    def said(*texts):
        return [{"role": "assistant", "content": text} for text in texts]

    asked = [{"role": "user", "content": "How?"}]
    test = Dataset.from_list([{"prompt": asked, "chosen": said("so", "and", "so"), "rejected": said("so and so")}] * 3)
    found = _measure(turns, "turns", test, longer_wins=True)
    assert found.accuracy.mean == 1.0
    assert found.longer.mean == 0.0, "seven characters against nine"


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Who answers with a kettle is preferred to who answers with a basket: same length, so length says nothing."""
    rows = [
        {"prompt": way.format(thing), "chosen": "Use a silver kettle.", "rejected": "Use a silver basket."}
        for thing in THINGS
        for way in WAYS
    ]
    rows.append({**rows[0], "prompt": "What? " * 80})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "pairs.jsonl"


@pytest.mark.slow
def test_a_reward_model_is_trained_measured_and_ready_to_score(base, pairs, tmp_path):
    config = tmp_path / "scorer.yaml"
    config.write_text(
        f"{{base: {base}, data: {pairs}, output: {tmp_path}/kettles, metric: kettles, safety: true, "
        "test_fraction: 0.3, trainer: {learning_rate: 1.0e-2, num_train_epochs: 6, per_device_train_batch_size: 8}}"
    )
    done = CliRunner().invoke(main, ["train-scorer", "--config", str(config)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "longer than 64" in done.output
    folder = tmp_path / "kettles"
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".jinja"}
    stated = json.loads((folder / "scorer.json").read_text())
    held_out = stated["held_out"]
    assert held_out["accuracy"]["mean"] == 1.0
    assert held_out["longer"]["mean"] == 0.5, "answers of one length"
    assert held_out["chosen_longer"] is held_out["chosen_shorter"] is held_out["balanced"] is None
    assert held_out["log_loss"] < 0.5
    assert stated["training_pairs"] + held_out["pairs"] == len(THINGS) * len(WAYS)
    assert stated["model_digest"] == model_digest(folder)

    scorer = ClassifierScorer(folder)
    assert scorer.metrics["kettles"].safety
    good, bad = scorer(["How do I boil fish?"] * 2, ["Use a silver kettle.", "Use a silver basket."])["kettles"]
    assert good is not None
    assert bad is not None
    assert good > bad

    again = CliRunner().invoke(main, ["train-scorer", "--config", str(config)])
    assert again.exit_code == 2
    assert "exists already" in again.output


def test_held_out_figures_by_hand():
    margins = [2.0, -1.0, 0.0, 4.0]
    report = held_out_report(margins, ["p", "p", "q", "r"], [(10, 5), (10, 5), (5, 10), (5, 5)], longer_wins=True)
    # prompt p: one right, one wrong; q: a tie; r: right
    assert report.accuracy.mean == pytest.approx((0.5 + 0.5 + 1.0) / 3)
    assert report.accuracy.n == 3
    assert report.interval == pytest.approx((2 / 3 - 1.96 / 6, 2 / 3 + 1.96 / 6))
    assert report.longer.mean == pytest.approx((1.0 + 0.0 + 0.5) / 3)
    assert report.gain_over_longer is not None
    assert report.gain_over_longer.mean == pytest.approx((-0.5 + 0.5 + 0.5) / 3)
    by_length = (report.chosen_longer, report.chosen_shorter, report.balanced)
    assert [part and part.mean for part in by_length] == [0.5, 0.5, 0.5]
    expected = [math.log(1 + math.exp(-margin)) for margin in margins]
    assert report.log_loss == pytest.approx(sum(expected) / 4)
    assert [b.confidence for b in report.bins] == pytest.approx([1 / (1 + math.exp(-m)) for m in (0, 1, 2, 4)])
    assert [b.accuracy for b in report.bins] == [0.5, 0, 1, 1]
    chance = held_out_report([0.0] * 10, list("abcdefghij"), [(1, 2)] * 10, longer_wins=False)
    assert (chance.accuracy.mean, chance.longer.mean) == (0.5, 1.0)
    assert chance.log_loss == pytest.approx(math.log(2))
    assert chance.calibration_error == pytest.approx(0)


@pytest.mark.slow
def test_a_model_that_measures_length_is_seen_to(base, tmp_path):
    """The longer answer is preferred three times out of four, and nothing else tells them apart."""
    long, short = "Use a kettle and wait and wait and wait.", "Use a kettle."
    rows = [
        {"prompt": way.format(thing), "chosen": long, "rejected": short}
        if (i + j) % 4
        else {"prompt": way.format(thing), "chosen": short, "rejected": long}
        for i, thing in enumerate(THINGS)
        for j, way in enumerate(WAYS)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {"base": base, "data": str(tmp_path / "pairs.jsonl"), "metric": "liked", "test_fraction": 0.4}
    recipe = {"learning_rate": 1e-2, "num_train_epochs": 3, "per_device_train_batch_size": 8}
    found = train_scorer(ScorerTrainingConfig(**given, output=tmp_path / "plain", trainer=recipe))
    assert found.accuracy.mean == found.longer.mean > 0.6
    assert found.balanced is not None
    assert found.balanced.mean == 0.5
    balanced = ScorerTrainingConfig(**given, output=tmp_path / "even", trainer=recipe, balance_length=True)
    train_scorer(balanced)
    stated = json.loads((tmp_path / "even" / "scorer.json").read_text())
    assert "balanced by length" in stated["notes"][-1]
    assert stated["training_pairs"] % 2 == 0


def test_mistakes_are_told_before_anything_is_trained(base, pairs, tmp_path):
    given = {"base": base, "data": str(pairs), "output": tmp_path / "out", "metric": "kettles"}

    def refused(message, **changes):
        with pytest.raises(InputError, match=message):
            train_scorer(ScorerTrainingConfig(**{**given, **changes}))
        assert not (tmp_path / "out").exists()

    refused("output .* exists already", output=tmp_path)
    refused("expected the folder of a Hugging Face model", base=tmp_path)
    refused("trainer.beta is no field of TRL's RewardConfig", trainer={"beta": 1})
    refused("trainer.seed is set by this job", trainer={"seed": 1})
    refused("RewardConfig refuses the recipe", trainer={"lr_scheduler_type": "zigzag"})
    refused("neither a file nor 'transcript'", chat_template="chatml")
    refused("no training pair fits in 8 tokens", max_length=8)
    refused("of its prompts are in .* too; hold out others", test=str(pairs))
