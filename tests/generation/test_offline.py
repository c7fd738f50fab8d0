import pytest
import torch
from transformers import LlamaForCausalLM

from prefvec_ray.common.errors import InputError
from prefvec_ray.generation.base import EngineError, Request
from prefvec_ray.generation.config import EngineOptions
from prefvec_ray.generation.offline import OfflineEngine
from prefvec_ray.generation.sampling_params import SamplingParams
from prefvec_ray.vectors import LiveModel, fingerprint, vector_from_state

GREEDY = SamplingParams(max_tokens=12, temperature=0, detokenize=False)
PROMPT = (20, 21, 22, 23)


def test_auto_steers_what_can_be_steered_and_merges_the_rest(base_folder, tokenizer, vectors, merged_alone):
    base, options = fingerprint(base_folder), EngineOptions(max_batch=3)
    low = OfflineEngine.load(base_folder, base, tokenizer, vectors, options)
    settings = [{"helpful": 1.0}, {}, {"harmless": -0.5, "helpful": 0.2}, {"helpful": 1.0}]
    asked = [Request(PROMPT, low.coefficients(setting), GREEDY) for setting in settings]
    assert [list(a) for a in low.answer(asked)] == [merged_alone(PROMPT, setting, 12) for setting in settings]
    assert low.with_model(lambda model, use: hasattr(model.model.layers[0].mlp.up_proj.forward, "steered"))
    low.close()

    model = LlamaForCausalLM.from_pretrained(base_folder).eval()
    draw = torch.Generator().manual_seed(0)
    delta = {name: 0.05 * torch.randn(p.shape, generator=draw) for name, p in model.named_parameters()}
    full = {"polite": vector_from_state(delta, preference="polite", base_fingerprint=base)}
    merged = OfflineEngine.load(base_folder, base, tokenizer, full, options)
    (answer,) = merged.answer([Request(PROMPT, merged.coefficients({"polite": 1.0}), GREEDY)])
    merged.close()
    LiveModel(model, full, base_fingerprint=base).set_coefficients({"polite": 1.0})
    ids = torch.tensor([PROMPT])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
    assert list(answer) == out[0, len(PROMPT) :].tolist()
    with pytest.raises(InputError, match="is in full form"):
        OfflineEngine.load(base_folder, base, tokenizer, full, EngineOptions(mode="steered"))


def test_a_request_that_cannot_be_answered_fails_its_call_alone(base_folder, tokenizer, vectors):
    engine = OfflineEngine.load(base_folder, fingerprint(base_folder), tokenizer, vectors, EngineOptions())
    fine = Request(PROMPT, engine.coefficients({}), GREEDY)
    with pytest.raises(InputError, match="exceed the model's context of 512"):
        engine.answer([fine, Request(PROMPT * 200, engine.coefficients({}), GREEDY)])
    with pytest.raises(InputError, match="NaN or infinity at these coefficients"):
        engine.answer([Request(PROMPT, engine.coefficients({"helpful": 1e38}), GREEDY)])
    with pytest.raises(InputError, match="unknown preference 'polite'"):
        engine.coefficients({"polite": 1.0})
    assert engine.answer([]) == []
    assert len(engine.answer([fine, fine])) == 2
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.answer([fine])
    with pytest.raises(EngineError, match="closed"):
        engine.with_model(lambda model, use: None)
