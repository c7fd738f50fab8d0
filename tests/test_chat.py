"""What training, evaluation and serving agree on: where an answer ends, and system messages for templates without."""

from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

from prefvec_ray.common.chat import appends_eos, end_tokens, fold_system, text_prompt
from prefvec_ray.common.errors import InputError

BRIEF = {"role": "system", "content": "Be brief."}
KIND = {"role": "developer", "content": "Be kind."}
ASKED = {"role": "user", "content": "the quick fox"}
SAID = {"role": "assistant", "content": "jumps"}


@pytest.mark.parametrize(
    ("config", "eos", "ends"),
    [
        (GenerationConfig(eos_token_id=2), 4, {2, 4}),
        (GenerationConfig(eos_token_id=[0, 4]), 4, {0, 4}),
        (GenerationConfig(eos_token_id=0), None, {0}),
        (GenerationConfig(), 4, {4}),
        (None, 0, {0}),
        (None, None, set()),
    ],
)
def test_an_answer_ends_with_the_generation_configs_tokens_and_the_tokenizers(config, eos, ends):
    assert end_tokens(config, SimpleNamespace(eos_token_id=eos)) == ends


@pytest.mark.parametrize("appends", [True, False])
def test_a_prompt_never_ends_with_an_end_token_that_nobody_wrote(appends):
    words = Tokenizer(models.WordLevel({"?": 0, "<end>": 1, "a": 2, "b": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if appends:
        words.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    assert appends_eos(tokenizer) is appends
    assert text_prompt(tokenizer, "a b") == [2, 3]
    assert text_prompt(tokenizer, "a <end>") == [2, 1]
    assert text_prompt(tokenizer, "") == []


def test_system_messages_go_in_front_of_the_first_user_message():
    folded = {"role": "user", "content": "Be brief.\n\nthe quick fox"}
    assert fold_system([BRIEF, ASKED]) == [folded]
    assert fold_system([BRIEF, ASKED, SAID, ASKED]) == [folded, SAID, ASKED]
    assert fold_system([BRIEF, KIND, ASKED])[0]["content"] == "Be brief.\n\nBe kind.\n\nthe quick fox"
    assert fold_system([ASKED, SAID]) == [ASKED, SAID]


@pytest.mark.parametrize("chat", [[BRIEF], [BRIEF, SAID, ASKED], [ASKED, BRIEF], [BRIEF, ASKED, SAID, KIND, ASKED]])
def test_where_there_is_no_place_for_one_it_is_refused(chat):
    with pytest.raises(InputError, match="system message"):
        fold_system(chat)
