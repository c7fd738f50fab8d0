"""LoRA adapters as vectors: checked on products and whole-model logits, never on A and B apart."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from prefvec_ray.common.errors import InputError
from prefvec_ray.vectors import LowRank, checkpoint_state, fingerprint
from prefvec_ray.vectors.adapters import vector_from_adapter, vectors_from_adapters
from prefvec_ray.vectors.algebra import combine, merge

VARIANTS = {
    "alpha": {"r": 4, "lora_alpha": 7, "target_modules": "all-linear"},
    "rslora": {
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "target_modules": ["q_proj", "o_proj", "down_proj"],
    },
    "patterns": {
        "r": 4,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 2},
        "alpha_pattern": {"v_proj": 20},
    },
    "saved modules": {
        "r": 2,
        "target_modules": ["q_proj"],
        "modules_to_save": ["lm_head", "norm", "input_layernorm"],
    },
    "embeddings": {"r": 3, "target_modules": ["embed_tokens", "k_proj"]},
    "biases": {"r": 2, "target_modules": ["q_proj"], "bias": "all"},
    "lora bias": {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_bias": True},
}


def trained(base, seed, **options):
    """A PEFT model whose adapter is not at its (zero) start."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * 0.2
                parameter.copy_(noise if "lora_" in name else parameter + noise)
    return model.eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_is_kept_exactly(variant, base, tokens, tmp_path):
    run = trained(base, 1, **VARIANTS[variant])
    run.save_pretrained(tmp_path)
    vector = vector_from_adapter(tmp_path, base=base, preference="helpful+")
    live = AutoModelForCausalLM.from_pretrained(base)
    live.load_state_dict(merge(checkpoint_state(live), {"p": vector}, {"p": 1.0}))
    with torch.no_grad():
        torch.testing.assert_close(live(tokens).logits, run(tokens).logits, atol=2e-5, rtol=1e-4)
    assert vector.digest() == vector_from_adapter(run, base=base, preference="x").digest()


