"""What training, evaluation and serving agree on: where an answer ends, and system messages for templates without."""

from types import SimpleNamespace

import pytest
from transformers import GenerationConfig

from prefvec_ray.common.chat import end_tokens, fold_system
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
