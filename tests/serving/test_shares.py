"""Shares alone; what the engine makes of them is in test_slots.py."""

from prefvec_ray.serving.engines.slots.shares import Shares


def test_a_pass_is_shared_by_its_requests():
    shares = Shares()
    for caller in ("a", "a", "a", "b"):
        shares.enter(caller)
    shares.charge(["a", "a", "a", "b"], 8.0)
    assert (shares.had("a"), shares.had("b")) == (6.0, 2.0)


def test_nobody_saves_up_a_claim_while_away():
    shares = Shares()
    shares.enter("a")
    shares.charge(["a"], 100.0)
    shares.enter("b")
    assert shares.had("b") == 100.0, "otherwise a would wait until b has had as much"
    shares.charge(["b"], 5.0)
    shares.enter("c")
    assert shares.had("c") == 100.0, "the least of those who are busy"


def test_who_comes_back_is_a_credit_behind_the_others_once():
    shares = Shares()
    shares.credit = 2.0
    for caller in ("a", "b"):
        shares.enter(caller)
    shares.charge(["a"], 100.0)
    shares.leave("b")
    shares.enter("b")
    assert shares.had("b") == 98.0
    shares.charge(["b"], 1.5)
    shares.leave("b")
    shares.enter("b")
    assert shares.had("b") == 99.5, "leaving does not renew it"


def test_leaving_between_requests_pays_nothing_back():
    shares = Shares()
    for caller in ("a", "b"):
        shares.enter(caller)
    shares.charge(["a"], 9.0)
    shares.leave("a")
    shares.enter("a")
    assert shares.had("a") == 9.0
    shares.charge(["b"], 20.0)
    shares.leave("a")
    assert shares.had("a") == 0.0, "less than whoever is busy: not kept"
    shares.leave("b")
    shares.enter("b")
    assert shares.had("b") == 0.0, "an engine that had nothing to do begins anew"


def test_only_who_is_busy_is_charged():
    shares = Shares()
    shares.enter("a")
    shares.charge(["gone"], 3.0)
    assert shares.had("gone") == 0.0
