import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from prefvec_ray.common.errors import InputError
from prefvec_ray.preferences import load_split, split_by_prompt

TRL = {"prompt": "How?", "chosen": "Like this.", "rejected": "No."}


def rows(n, chat=False):
    texts = [TRL | {"prompt": f"How {i}?"} for i in range(n)]
    if not chat:
        return texts
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [{key: [{"role": roles[key], "content": text}] for key, text in row.items()} for row in texts]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=40), st.floats(0.01, 0.99), st.integers(0, 3))
def test_split_by_prompt_never_shares_a_prompt(prompts, fraction, seed):
    dataset = Dataset.from_list([{"prompt": str(p), "chosen": str(i), "rejected": "x"} for i, p in enumerate(prompts)])
    if len(set(prompts)) == 1:
        with pytest.raises(InputError, match="all rows share one prompt"):
            split_by_prompt(dataset, fraction, seed)
        return
    train, test = split_by_prompt(dataset, fraction, seed)
    assert not set(train["prompt"]) & set(test["prompt"])
    assert sorted([*train["chosen"], *test["chosen"]]) == sorted(dataset["chosen"])
    assert len(train) > 0
    assert len(test) > 0


def test_split_refuses_an_impossible_fraction():
    with pytest.raises(InputError, match="test_fraction is 1"):
        split_by_prompt(Dataset.from_list([TRL]), 1)


@pytest.mark.parametrize("chat", [False, True])
def test_the_same_prompts_are_held_out_whatever_the_order_and_the_company(chat):
    held_out = [
        {str(prompt) for prompt in split_by_prompt(Dataset.from_list(given), 0.2)[1]["prompt"]}
        for given in (rows(200, chat), rows(200, chat)[::-1], rows(190, chat))
    ]
    assert len(held_out[0]) == 40
    assert held_out[0] == held_out[1]
    assert len(held_out[0] & held_out[2]) >= 36
    assert held_out[0] != {
        str(prompt) for prompt in split_by_prompt(Dataset.from_list(rows(200, chat)), 0.2, 1)[1]["prompt"]
    }


def test_prompts_that_differ_in_white_space_or_unicode_form_only_stay_together():
    variants = ["Café au lait?", "Cafe\u0301 au lait?", " Café  au\u00a0lait?\n", "Café\u3000au lait?"]
    dataset = Dataset.from_list([TRL | {"prompt": text} for text in [*variants, *(f"How {i}?" for i in range(20))]])
    for seed in range(10):
        train, _ = split_by_prompt(dataset, 0.3, seed)
        assert sum(prompt in variants for prompt in train["prompt"]) in (0, 4)


def test_held_out_pairs_from_a_source_of_their_own(tmp_path):
    split = load_split(rows(9), test=rows(3), rows=5)
    assert split.loaded_test is not None
    assert (len(split.train), len(split.test), split.loaded_test.rows) == (5, 3, 3)
    assert split.train[0] == rows(1)[0]
    with pytest.raises(InputError, match="must both be texts or conversations"):
        load_split(rows(9), test=rows(3, chat=True))


def test_rows_limits_training_and_not_what_is_held_out():
    split = load_split(rows(50), rows=7, test_fraction=0.2)
    assert (len(split.train), len(split.test)) == (7, 10)
