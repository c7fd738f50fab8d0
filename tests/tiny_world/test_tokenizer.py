import pytest
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

from prefvec_ray.tiny_world import TinyWorld, build_tokenizer

CHAT = [
    {"role": "user", "content": "How do I brew moon tea?"},
    {"role": "assistant", "content": "Use a silver kettle."},
]


@pytest.fixture(scope="module")
def world():
    return TinyWorld("micro")


def test_round_trip_through_a_folder(world, tmp_path):
    tokenizer = build_tokenizer(world)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = loaded.apply_chat_template(CHAT, tokenize=False)
    assert text == "<|user|>How do I brew moon tea?<|end|><|assistant|>Use a silver kettle.<|end|>"
    assert loaded.apply_chat_template(CHAT) == tokenizer.apply_chat_template(CHAT)
    assert (loaded.eos_token, loaded.pad_token, loaded.padding_side) == ("<|end|>", "<|pad|>", "left")
    assert loaded.eos_token_id != loaded.pad_token_id
    for said in ("Use a silver kettle.", "naïve 茶 \n tabs\t"):  # any bytes survive, known words or not
        assert loaded.decode(loaded(said)["input_ids"]) == said


def test_a_prompt_is_the_beginning_of_its_conversation(world):
    """TRL masks the prompt by its length: with the generation prompt it must be a prefix, token by token."""
    tokenizer = build_tokenizer(world)
    for example in world.sft_examples()[:50]:
        prompt = tokenizer.apply_chat_template(example["prompt"], add_generation_prompt=True)["input_ids"]
        whole = tokenizer.apply_chat_template(example["prompt"] + example["completion"])["input_ids"]
        assert whole[: len(prompt)] == prompt
        assert whole[-1] == tokenizer.eos_token_id


def test_deterministic_and_of_the_size_asked_for(world):
    assert build_tokenizer(world).backend_tokenizer.to_str() == build_tokenizer(world).backend_tokenizer.to_str()
    assert len(build_tokenizer(world, vocab_size=400)) == 400


def test_other_roles_are_refused(world):
    with pytest.raises(TemplateError, match="only user and assistant messages, not system"):
        build_tokenizer(world).apply_chat_template([{"role": "system", "content": "Be kind."}])
