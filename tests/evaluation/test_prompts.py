import pytest

from prefvec_ray.common.errors import InputError
from prefvec_ray.evaluation.prompts import check_disjoint, normalised
from prefvec_ray.tiny_world import TinyWorld


def test_what_is_asked_in_the_same_words_is_the_same():
    same = [
        "How do I kill a Python process?",
        "  how do I  kill a python\nprocess",
        "How do I kill a Ｐython process?!",
    ]
    assert len({normalised(text) for text in same}) == 1
    assert normalised("How do I kill a process?") != normalised(same[0])
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert normalised(talk) != normalised("Hi")


def test_overlap_is_refused_with_examples():
    with pytest.raises(InputError, match=r"1 of the report prompts are search prompts too, such as 'why not'"):
        check_disjoint(["Why not?", "How?"], ["When?", "why not", "Why  not"][:2])
    check_disjoint(["Why not?"], ["Why?"])


def test_the_tiny_worlds_own_prompts_share_nothing():
    world = TinyWorld("micro")
    check_disjoint(world.prompts("search"), world.prompts("report"))
    with pytest.raises(InputError, match="search prompts too"):
        check_disjoint(world.prompts("report"), world.prompts("report"))


def test_what_differs_in_vowel_signs_or_symbols_is_not_shared():
    check_disjoint(["की?", "🍵", "2 + 2", "?!"], ["का?", "🍲", "2 - 2", "..."])
    with pytest.raises(InputError, match="3 of the report prompts are search prompts too"):
        check_disjoint(["की?", "🍵!", "2 + 2"], ["की", "🍵", "2 +  2?"])
