"""System messages and a chat template that refuses them."""

import asyncio
import shutil
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from prefvec_ray.common.errors import InputError
from prefvec_ray.serving.config import ServingConfig
from prefvec_ray.serving.engines.sampling_params import SamplingParams
from prefvec_ray.serving.release.release import resolve_release
from prefvec_ray.serving.request import GenerationRequest

REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
BRIEF = {"role": "system", "content": "Be brief."}
ASKED = {"role": "user", "content": "the quick fox"}
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


@pytest.fixture(scope="module")
def without_system_role(base_folder, tmp_path_factory):
    """The base with a chat template as Gemma's, which knows no system role."""
    folder = shutil.copytree(base_folder, tmp_path_factory.mktemp("gemma") / "base")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = REFUSES + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("system", ["template", "fold"])
def test_the_operator_decides(make_replica, without_system_role, registry_root, tokenizer, system):
    settings = {"model": "tiny", "base": without_system_role, "registry": registry_root}
    config = ServingConfig.model_validate(settings | ({"system": system} if system != "template" else {}))
    replica = make_replica(config, resolve_release(config))

    def told(*prompts: Any) -> list[Any]:
        job = GenerationRequest(prompts, (("harmless", 0.0), ("helpful", 0.5)), GREEDY)
        return asyncio.run(replica.answer(job))[1]

    try:
        if system == "template":
            with pytest.raises(InputError, match="refuses these messages: System role not supported"):
                told((BRIEF, ASKED))
        else:
            ids = tokenizer("<|user|>Be brief.\n\nthe quick fox<|end|><|assistant|>").input_ids
            folded, spelled = told((BRIEF, ASKED), tuple(ids))
            assert folded == spelled
    finally:
        replica.engine.close()
