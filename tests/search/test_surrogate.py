"""The processes and the gains that proposals rest on, on made-up scores."""

import numpy as np
import pytest

from prefvec_ray.evaluation import Evaluation
from prefvec_ray.search import Tried, hypervolume
from prefvec_ray.search.surrogate import GaussianProcesses, expected_gain, rank_candidates
from tests.search.test_explore import climb, explore, proposed, world  # noqa: F401


@pytest.fixture
def units() -> np.ndarray:
    return np.random.default_rng(0).random((40, 2))


def smooth(units_ND: np.ndarray) -> np.ndarray:
    a_N, b_N = units_ND.T
    return np.stack([np.sin(3 * a_N) - 0.3 * b_N, 100 + 10 * b_N**2], axis=1)


def test_processes_see_through_noise(units):
    truth = smooth(units)
    noise = np.random.default_rng(1).normal(0, [0.1, 1.0], truth.shape)
    mean, std = GaussianProcesses(units, truth + noise).predict(units)
    assert (np.abs(mean - truth).mean(0) < 0.6 * np.abs(noise).mean(0)).all()
    assert (np.abs(mean - truth) < 4 * std).mean() > 0.95
    elsewhere = np.random.default_rng(2).random((20, 2))
    mean, std = GaussianProcesses(units, truth).predict(elsewhere)
    assert np.abs(mean - smooth(elsewhere)) == pytest.approx(0, abs=0.1), "without noise they are followed"


def test_processes_are_surer_near_what_was_measured():
    _, std = GaussianProcesses(np.array([[0.1], [0.15], [0.2]]), np.array([[0.0], [0.5], [1.0]])).predict(
        np.array([[0.15], [0.9]])
    )
    assert std[0, 0] < std[1, 0]


def test_what_is_expected_changes_no_mean_but_leaves_less_to_learn_there(units):
    processes = GaussianProcesses(units[:10], smooth(units[:10]))
    under_way = np.array([[1.0, 1.0]])
    beside = np.array([[0.97, 0.96]])
    mean, std = processes.predict(beside)
    processes.expect(under_way)
    mean_now, std_now = processes.predict(beside)
    assert mean_now == pytest.approx(mean, rel=1e-3)
    assert (std_now < 0.6 * std).all()
    processes.expect(units[:0])
    assert (processes.predict(beside)[1] == std_now).all(), "nothing is under way"


def test_a_metric_that_is_the_same_everywhere_is_expected_to_stay_so(units):
    mean, std = GaussianProcesses(units, np.ones((40, 1))).predict(np.array([[2.0, -1.0]]))
    assert mean == pytest.approx(1.0)
    assert std == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_the_unit_of_a_metric_does_not_matter(units, scale):
    values = smooth(units)[:, :1]
    both, none = np.hstack([values, -values]), np.empty((40, 0))
    ranked = rank_candidates(units, both * scale, none, units[:0], (-2 * scale, -2 * scale), seed=3)
    expected = rank_candidates(units, both, none, units[:0], (-2.0, -2.0), seed=3)
    assert ranked[0] == pytest.approx(expected[0], abs=0.05)
    mean, std = GaussianProcesses(units, values).predict(units[:3])
    scaled = GaussianProcesses(units, values * scale).predict(units[:3])
    assert scaled[0] == pytest.approx(mean * scale, rel=1e-4)
    assert scaled[1] == pytest.approx(std * scale, rel=1e-3)


@pytest.mark.parametrize("values", [np.zeros((40, 1)), np.eye(40)[:, :1] * 1e6, np.tile([[0.0], [1.0]], (20, 1))])
def test_scores_without_any_shape_are_no_error(units, values):
    mean, std = GaussianProcesses(units, values).predict(units)
    assert np.isfinite(mean).all()
    assert (std > 0).all()


def test_two_measurements_of_one_setting_are_no_error():
    mean, _ = GaussianProcesses(np.array([[0.5], [0.5], [0.5]]), np.array([[0.0], [1.0], [0.5]])).predict(
        np.array([[0.5]])
    )
    assert mean[0, 0] == pytest.approx(0.5, abs=0.05)


def test_the_expected_gain_is_that_of_many_drawn_scores():
    rng = np.random.default_rng(0)
    front = np.array([[0.8, 0.2, 0.5], [0.5, 0.6, 0.3], [0.2, 0.8, 0.6]])
    reference = (0.0, 0.0, 0.0)
    mean = np.array([[0.6, 0.6, 0.6], [0.85, 0.2, 0.5], [0.4, 0.4, 0.3]])
    std = np.array([[0.05, 0.05, 0.05], [0.1, 0.02, 0.02], [0.1, 0.1, 0.1]])
    volume = hypervolume([tuple(point) for point in front], reference)
    drawn = [
        np.mean(
            [
                hypervolume([tuple(point) for point in (*front, rng.normal(m, s))], reference) - volume
                for _ in range(1000)
            ]
        )
        for m, s in zip(mean, std, strict=True)
    ]
    gain = expected_gain(mean, std, front, reference)
    assert gain / gain[0] == pytest.approx(np.array(drawn) / drawn[0], abs=0.03)


