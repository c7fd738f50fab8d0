import pytest

from prefvec_ray.common.errors import InputError
from prefvec_ray.evaluation import Evaluation, check_control, grid, improves, monotone, valid_everywhere
from prefvec_ray.evaluation.control import coupling, mean_path
from prefvec_ray.scorers import Metric

METRICS = {
    "helpful": Metric(direction="maximize", low=0, high=1),
    "harm": Metric(direction="minimize", low=0, high=1),
    "valid": Metric(direction="maximize", low=0, high=1),
}


@pytest.fixture
def net(measured):
    """A 3 x 3 grid on which `helpful` rises with its coefficient and `harm` falls with that of `safe`."""

    def make(dip: float = 0.0) -> list[Evaluation]:
        evaluations = []
        for point in grid(["help", "safe"], steps=3):
            a, b = point["help"], point["safe"]
            helpful = 0.5 + 0.2 * a - 0.1 * b - (dip if (a, b) == (1, -1) else 0)
            evaluations.append(measured(point, helpful=helpful, harm=0.5 - 0.3 * b, valid=0.95))
        return evaluations

    return make


def test_good_control_holds_in_every_claim(net):
    claims = check_control(net(), {"help": "helpful", "safe": "harm"}, METRICS)
    assert [claim.holds for claim in claims] == [True] * 5
    assert "0.300 → 0.500 → 0.700" in claims[0].evidence
    assert "6 of 6 steps hold" in claims[1].evidence
    assert "0.800 → 0.500 → 0.200; worst step +0.300" in claims[2].evidence, (
        "a falling metric that is minimized improves"
    )


def test_one_dip_fails_its_line_and_says_where(net):
    on_mean, on_lines = monotone(net(dip=0.25), "help", "helpful", METRICS)
    assert on_mean.holds, "the mean over the other coefficient still rises"
    assert not on_lines.holds
    assert "5 of 6 steps hold; worst step -0.050" in on_lines.evidence
    assert "from (help 0, safe -1) to (help 1, safe -1)" in on_lines.evidence


def test_the_tolerance_is_stated_and_kept(net):
    inside, outside = net(dip=0.2 + 0.019), net(dip=0.2 + 0.021)
    assert monotone(inside, "help", "helpful", METRICS)[1].holds
    claim = monotone(outside, "help", "helpful", METRICS)[1]
    assert not claim.holds
    assert "tolerance 0.02" in claim.text


def test_planes_of_three_preferences_have_lines_too(measured):
    points = grid(["a", "b", "c"], steps=3)
    evaluations = [measured(p, helpful=0.5 + 0.1 * p["a"], harm=0.1, valid=0.9) for p in points]
    path = dict(mean_path(evaluations, "a", "helpful"))
    assert path == pytest.approx({eta: 0.5 + 0.1 * eta for eta in (-1, 0, 1)})
    assert all(claim.holds for claim in monotone(evaluations, "a", "helpful", METRICS))
    with pytest.raises(InputError, match="no line along 'd'"):
        monotone(evaluations, "d", "helpful", METRICS)


def test_validity_names_the_worst_point(net, measured):
    evaluations = [*net(), measured({"help": 2.0, "safe": 2.0}, helpful=0, harm=0, valid=0.4)]
    claim = valid_everywhere(evaluations, floor=0.9)
    assert not claim.holds
    assert "9 of 10 points hold; lowest 0.400" in claim.evidence
    assert "(help 2, safe 2)" in claim.evidence


def test_an_improvement_must_exceed_its_paired_error(measured):
    base = measured({}, helpful=0.5, harm=0.3, valid=1.0)
    noisy = measured({"help": 1.0}, helpful=0.51, harm=0.29, valid=1.0, spread=0.06)
    clear = measured({"help": 1.0}, helpful=0.51, harm=0.29, valid=1.0)
    names = ("new", "base")
    assert not improves(noisy, base, "helpful", METRICS, names=names).holds
    assert improves(clear, base, "helpful", METRICS, names=names).holds, "paired: the prompts' spread cancels"
    assert improves(clear, base, "harm", METRICS, names=names).holds
    assert not improves(base, clear, "helpful", METRICS, names=names).holds
    assert not improves(base, base, "helpful", METRICS, names=names).holds


def test_coupling_finds_the_slopes_and_their_errors(net, measured):
    effects = {(e.preference, e.metric): e.slope for e in coupling(net(), ["helpful", "harm", "valid"])}
    slopes = {key: round(slope.mean, 6) for key, slope in effects.items()}
    assert slopes == {
        ("help", "helpful"): 0.2, ("safe", "helpful"): -0.1, ("help", "harm"): 0.0, ("safe", "harm"): -0.3,
        ("help", "valid"): 0.0, ("safe", "valid"): 0.0,
    }  # fmt: skip
    assert effects["help", "helpful"].n == 4
    assert effects["help", "helpful"].stderr == pytest.approx(0, abs=1e-9), "the prompts' own levels cancel"
    tilted = [
        e.model_copy(update={"per_prompt": {"helpful": [0.0, 0.1 * e.coefficients["help"], None, 0.0]}}) for e in net()
    ]
    (slope,) = [e.slope for e in coupling(tilted, ["helpful"]) if e.preference == "help"]
    assert slope.n == 3, "a prompt without values is left out"
    assert slope.mean == pytest.approx(0.1 / 3)
    assert slope.stderr == pytest.approx(0.1 / 3)
    with pytest.raises(InputError, match="the same prompts"):
        coupling([*net(), measured({}, helpful=1).model_copy(update={"prompts_digest": "other"})], ["helpful"])


def test_a_coefficient_that_never_moves_has_no_effect(measured):
    line = [measured({"a": a, "b": 0.0}, helpful=a) for a in (-1.0, 0.0, 1.0)]
    (effect,) = coupling(line, ["helpful"])
    assert effect.preference == "a"
    assert effect.slope.mean == pytest.approx(1.0)
