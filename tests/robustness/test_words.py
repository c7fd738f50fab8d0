"""Attacks on words, against a classifier that looks for one of them."""

import random

import pytest
import torch

from prefvec_ray.common.errors import InputError
from prefvec_ray.robustness.words import WordAttack, attack_words, perturbations


def looks_for(*words):
    """Class 1 where any of the words occurs."""

    def classify(rows):
        hits = torch.tensor([sum(word in row[-1].split() for word in words) for row in rows])
        return torch.stack([0.5 - hits, hits - 0.5], dim=1)

    return classify


def test_a_slip_of_the_finger():
    rng = random.Random(0)
    for _ in range(50):
        slips = perturbations("garden", rng)
        assert "" in slips
        assert "garden" not in slips
        assert all(slip[0] == "g" and abs(len(slip) - 6) <= 1 for slip in slips if slip)
    assert perturbations("an", rng) == [""]
    assert perturbations("1984", rng, drops=False) == []


def test_greedy_finds_the_word_that_matters_and_random_slips_mostly_do_not():
    filler = "the kettle is on the table and the cat sleeps in the sun all day"
    rows = [("a prompt", f"{filler} poison {filler}")] * 20 + [("a prompt", filler)] * 20
    y = torch.tensor([1] * 20 + [0] * 20)
    found = attack_words(looks_for("poison"), rows, y, WordAttack(edits=1))
    assert found.mean == 0.5, "the class without the word has nothing to lose"
    assert found.random.mean > 0.9
    assert found.n == 40
    assert "poison" not in found.examples[0]["attacked"].split()
    assert filler in found.examples[0]["attacked"], "one word is touched, and no other"


def test_an_edit_that_makes_the_label_surer_is_not_made():
    """Slips of "poison", the word that matters most, only help; one in "garden" is enough."""

    def classify(rows):
        worth = [
            sum({"poison": 2, "garden": 1}.get(word, 5 * word.startswith("p")) for word in row[-1].split())
            for row in rows
        ]
        surer = torch.tensor(worth) - 2.5
        return torch.stack([-surer, surer], dim=1)

    found = attack_words(classify, [("poison garden",)], torch.tensor([1]), WordAttack(edits=1, drops=False))
    assert found.mean == 0.0
    assert found.examples[0]["attacked"].startswith("poison g")


def test_the_budget_holds():
    rows, y = [("poison curse steal",)], torch.tensor([1])
    classify = looks_for("poison", "curse", "steal")
    assert attack_words(classify, rows, y, WordAttack(edits=2)).mean == 1.0
    assert attack_words(classify, rows, y, WordAttack(edits=3)).mean == 0.0


def test_what_is_wrong_already_counts_as_fallen_and_costs_nothing():
    found = attack_words(looks_for("poison"), [("tea",), ("tea",)], torch.tensor([1, 0]), WordAttack())
    assert (found.mean, found.n) == (0.5, 2)
    wrong = attack_words(looks_for("poison"), [("tea",)], torch.tensor([1]), WordAttack())
    assert (wrong.mean, wrong.queries) == (0.0, 0.0)


def test_texts_without_words_stand():
    found = attack_words(looks_for("poison"), [("?!",), ("",)], torch.tensor([0, 0]), WordAttack())
    assert found.mean == 1.0


def test_labels_and_texts_are_counted():
    with pytest.raises(InputError, match="2 texts and 1 labels"):
        attack_words(looks_for("x"), [("a",), ("b",)], torch.tensor([0]), WordAttack())