def test_the_ends_of_a_front_count_as_in_the_hypervolume():
    """A longer end is worth the whole height above the reference, not what it has above the worst score."""
    front = np.array([[0.8, 0.5], [0.5, 0.7]])
    longer, filled = expected_gain(np.array([[0.9, 0.5], [0.8, 0.7]]), np.full((2, 2), 1e-6), front, (0.0, 0.0))
    assert longer / filled == pytest.approx(0.1 * 0.5 / (0.3 * 0.2), rel=0.1)


def test_without_a_front_a_gain_is_the_volume_above_the_reference():
    gain = expected_gain(np.array([[0.5, 0.5], [1.0, 0.5]]), np.full((2, 2), 1e-6), np.empty((0, 2)), (0.0, 0.0))
    assert gain[1] / gain[0] == pytest.approx(2, rel=0.1)


def test_one_lucky_score_does_not_decide_where_to_look(units):
    """The first objective is best at 1. One setting near 0 was lucky: by the raw scores nothing else reaches it."""
    truth = units[:, :1]
    noisy = truth + np.random.default_rng(3).normal(0, 0.2, truth.shape)
    noisy[units[:, 0].argmin()] = noisy.max() + 0.05
    ranked = rank_candidates(units, noisy, np.empty((40, 0)), units[:0], (0.0,), seed=0)
    assert (ranked[:5, 0] > 0.8).all()


def test_a_limit_is_kept_while_gains_are_sought(units):
    """Both grow with the first coefficient, and the limit is broken above 0.6."""
    gains, slack = units[:, :1] + 0.1, 0.6 - units[:, :1]
    ranked = rank_candidates(units, gains, slack, units[:0], (0.0,), seed=0)
    assert ranked[0, 0] == pytest.approx(0.6, abs=0.07)
    free = rank_candidates(units, gains, slack[:, :0], units[:0], (0.0,), seed=0)
    assert free[0, 0] == 1.0


def test_where_no_setting_keeps_a_limit_one_that_may_is_sought(units):
    low = units * 0.4
    ranked = rank_candidates(low, np.ones((40, 1)), low[:, :1] - 0.7, low[:0], (0.0,), seed=0)
    assert ranked[0, 0] > 0.6


def test_what_is_under_way_is_not_proposed_again(units):
    """Each proposal expects those before it to have come true, so they spread along the front."""
    gains = np.stack([units[:, 0], 1 - units[:, 0] ** 2], axis=1)
    pending = units[:0]
    for _ in range(4):
        ranked = rank_candidates(units[:8], gains[:8], np.empty((8, 0)), pending, (0.0, 0.0), seed=1)
        pending = np.concatenate([pending, ranked[:1]])
    apart = np.abs(pending[:, None, 0] - pending[None, :, 0])[np.triu_indices(4, 1)]
    assert apart.min() > 0.02
    assert apart.max() > 0.3


def test_a_model_that_is_interrupted_proposes_as_if_it_had_not_been(world):  # noqa: F811
    whole = explore(trials=12, sampler="gp")
    climb(whole, world, in_flight=1)
    resumed = explore(trials=12, sampler="gp", known=whole.tried[:9])
    climb(resumed, world, in_flight=1)
    assert [tried.coefficients for tried in resumed.tried] == [tried.coefficients for tried in whole.tried]


def test_a_model_has_something_to_propose_before_anything_is_measured(world):  # noqa: F811
    """More processes than settings to begin with; then the base is the last one to be measured."""
    explorer = explore(trials=30, sampler="gp")
    base, *others = (proposed(explorer) for _ in range(16))
    for proposal in others:
        explorer.finish(proposal.number, Tried(rungs=world(proposal.coefficients), complete=True, answers=64))
    points = [proposal.coefficients for proposal in (base, *others, proposed(explorer))]
    assert not any(explorer.space.near(point, points[:i]) for i, point in enumerate(points))


def test_settings_measured_at_once_are_unlike_each_other_where_the_model_expects_one_best(measured):
    """Everything is best at (0.4, -0.2); eight proposals are under way at once."""

    def rungs(c: dict[str, float]) -> list[Evaluation]:
        off = (c["a"] - 0.4) ** 2 + (c["b"] + 0.2) ** 2
        return [measured(c, help=[0.9 - 0.2 * off] * 16, harm=[0.1 + 0.2 * off] * 16, valid=[1.0] * 16)] * 2

    explorer = explore(trials=20, sampler="gp")
    climb(explorer, rungs, in_flight=8)
    tried = [t.coefficients for t in explorer.tried]
    assert not any(explorer.space.near(point, tried[:i]) for i, point in enumerate(tried))
    assert max(trial.mean("help") for trial in explorer.result().trials) == pytest.approx(0.9, abs=0.002)
