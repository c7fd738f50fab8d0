"""Preference data at the start of a job: split and checked as its config says."""

import json
import re
import shutil

import pytest
import torch
from datasets import load_from_disk
from transformers import AutoModelForCausalLM

from prefvec_ray.common.errors import InputError
from prefvec_ray.training import PreferenceData
from prefvec_ray.training.model import base_ends, load_tokenizer
from prefvec_ray.training.references import working_base
from prefvec_ray.training.train import prepare_data
from prefvec_ray.vectors import fingerprint


@pytest.fixture
def job(config, tmp_path):
    """Write rows to a file and give the job that trains on it."""

    def make(rows, **fields):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return config.model_copy(update={"preferences": {"helpful": PreferenceData(data=str(path), **fields)}})

    return make


def chat(i, *before):
    turns = [*before, {"role": "user", "content": f"How {i}?"}]
    answers = ([{"role": "assistant", "content": f"Use {what}."}] for what in ("a kettle", "a broom"))
    return dict(zip(("prompt", "chosen", "rejected"), (turns, *answers), strict=True))


def test_warnings_and_what_made_the_format_are_handed_on(job):
    prepared = prepare_data(job([chat(i) for i in range(100)]))["helpful"]
    assert (prepared.pairs, prepared.test_pairs, prepared.format) == (90, 10, "trl")
    assert prepared.why == "its first row has the fields prompt, chosen, rejected"
    assert any("10 pairs held out" in text for text in prepared.warnings)


def test_garbage_is_refused_before_anything_is_written(job, tmp_path):
    with pytest.raises(InputError, match="helpful: 200 of 300 pairs repeat another pair"):
        prepare_data(job([chat(i) for i in range(100)] * 3))
    with pytest.raises(InputError, match="row 101: field 'prompt' is missing"):
        prepare_data(job([*(chat(i) for i in range(100)), {"chosen": [], "rejected": []}]))
    rows = job([chat(i) for i in range(100)])
    leaks = PreferenceData(data=rows.preferences["helpful"].data, test=rows.preferences["helpful"].data)
    with pytest.raises(InputError, match="held-out prompts are trained on"):
        prepare_data(rows.model_copy(update={"preferences": {"helpful": leaks}}))
    assert not (rows.folder / "data").exists()


def test_system_messages_need_a_template_that_takes_them_or_are_folded(job):
    rows = [chat(i, {"role": "system", "content": "Be kind."}) for i in range(100)]
    with pytest.raises(InputError, match=r"chat template refuses 90 of 90 pairs .* not system.*; or set system: fold"):
        prepare_data(job(rows))
    prepared = prepare_data(job(rows, system="fold"))["helpful"]
    assert load_from_disk(prepared.train)[0]["prompt"][0]["content"].startswith("Be kind.\n\nHow ")
    assert "100 system messages folded into the first user message" in prepared.notes


def test_held_out_pairs_are_named_once():
    with pytest.raises(ValueError, match="give one of them"):
        PreferenceData(data="a.jsonl", test="b.jsonl", test_split="test")


def test_fewer_pairs_than_a_batch_are_refused_where_the_last_batch_is_dropped(job):
    six = job([chat(i) for i in range(7)])
    dropping = six.model_copy(update={"dpo": {"per_device_train_batch_size": 8, "dataloader_drop_last": True}})
    with pytest.raises(InputError, match=r"helpful: \d pairs make no batch of 8; lower per_device_train_batch_size"):
        prepare_data(dropping)
    assert prepare_data(six)["helpful"].pairs < 8


def test_a_templated_base_is_never_taken_for_that_of_another_base(job, tmp_path):
    """The links of an earlier job of this name lead to the base of that job."""
    rows = [chat(i) for i in range(100)]
    first = job(rows).model_copy(update={"chat_template": "transcript"})
    prepare_data(first)
    prepare_data(first)
    other = tmp_path / "other"
    shutil.copytree(first.base, other)
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.01)
    model.save_pretrained(other)
    with pytest.raises(InputError, match=r"made from another base than .*other.*another name, or delete that folder"):
        prepare_data(first.model_copy(update={"base": other}))
    moved = tmp_path / "moved"
    other.rename(moved)
    second = first.model_copy(update={"base": moved, "name": "second"})
    prepare_data(second)
    assert fingerprint(working_base(second)) == fingerprint(moved)
    shutil.rmtree(moved)
    with pytest.raises(InputError):
        prepare_data(second)


def test_pairs_beyond_the_context_of_the_base_are_refused(job):
    rows = [chat(i) for i in range(100)]
    for row in rows:
        row["chosen"][0]["content"] += " now" * 300
    with pytest.raises(InputError, match=r"and the base has a context of \d+; set dpo\.max_length to \d+ or less"):
        prepare_data(job(rows))


def test_the_templated_base_ends_answers_as_its_template_does(job, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|pad|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    given = job([chat(i) for i in range(100)]).model_copy(update={"chat_template": str(template)})
    prepared = prepare_data(given)["helpful"]
    assert not any("template" in warning for warning in prepared.warnings)
    base = working_base(given)
    tokenizer = load_tokenizer(base)
    assert base_ends(base, tokenizer) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|pad|>")}
    assert base_ends(given.base, tokenizer) == {tokenizer.eos_token_id}, "the base itself is as it was"


def test_a_base_whose_files_lack_a_weight_is_refused_before_data_is_written(config, tmp_path):
    from safetensors.torch import load_file, save_file

    base = tmp_path / "headless"
    shutil.copytree(config.base, base)
    tensors = load_file(base / "model.safetensors")
    name = next(name for name in tensors if name.endswith("mlp.up_proj.weight"))
    del tensors[name]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    broken = config.model_copy(update={"base": base})
    with pytest.raises(InputError, match=rf"its files do not hold {re.escape(name)}, which the model has"):
        prepare_data(broken)
    assert not (broken.folder / "data").exists()
