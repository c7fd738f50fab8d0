import shutil

import pytest

from prefvec_ray.artifacts.training import Method
from prefvec_ray.common.config import load_config, parse_config, parse_yaml
from prefvec_ray.common.errors import InputError
from prefvec_ray.training import Resources, TrainingConfig
from prefvec_ray.training.config import SftStage
from prefvec_ray.training.fsdp import fsdp_config, process_group
from prefvec_ray.training.zero import PRESETS, deepspeed_config

GOOD = {"name": "job", "base": "base", "preferences": {"helpful": {"data": "pairs.jsonl"}}}


def refuse(**changes: object) -> str:
    with pytest.raises(InputError) as refused:
        parse_config({**GOOD, **changes}, TrainingConfig, source="job.yaml")
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_typo_is_named_beside_the_settings_that_exist():
    message = refuse(sedes=[1])
    assert "job.yaml" in message
    assert "'sedes'" in message
    assert "seeds" in message.split("known here:")[1]


def test_a_typo_deeper_down_names_the_settings_of_its_section():
    message = refuse(resources={"worker": 2})
    assert "'resources.worker'" in message
    assert "workers" in message.split("known here:")[1]


@pytest.mark.parametrize("name", ["mixed", "kl", "a/b", "..", "so good"])
def test_names_that_cannot_be_a_preference_are_refused(name):
    assert repr(name) in refuse(preferences={name: {"data": "pairs.jsonl"}})


def test_what_the_plan_decides_cannot_be_set_in_the_recipe():
    assert "give `seeds`" in refuse(dpo={"seed": 3})


def test_a_seed_given_twice_is_refused():
    assert "twice" in refuse(seeds=[1, 1])


def test_a_missing_file_broken_yaml_and_an_unset_variable_are_refused(tmp_path):
    path = tmp_path / "job.yaml"
    with pytest.raises(InputError, match="no such file"):
        load_config(path, TrainingConfig)
    path.write_text("name: [unclosed")
    with pytest.raises(InputError, match="not readable as YAML"):
        load_config(path, TrainingConfig)
    path.write_text("name: job\nbase: ${PREFVEC_NO_SUCH_VARIABLE}/base\n")
    with pytest.raises(InputError, match="PREFVEC_NO_SUCH_VARIABLE"):
        load_config(path, TrainingConfig)


def test_variables_are_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFVEC_TEST_DATA", "/somewhere")
    path = tmp_path / "job.yaml"
    path.write_text("name: job\nbase: base\npreferences: {helpful: {data: '${PREFVEC_TEST_DATA}/pairs.jsonl'}}\n")
    assert load_config(path, TrainingConfig).preferences["helpful"].data == "/somewhere/pairs.jsonl"


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (r".*\.(q|v)_proj$", r".*\.(q|v)_proj$"),
        (r"^(a|b)$|c$", r"^(a|b)$|c$"),
        ("costs $$HOME", "costs $HOME"),
        ("$5", "$5"),
        ("$$$PREFVEC_TEST_DATA", "$/somewhere"),
    ],
)
def test_a_dollar_sign_can_be_written(tmp_path, monkeypatch, written, read):
    monkeypatch.setenv("PREFVEC_TEST_DATA", "/somewhere")
    path = tmp_path / "job.yaml"
    path.write_text(
        f"name: job\nbase: b\npreferences: {{helpful: {{data: d}}}}\nlora: {{target_modules: '{written}'}}\n"
    )
    assert load_config(path, TrainingConfig).lora["target_modules"] == read


@pytest.mark.parametrize("written", ["$PREFVEC_NO_SUCH", "${PREFVEC_NO_SUCH}", "${HOME:-here}"])
def test_a_variable_that_is_not_set_is_named_beside_the_way_to_write_a_dollar(tmp_path, written):
    path = tmp_path / "job.yaml"
    path.write_text(f"name: job\nbase: '{written}'\npreferences: {{helpful: {{data: d}}}}\n")
    with pytest.raises(InputError, match=r"(PREFVEC_NO_SUCH|HOME:-here), which is not set; .* write \$\$"):
        load_config(path, TrainingConfig)


