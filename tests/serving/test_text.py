"""Text as it comes: whole characters only, and nothing that a stop string might still swallow."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from prefvec_ray.serving.engines.text import TextStream

SAID = "Crème brûlée — naïve 狐 🦊 jumps.\nThe end"


def stream(tokenizer: PreTrainedTokenizerBase, ids: list[int], **settings: Any) -> tuple[list[str], TextStream]:
    text = TextStream(tokenizer, settings.pop("prompt", [7]), **settings)
    pieces = []
    for token in ids:
        pieces.append(text.push(token))
        if text.stopped:
            break
    return [*pieces, text.finish()], text


def test_pieces_are_whole_characters_and_join_to_the_text(tokenizer):
    ids = tokenizer(SAID).input_ids
    assert len(ids) > len(SAID.split()), "the fox must take several tokens"
    pieces, _ = stream(tokenizer, ids)
    assert "".join(pieces) == SAID
    assert not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_at_the_end_is_still_told(tokenizer):
    ids = tokenizer("ok 🦊").input_ids[:-1]
    pieces, _ = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert pieces[-1].endswith("\ufffd")


@pytest.mark.parametrize("stop", ["\nThe", " jumps", "C", "狐 🦊", SAID])
def test_a_stop_string_never_shows_not_even_its_beginning(tokenizer, stop):
    pieces, text = stream(tokenizer, tokenizer(SAID).input_ids, stop=[stop, "not there"])
    assert text.stopped
    assert "".join(pieces) == SAID[: SAID.index(stop)]


def test_the_beginning_of_a_stop_string_that_goes_on_otherwise_is_told(tokenizer):
    pieces, text = stream(tokenizer, tokenizer(SAID).input_ids, stop=["The end.", "end of"])
    assert not text.stopped
    assert "".join(pieces) == SAID
    assert pieces[-1].endswith("end"), "held back until it was clear"


def test_special_tokens_have_no_text(tokenizer):
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    ids = [*tokenizer("a").input_ids, user, *tokenizer("b").input_ids]
    assert "".join(stream(tokenizer, ids)[0]) == "ab"
