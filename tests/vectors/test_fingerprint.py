"""One identity for a base model, however it is held."""

import json
import os
import shutil
import sys
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

from prefvec_ray.common.errors import InputError
from prefvec_ray.vectors import Checkpoint, checkpoint_state, fingerprint
from prefvec_ray.vectors.checkpoint import check_loaded, checkpoint_layout

TINY_GPT2 = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
fingerprints = sys.modules["prefvec_ray.vectors.fingerprint"]  # the package's function has the module's name
FAMILIES = ["llama", "mistral", "qwen3", "gemma", "phi3", "mixtral", "qwen3_moe"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_live_models_and_folders_agree_however_sharded(family, dtype, tiny_model, tmp_path):
    model = tiny_model(family).to(dtype)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    held = [model, loaded, tmp_path / "whole", str(tmp_path / "sharded"), checkpoint_state(model)]
    assert len({fingerprint(each) for each in held}) == 1


def test_every_number_name_and_dtype_counts(tiny_model):
    model = tiny_model("llama")
    state = {name: tensor.clone() for name, tensor in checkpoint_state(model).items()}
    prints = {fingerprint(state)}
    state["model.norm.weight"][3] = torch.nextafter(state["model.norm.weight"][3], torch.tensor(9.0))
    prints.add(fingerprint(state))
    state["model.norm.weight"] = state["model.norm.weight"].view(1, -1)
    prints.add(fingerprint(state))
    state["other"] = state.pop("model.norm.weight")
    prints.add(fingerprint(state))
    prints.add(fingerprint({name: tensor.double() for name, tensor in state.items()}))
    assert len(prints) == 5


def test_a_tied_head_counts_once_even_where_a_trainer_wrote_it_twice(tiny_model, tmp_path):
    model = tiny_model("gemma")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    expected = fingerprint(model)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    assert fingerprint(tmp_path) == expected
    assert "lm_head.weight" not in Checkpoint(tmp_path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file, {"format": "pt"})
    assert fingerprint(tmp_path) != expected  # not a copy: another model


@pytest.mark.parametrize(("kind", "flag"), [("gemma", None), ("gemma", True), ("gpt2", None), ("gpt2", True)])
def test_a_copy_of_a_tied_head_is_found_as_transformers_ties_it(tiny_model, tmp_path, kind, flag):
    """The config may leave `tie_word_embeddings` to its class, and the embedding may have another name."""
    model = tiny_model("gemma") if kind == "gemma" else AutoModelForCausalLM.from_config(TINY_GPT2)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (tmp_path / "config.json").write_text(json.dumps(config | ({} if flag is None else {"tie_word_embeddings": flag})))
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    (embedding,) = [name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight"))]
    save_file(tensors | {"lm_head.weight": tensors[embedding].clone()}, file, {"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert fingerprint(tmp_path) == fingerprint(loaded)
    assert list(Checkpoint(tmp_path)) == sorted(tensors)


def test_an_untied_head_that_equals_its_embedding_is_a_parameter(tiny_model, tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" in Checkpoint(tmp_path)
    assert fingerprint(tmp_path) == fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path))


def test_a_folder_with_two_models_is_refused(tiny_model, tmp_path):
    """transformers would load the single file, and the index names other weights."""
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="4KB")
    assert fingerprint(tmp_path) == fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path))
    tiny_model("llama").save_pretrained(tmp_path / "single")
    shutil.copy(tmp_path / "single" / "model.safetensors", tmp_path)
    with pytest.raises(InputError, match=r"holds two models, model\.safetensors and the shards"):
        fingerprint(tmp_path)


def test_an_adapter_left_beside_a_base_is_refused(tiny_model, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    wrapped = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"an adapter beside the model.*remove adapter_config\.json"):
        fingerprint(tmp_path)


def test_a_model_with_adapters_is_not_a_base(tiny_model):
    wrapped = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(InputError, match="adapters"):
        fingerprint(wrapped)


