"""Vectors beside a base of 4-bit weights, in the format that llm-compressor writes and vLLM reads."""

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from prefvec_ray.serving.engines.base import Request
from prefvec_ray.serving.engines.sampling_params import SamplingParams
from prefvec_ray.vectors import LiveModel, fingerprint

GROUP = 32
WITHIN = 0.05
"""of a logit: what half precision may decide otherwise"""


def in_four_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, in) -> integers from -8 to 7 of the same shape, and a scale for each group of inputs."""
    groups = weight.float().view(weight.shape[0], -1, GROUP)
    scales = (groups.abs().amax(2, keepdim=True) / 7).half().float()
    return (groups / scales).round().clamp(-8, 7).view(weight.shape).long(), scales.squeeze(2)


@pytest.fixture(scope="module")
def quantized(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int4")
    shutil.copytree(base_folder, folder, dirs_exist_ok=True)
    state = {}
    for name, tensor in load_file(base_folder / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            state[name] = tensor.half()
            continue
        numbers, scales = in_four_bits(tensor)
        packed = ((numbers + 8).view(tensor.shape[0], -1, 8) << (4 * torch.arange(8))).sum(2)
        layer = name.removesuffix("weight")
        state[layer + "weight_packed"] = torch.where(packed >= 2**31, packed - 2**32, packed).int()
        state[layer + "weight_scale"] = scales.half()
        state[layer + "weight_shape"] = torch.tensor(tensor.shape)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    config["dtype"] = "float16"
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"all": {"targets": ["Linear"], "weights": weights}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def rounded(base_folder: Path) -> LlamaForCausalLM:
    """The base with the numbers that the quantized copy has, in fp32."""
    model = LlamaForCausalLM.from_pretrained(base_folder).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("proj.weight"):
                numbers, scales = in_four_bits(weight)
                weight.copy_(numbers * scales.repeat_interleave(GROUP, 1))
    return model


def shortfalls(live: LiveModel, prompt: Sequence[int], etas: Mapping[str, float], said: Sequence[int]) -> list[float]:
    """For each token said, how far its logit is below the largest, by the merged model."""
    live.set_coefficients(etas)
    with torch.inference_mode():
        logits = live.model(torch.tensor([[*prompt, *said]])).logits[0, len(prompt) - 1 : -1]
    return (logits.amax(1) - logits.gather(1, torch.tensor(said)[:, None])[:, 0]).tolist()


def test_every_request_gets_its_own_setting_beside_four_bits(make_engine, run, quantized, base_folder, vectors):
    """Every token is the best of a lone merged model of the quantized numbers; by the full ones many are not."""
    draw, requests = random.Random(0), []
    for _ in range(24):
        etas = (("harmless", draw.uniform(-1, 1)), ("helpful", draw.uniform(-1, 1)))
        prompt = tuple(draw.randrange(5, 300) for _ in range(draw.randrange(3, 60)))
        requests.append(Request(prompt, etas, SamplingParams(max_tokens=24, temperature=0.0)))
    engine = make_engine("steered", folder=quantized)
    outputs = run(engine, requests)
    base = fingerprint(base_folder)
    exact = LlamaForCausalLM.from_pretrained(base_folder).eval()
    models = [LiveModel(model, vectors, base_fingerprint=base) for model in (rounded(base_folder), exact)]
    below: list[list[float]] = [[], []]
    for request, output in zip(requests, outputs, strict=True):
        for live, found in zip(models, below, strict=True):
            found += shortfalls(live, request.prompt, dict(request.coefficients), list(output.token_ids))
    assert len(below[0]) > 400
    assert max(below[0]) < WITHIN
    assert sum(short > WITHIN for short in below[1]) > 10, "four bits make a difference, which this test can see"
    engine.close()