@pytest.mark.parametrize(
    ("written", "number"),
    [("5e-7", 5e-7), ("1E5", 1e5), ("-2e+3", -2e3), ("1.0e3", 1e3), (".5e2", 50.0), ("3.e1", 30.0), ("5.0e-07", 5e-7)],
)
def test_a_number_with_an_exponent_is_a_number(tmp_path, written, number):
    path = tmp_path / "job.yaml"
    path.write_text(f"name: job\nbase: b\npreferences: {{helpful: {{data: d}}}}\ndpo: {{learning_rate: {written}}}\n")
    assert load_config(path, TrainingConfig).dpo == {"learning_rate": number}


@pytest.mark.parametrize("text", ["e5", "5e", "1e5x", "0x1e5", "v1e5", "1e5-2"])
def test_text_with_an_e_stays_text(text):
    assert parse_yaml(f"value: {text}", "here")["value"] in (text, 0x1E5)


def test_an_unknown_field_of_the_recipe_is_refused_with_the_closest_one(config):
    with pytest.raises(InputError, match=r"learning_rat .*did you mean 'learning_rate'"):
        config.model_copy(update={"dpo": {"learning_rat": 1e-4}}).check()


def test_a_base_that_is_no_model_folder_is_refused(config, tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        config.model_copy(update={"base": tmp_path}).check()


def test_a_base_that_transformers_would_load_otherwise_is_refused(config, tmp_path):
    shutil.copytree(config.base, tmp_path / "base")
    (tmp_path / "base" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="holds an adapter beside the model"):
        config.model_copy(update={"base": tmp_path / "base"}).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"r": 4}}, "method is 'full'"),
        ({"method": "lora", "lora": {"alpha": 4}}, r"lora\.alpha is not a field .*LoraConfig"),
        ({"resources": Resources(gpus_per_worker=2)}, "a worker drives one GPU"),
        ({"resources": Resources(workers=2, gpus_per_worker=0.5)}, "cannot share a GPU"),
        ({"dpo": {"ddp_backend": "nccl"}}, "no worker has a GPU"),
        ({"dpo": {"fp16": True}}, "no worker has a GPU"),
        ({"dpo": {"fp16": True, "bf16": True}, "resources": Resources(gpus_per_worker=1)}, "choose one"),
        ({"dpo": {"model_init_kwargs": {"dtype": "bfloat16"}}}, "dtype is decided here"),
        ({"dpo": {"loss_type": "kto_pair"}}, r"kto_pair.*is not one of TRL's; did you mean 'n?c?a?.*_pair'"),
        ({"dpo": {"loss_type": ["sigmoid", "exo_pair"]}}, "needs dpo.label_smoothing above 0"),
        ({"dpo": {"loss_type": "aot", "use_weighting": True}}, "cannot be used with the aot losses"),
        (
            {"dpo": {"loss_type": "apo_zero", "f_divergence_type": "js_divergence"}},
            "not defined for loss_type apo_zero",
        ),
        ({"dpo": {"f_divergence_type": "js"}}, "expected one of reverse_kl"),
        ({"dpo": {"loss_weights": [1.0, 2.0]}}, "refuses the recipe: .*same length"),
        ({"deepspeed": "zero4"}, "neither a preset .*zero3-offload.* nor a JSON file"),
        ({"deepspeed": {"zero_optimization": {"stage": 0}}}, "stage must be 1, 2 or 3"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}, "train_batch_size": 8}}, "the recipe decides it"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}}, r"bf16\.enabled is True"),
        (
            {"deepspeed": {"zero_optimization": {"stage": 2}, "bf16": {"bf16_master_weights_and_grads": True}}},
            "no fp32 master weights",
        ),
        ({"dpo": {"learning_rate": "5e-7"}}, r"dpo\.learning_rate: expected float, got '5e-7'"),
        ({"dpo": {"num_train_epochs": True}}, r"dpo\.num_train_epochs: expected float, got True"),
        ({"dpo": {"max_length": 12.5}}, r"dpo\.max_length: expected int \| None, got 12\.5"),
        ({"dpo": {"gradient_checkpointing": "yes"}}, r"dpo\.gradient_checkpointing: expected bool, got 'yes'"),
        ({"dpo": {"learning_rate": 0.0}}, r"dpo\.learning_rate must be above 0"),
        ({"dpo": {"num_train_epochs": -1}}, r"dpo\.num_train_epochs must be above 0"),
        ({"dpo": {"per_device_train_batch_size": 0}}, r"dpo\.per_device_train_batch_size must be above 0"),
        ({"dpo": {"max_steps": 0}}, r"dpo\.max_steps is 0, so nothing would be trained"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}, "sequence_parallel_size": 2}}, "cuts conversations"),
        ({"fsdp": "fsdp1"}, "no preset: give one of fsdp2, fsdp2-offload"),
        ({"fsdp": {"version": 1}}, r"fsdp\.version is decided here"),
        ({"fsdp": {"activation_checkpointing": True}}, r"set dpo\.activation_checkpointing"),
        ({"fsdp": "fsdp2", "deepspeed": "zero3", "resources": Resources(workers=2)}, "remove one"),
        ({"fsdp": "fsdp2"}, r"resources\.workers is 1"),
        ({"dpo": {"train_sampling_strategy": "batch_rebalance"}}, "give group_by_length"),
        (
            {"dpo": {"padding_free": True, "model_init_kwargs": {"attn_implementation": "flash_attention_2"}}},
            "computes with torch's attention, not flash_attention_2",
        ),
        ({"sft": SftStage.model_validate({"data": "x", "padding_free": True})}, "does not cut at sft.max_length"),
        ({"global_batch_size": 24, "resources": Resources(workers=2)}, "no multiple of the 32 pairs"),
        ({"global_batch_size": 32, "dpo": {"gradient_accumulation_steps": 2}}, "remove one of them"),
    ],
)
def test_contradictions_are_refused_before_work_starts(config, changes, message):
    recipe = {**config.dpo, **changes.get("dpo", {})}
    with pytest.raises(InputError, match=message) as refused:
        config.model_copy(update={**changes, "dpo": recipe}).check()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("field", ["deepspeed", "fsdp", "parallelism_config"])