def test_two_adapters_make_one_vector_of_both_ranks(base, tmp_path):
    runs = [
        trained(base, 1, r=4, lora_alpha=8, target_modules=["q_proj"]),
        trained(base, 2, r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj"]),
    ]
    vector = vectors_from_adapters(*runs, base=base, preference="helpful")
    name = "model.layers.1.self_attn.q_proj"
    deltas = [run.get_submodule(f"base_model.model.{name}").get_delta_weight("default") for run in runs]
    entry = vector.entry(f"{name}.weight")
    assert isinstance(entry, LowRank)
    assert entry.rank == 7
    torch.testing.assert_close(vector.dense(f"{name}.weight"), deltas[0] - deltas[1], atol=1e-6, rtol=1e-5)
    assert vector.info.form == "low-rank"
    assert vector.info.base_fingerprint == fingerprint(base)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_adapters_on_fused_experts(family, tiny_model, tokens, tmp_path):
    tiny_model(family).save_pretrained(tmp_path / "base")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    run = trained(tmp_path / "base", 3, r=2, lora_alpha=4, target_modules=["q_proj"], target_parameters=targets)
    run.save_pretrained(tmp_path / "run")
    vector = vector_from_adapter(tmp_path / "run", base=tmp_path / "base", preference="helpful+")
    entries = [vector.entry(name) for name in vector.names()]
    assert all(isinstance(entry, LowRank) and entry.rank == 2 for entry in entries)
    live = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    state = checkpoint_state(live)
    with torch.no_grad():
        for name, tensor in merge(state, {"p": vector}, {"p": 1.0}).items():
            state[name].copy_(tensor)
        torch.testing.assert_close(live(tokens).logits, run(tokens).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"layer_replication": [(0, 2), (0, 2)]}, "layer_replication"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(options, named, base, tmp_path):
    trained(base, 1, r=2, target_modules=["q_proj"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | options
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=named):
        vector_from_adapter(tmp_path, base=base, preference="p")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda config: config | {"peft_type": "LOHA"}, "LOHA"),
        (lambda config: config | {"use_tomorrows_trick": True}, "use_tomorrows_trick"),
        (lambda config: config | {"rank_pattern": {"q_proj": 5}}, "has shape"),
        (lambda config: config | {"target_modules": ["q_proj", "k_proj"]}, "lacks"),
        (lambda config: config | {"target_modules": ["k_proj"]}, "lacks"),
        (lambda config: [], "not a PEFT adapter"),
        (lambda config: config | {"target_modules": r"(?=a)\w+"}, "target_modules.*bounded time"),
        (lambda config: config | {"target_modules": r"([\w.]+)+!"}, "match nothing of the base"),
        (lambda config: config | {"rank_pattern": {f"m{i}": 2 for i in range(9999)}}, "rank_pattern has 9999 entries"),
        (lambda config: config | {"layers_to_transform": [0], "layers_pattern": "(a+)+"}, "layers_pattern"),
        (lambda config: config | {"r": None, "lora_alpha": "16"}, "lora_alpha"),
        (lambda config: config | {"rank_pattern": None, "alpha_pattern": {"q_proj": [1]}}, "alpha_pattern"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change, named, base, tmp_path):
    trained(base, 1, r=2, target_modules=["q_proj"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(InputError, match=named):
        vector_from_adapter(tmp_path, base=base, preference="p")


def test_patterns_that_backtrack_cannot_hang(base, tmp_path):
    """Python's `re` would try 2^n ways of this key on every module; RE2 reads each name once."""
    trained(base, 1, r=2, target_modules=["q_proj"]).save_pretrained(tmp_path)
    before = vector_from_adapter(tmp_path, base=base, preference="p").digest()
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    config |= {"rank_pattern": {r"(([a-z_.0-9])+)+!": 7}, "alpha_pattern": {r"(([a-z_.0-9])+)+!": 7}}
    file.write_text(json.dumps(config | {"target_modules": r"(([a-z_.0-9])+)+q_proj"}))
    assert vector_from_adapter(tmp_path, base=base, preference="p").digest() == before


def test_tensors_that_do_not_fit_are_refused(base, tmp_path):
    trained(base, 1, r=2, target_modules=["q_proj"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = min(tensors)
    save_file(tensors | {"base_model.model.extra.lora_A.weight": torch.ones(2, 2)}, file)
    with pytest.raises(InputError, match="unexpected"):
        vector_from_adapter(tmp_path, base=base, preference="p")
    save_file(tensors | {name: torch.full_like(tensors[name], float("nan"))}, file)
    with pytest.raises(InputError, match="NaN"):
        vector_from_adapter(tmp_path, base=base, preference="p")
    file.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(InputError, match="pickle"):
        vector_from_adapter(tmp_path, base=base, preference="p")


def test_a_base_that_is_none_is_refused(base, tmp_path):
    run = trained(base, 1, r=2, target_modules=["q_proj"])
    with pytest.raises(InputError, match="no such file or folder"):
        vector_from_adapter(run, base=tmp_path / "nothing", preference="p")
    (tmp_path / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"no config\.json"):
        vector_from_adapter(run, base=tmp_path, preference="p")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        vector_from_adapter(run, base=tmp_path, preference="p")


def test_lora_on_tied_embeddings_is_refused(tiny_model, tmp_path):
    tiny_model("gemma").save_pretrained(tmp_path)
    run = trained(tmp_path, 1, r=2, target_modules=["embed_tokens"])
    assert isinstance(run, PeftModel)
    with pytest.raises(InputError, match="tied"):
        vector_from_adapter(run, base=tmp_path, preference="p")


def test_peft_cat_agrees_and_peft_linear_does_not(base):
    """The same combination through PEFT: `cat` puts factors side by side as we do; `linear` adds A to A and B to B,
    which is another matrix: (B1 + B2)(A1 + A2) is not B1 A1 + B2 A2."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    eta = {"a": 1.0, "b": -1.0}
    model = trained(base, 1, **options)
    other = trained(base, 2, **options)
    model.add_adapter("second", other.peft_config["default"])
    model.load_state_dict(
        {name.replace(".default", ".second"): t for name, t in other.state_dict().items() if ".default" in name},
        strict=False,
    )
    vectors = {
        "a": vector_from_adapter(model, base=base, preference="a"),
        "b": vector_from_adapter(other, base=base, preference="b"),
    }
    ours = combine(vectors, eta, preference="both")
    errors = {}
    for kind in ("cat", "linear"):
        model.add_weighted_adapter(["default", "second"], list(eta.values()), kind, combination_type=kind)
        theirs = {
            f"{path.removeprefix('base_model.model.')}.weight": layer.get_delta_weight(kind)
            for path, layer in model.named_modules()
            if hasattr(layer, "get_delta_weight")
        }
        assert sorted(theirs) == ours.names()
        lost = sum((theirs[name] - ours.dense(name)).square().sum() for name in ours.names())
        errors[kind] = float((lost / sum(ours.dense(name).square().sum() for name in ours.names())).sqrt())
    assert errors["cat"] < 1e-6
    assert errors["linear"] > 0.5
