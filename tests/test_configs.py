"""Every shipped job config is read by its model, checked as far as that goes without its base, and sized to fit."""

import re
from pathlib import Path
from typing import Any

import pytest

from prefvec_ray.common.config import load_config
from prefvec_ray.common.errors import InputError
from prefvec_ray.comparison import CompareConfig
from prefvec_ray.demo import PipelineConfig
from prefvec_ray.on_policy import OnPolicyConfig
from prefvec_ray.robustness import Ladder
from prefvec_ray.robustness.scorer import ScorerRecipe
from prefvec_ray.robustness.study import StudyConfig
from prefvec_ray.scorers.train import ScorerTrainingConfig
from prefvec_ray.search import EvalConfig, SearchJob
from prefvec_ray.tiny_world import TinyWorld, build_tokenizer
from prefvec_ray.training import TrainingConfig
from prefvec_ray.vectors import Checkpoint

CONFIGS = sorted((Path(__file__).parents[1] / "jobs" / "configs").glob("*.yaml"))
TRAINING = [path for path in CONFIGS if "saferlhf" in path.stem]
# Billions of parameters: the cards of the models.
PARAMETERS = {"Llama-3.2-3B": 3.21, "Llama-3.1-8B": 8.03, "Mistral-7B-v0.1": 7.24}


KINDS: dict[str, type[Any]] = {
    "compare": CompareConfig,
    "eval": EvalConfig,
    "search": SearchJob,
    "pipeline": PipelineConfig,
    "pairs": OnPolicyConfig,
    "classes": StudyConfig,
    "ladder": Ladder,
    "scorer": ScorerRecipe,
    "reward": ScorerTrainingConfig,
}


def kind(path: Path) -> type[Any]:
    """What the last word of its name says; a training job's file has no such word."""
    return KINDS.get(path.stem.split("_")[-1], TrainingConfig)


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """Every variable that a config names, set to a folder of this test."""
    names = {name for path in CONFIGS for name in re.findall(r"\$\{(\w+)\}", path.read_text())}
    for name in names:
        monkeypatch.setenv(name, str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_read_by_its_model_and_by_no_other(path, environment):
    load_config(path, kind(path))
    models: set[type[Any]] = {TrainingConfig, *KINDS.values()}
    for other in models - {kind(path)}:
        with pytest.raises(InputError):
            load_config(path, other)


@pytest.mark.parametrize(
    ("model", "old", "new"),
    [
        (EvalConfig, "draws", "samples_per_prompt"),
        (SearchJob, "draws", "samples_per_prompt"),
        (SearchJob, "report_draws", "report_samples_per_prompt"),
        (PipelineConfig, "draws", "samples_per_prompt"),
        (PipelineConfig, "search_draws", "search_samples_per_prompt"),
    ],
)
def test_the_old_name_of_a_field_leads_to_the_new_one(model, old, new, tmp_path):
    (tmp_path / "old.yaml").write_text(f"{old}: 2")
    with pytest.raises(InputError) as caught:
        load_config(tmp_path / "old.yaml", model)
    assert f"unknown setting {old!r} is called {new!r} now" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert new in model.model_fields


def test_an_unset_variable_is_named(monkeypatch):
    monkeypatch.delenv("PREFVEC_SHARED", raising=False)
    with pytest.raises(InputError, match=r"\$\{PREFVEC_SHARED\}.*is not set"):
        load_config(TRAINING[0], TrainingConfig)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TinyWorld("micro", 0))


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_a_training_config_is_sound_but_for_its_base(path, environment, tokenizer):
    """With a model of the same architecture, two layers thin, in the base's place."""
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    config = load_config(path, TrainingConfig)
    with pytest.raises(InputError, match=r"base .* give the folder of a Hugging Face model"):
        config.check()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape = {**sizes, "num_key_value_heads": 1, "vocab_size": len(tokenizer)}
    if "Mistral" in config.base.name:
        model = MistralForCausalLM(MistralConfig(**shape))
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings="3B" in config.base.name))
    model.save_pretrained(config.base)
    tokenizer.save_pretrained(config.base)
    assert len(Checkpoint(config.base))
    config.check()
    assert config.global_batch_size == 64
    assert config.sft is not None
    sft = config.sft.recipe
    at_once = sft["per_device_train_batch_size"] * sft["gradient_accumulation_steps"]
    assert at_once * config.resources.workers == 64, "as many examples a step, however many workers"


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_the_memory_that_a_config_states_follows_from_its_method(path, environment):
    """The arithmetic of docs/clusters.md: bytes a parameter on each worker."""
    config = load_config(path, TrainingConfig)
    workers = config.resources.workers
    if config.method == "lora":
        a_parameter: float = 2  # the frozen base in bf16
    else:
        a_parameter = {"zero2": 2 + 14 / workers, "zero3": 16 / workers}[str(config.deepspeed)]
    state = PARAMETERS[config.base.name] * a_parameter
    (said,) = re.findall(r", ([\d.]+) GB", " ".join(path.read_text().split("Memory:")[1].split("\n")[:2]))[:1]
    assert float(said) == pytest.approx(state, abs=0.6)
    on_a_gpu = float(re.findall(r"GPUs of (\d+) GB", path.read_text())[0])
    assert state < 0.75 * on_a_gpu, "activations and logits need room too"
    gpus = int(re.findall(r"(\d+) GPUs of", path.read_text())[0])
    runs = 2 * len(config.preferences) * len(config.seeds)
    assert gpus == runs * workers * config.resources.gpus_per_worker