def test_a_folder_of_pickles_is_no_checkpoint(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickle"):
        fingerprint(tmp_path)


def test_a_plain_torch_module(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    module.tied = module[0]
    save_file({name: t.contiguous() for name, t in checkpoint_state(module).items()}, tmp_path / "model.safetensors")
    assert fingerprint(module) == fingerprint(tmp_path)
    assert set(checkpoint_state(module)) == {"0.weight", "0.bias", "1.weight", "1.bias"}


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_state_is_the_models_own_memory(family, tiny_model, tokens, tmp_path):
    """Writing another model's numbers through the views makes the model that other model."""
    model, other = tiny_model(family), tiny_model(family, seed=1)
    other.save_pretrained(tmp_path)
    for name, tensor in checkpoint_state(model).items():
        tensor.copy_(Checkpoint(tmp_path)[name])
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, other(tokens).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layout_needs_no_memory(family, tiny_model):
    model = tiny_model(family)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    layout = checkpoint_layout(empty)
    assert layout == checkpoint_layout(model)
    state = checkpoint_state(model)
    for owner, pieces in layout.items():
        parameter = model.get_parameter(owner).detach()
        for piece in pieces:
            view = parameter.as_strided(piece.shape, piece.stride, piece.offset)
            assert torch.equal(view, state[piece.name])


def test_stray_constants_of_old_checkpoints_do_not_count(tiny_model, tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    stray = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(load_file(file) | stray, file, {"format": "pt"})
    assert fingerprint(tmp_path) == fingerprint(model)


def test_an_index_of_a_base_is_checked_too(tiny_model, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="30KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "../x.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match="points to"):
        fingerprint(tmp_path)


def test_a_folder_is_hashed_once_and_again_when_a_file_changes(tmp_path, monkeypatch):
    """Another number in the same file, of the same size, is another fingerprint; so is another file in its place."""
    state = {"a.weight": torch.ones(4, 4), "b.weight": torch.zeros(4)}
    file, hour = tmp_path / "model.safetensors", 3600 * 10**9
    hashed = []
    real = fingerprints.tensor_digest

    def counted(tensor: Tensor) -> str:
        hashed.append(tensor.shape)
        return real(tensor)

    monkeypatch.setattr(fingerprints, "tensor_digest", counted)

    def written(change: float, age: int) -> str:
        save_file(state | {"b.weight": torch.full((4,), change)}, file)
        os.utime(file, ns=(time.time_ns() - age,) * 2)
        return fingerprint(tmp_path)

    first = written(0.0, 2 * hour)
    assert first == fingerprint(state)
    hashed.clear()
    assert fingerprint(tmp_path) == fingerprint(str(tmp_path)) == fingerprint(Checkpoint(tmp_path)) == first
    assert hashed == []

    second = written(1.0, hour)
    assert second != first
    assert len(hashed) == 2
    file.rename(tmp_path / "kept")
    assert written(0.0, hour) == first  # another inode
    os.truncate(tmp_path / "kept", 0)

    # Files that were written a moment ago may change within one tick of the clock: they are not remembered.
    fresh = written(3.0, 0)
    hashed.clear()
    assert fingerprint(tmp_path) == fresh
    assert len(hashed) == 2


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3_text", "opt", "gpt2"])
def test_what_transformers_loads_is_what_the_files_hold(family, tiny_model, tmp_path):
    tiny_model(family).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="30KB")
    for dtype in (torch.float32, torch.bfloat16):
        check_loaded(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype), tmp_path)


def test_a_model_that_is_not_its_files_is_refused(tiny_model, tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-3
    with pytest.raises(InputError, match=r"loads another model\.norm\.weight than its files hold; load"):
        check_loaded(model, tmp_path)


def test_weights_that_transformers_would_make_up_are_refused(tiny_model, tmp_path):
    """A head that the files lack: transformers only warns, and takes random numbers."""
    tiny_model("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"its files do not hold lm_head\.weight, which the model has"):
        check_loaded(AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path)


def test_files_with_other_names_than_the_models_are_refused_and_the_advice_helps(tiny_model, tmp_path):
    """As GPT-2 lies on the hub: without the names of the outer model."""
    tiny_model("gpt2").save_pretrained(tmp_path / "hub")
    file = tmp_path / "hub" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    with pytest.raises(InputError, match=r"do not hold transformer\..*; load and save it once"):
        check_loaded(loaded, tmp_path / "hub")
    loaded.save_pretrained(tmp_path / "saved")
    check_loaded(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), tmp_path / "saved")