def test_what_has_a_place_of_its_own_cannot_hide_in_the_recipe(field):
    assert "remove it" in refuse(dpo={field: "x"})


def test_the_global_batch_is_the_same_for_any_number_of_workers(config):
    one, four = (
        config.model_copy(update={"global_batch_size": 64, "resources": Resources(workers=workers)})
        for workers in (1, 4)
    )
    assert (one.recipe["gradient_accumulation_steps"], four.recipe["gradient_accumulation_steps"]) == (4, 1)
    assert one.recipe_key == four.recipe_key
    two = config.model_copy(update={"resources": Resources(workers=2)})
    assert two.recipe_key != config.recipe_key  # without it twice the workers are twice the pairs of a step


def test_a_preset_a_file_and_a_mapping_say_the_same(tmp_path):
    file = tmp_path / "zero2.json"
    file.write_text('{"zero_optimization": {"stage": 2}}')
    assert deepspeed_config("zero2") == deepspeed_config(str(file)) == deepspeed_config(PRESETS["zero2"])
    assert deepspeed_config(None) is None
    for preset in PRESETS:
        config = deepspeed_config(preset)
        assert config is not None
        assert config["train_micro_batch_size_per_gpu"] == "auto"
    file.write_text("[")
    with pytest.raises(InputError, match="not JSON"):
        deepspeed_config(str(file))


def test_only_what_is_offloaded_is_summed_up_on_the_cpu_beside_gpus():
    plain, offloaded = (Method(fsdp=fsdp_config(preset)) for preset in ("fsdp2", "fsdp2-offload"))
    assert [process_group(method, gpus=True) for method in (Method(), plain, offloaded)] == [
        *("nccl", "nccl", "cpu:gloo,cuda:nccl")
    ]
    assert process_group(offloaded, gpus=False) == "gloo"


def test_methods_check_on_a_machine_without_gpus(config):
    gpu = config.model_copy(update={"resources": Resources(workers=8, gpus_per_worker=1), "deepspeed": "zero3"})
    gpu.model_copy(update={"dpo": {**config.dpo, "bf16": True, "tf32": True}, "global_batch_size": 128}).check()
    gpu.model_copy(update={"deepspeed": None, "fsdp": "fsdp2-offload"}).check()
    gpu.model_copy(update={"method": "lora", "lora": {"r": 8, "use_rslora": True}}).check()
