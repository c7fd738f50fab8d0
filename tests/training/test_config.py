import pytest

from prefvec_ray.config import load_config, parse_config
from prefvec_ray.errors import InputError
from prefvec_ray.training import TrainingConfig

GOOD = {"name": "job", "base": "base", "preferences": {"helpful": {"data": "pairs.jsonl"}}}


def refuse(**changes: object) -> str:
    with pytest.raises(InputError) as refused:
        parse_config({**GOOD, **changes}, TrainingConfig, source="job.yaml")
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_typo_is_named_beside_the_settings_that_exist():
    message = refuse(sedes=[1])
    assert "job.yaml" in message
    assert "'sedes'" in message
    assert "seeds" in message.split("known here:")[1]


def test_a_typo_deeper_down_names_the_settings_of_its_section():
    message = refuse(resources={"worker": 2})
    assert "'resources.worker'" in message
    assert "workers" in message.split("known here:")[1]


@pytest.mark.parametrize("name", ["mixed", "a/b", "..", "so good"])
def test_names_that_cannot_be_a_preference_are_refused(name: str):
    assert repr(name) in refuse(preferences={name: {"data": "pairs.jsonl"}})


def test_what_the_plan_decides_cannot_be_set_in_the_recipe():
    assert "give `seeds`" in refuse(dpo={"seed": 3})


def test_a_seed_given_twice_is_refused():
    assert "twice" in refuse(seeds=[1, 1])


def test_a_missing_file_broken_yaml_and_an_unset_variable_are_refused(tmp_path):
    path = tmp_path / "job.yaml"
    with pytest.raises(InputError, match="no such file"):
        load_config(path, TrainingConfig)
    path.write_text("name: [unclosed")
    with pytest.raises(InputError, match="not readable as YAML"):
        load_config(path, TrainingConfig)
    path.write_text("name: job\nbase: ${PREFVEC_NO_SUCH_VARIABLE}/base\n")
    with pytest.raises(InputError, match="PREFVEC_NO_SUCH_VARIABLE"):
        load_config(path, TrainingConfig)


def test_variables_are_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFVEC_TEST_DATA", "/somewhere")
    path = tmp_path / "job.yaml"
    path.write_text("name: job\nbase: base\npreferences: {helpful: {data: '${PREFVEC_TEST_DATA}/pairs.jsonl'}}\n")
    assert load_config(path, TrainingConfig).preferences["helpful"].data == "/somewhere/pairs.jsonl"


def test_an_unknown_field_of_the_recipe_is_refused_with_the_closest_one(config):
    with pytest.raises(InputError, match=r"learning_rat .*did you mean 'learning_rate'"):
        config.model_copy(update={"dpo": {"learning_rat": 1e-4}}).check()


def test_a_base_that_is_no_model_folder_is_refused(config, tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        config.model_copy(update={"base": tmp_path}).check()
