import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace

import pytest
import torch
from rich.console import Console

from prefvec_ray.common.config import parse_config
from prefvec_ray.common.errors import InputError, JobError
from prefvec_ray.scorers import TextPrompt, scorer
from prefvec_ray.search import Processes, Progress, SearchConfig, Task, Tried, measure
from prefvec_ray.search import search as run_search
from prefvec_ray.search.journal import Journal
from prefvec_ray.search.progress import show_progress
from prefvec_ray.search.result import Ended, FailedTrial
from prefvec_ray.search.run import _definition
from prefvec_ray.vectors import save_vector, vector_from_state

OBJECTIVES = ["length", "letters"]


def search(task, folder, *, objectives=OBJECTIVES, progress=None, **options):
    """Every setting in full, unless a test asks for rungs."""
    config = SearchConfig(objectives=objectives, **{"rungs": (1.0,), **options})
    return run_search(task, config, folder, progress=progress)


@pytest.mark.slow
def test_a_search_its_front_and_going_on(task, tmp_path, ray_cluster):
    lines: list[Progress] = []
    settings = {"seed": 3, "actors": 2, "start": [{"left": 1.0}], "ranges": {"right": (-0.5, 1.5)}}
    first = search(task, tmp_path / "s", trials=6, progress=lines.append, **settings)
    assert len(first.trials) == len(lines) == 6
    assert (lines[-1].done, lines[-1].trials, lines[-1].front) == (6, 6, len(first.front))
    tried = [trial.coefficients for trial in first.trials]
    assert {"left": 0.0, "right": 0.0} in tried
    assert {"left": 1.0, "right": 0.0} in tried
    assert all(-1 <= c["left"] <= 1 and -0.5 <= c["right"] <= 1.5 for c in tried)
    assert first.recommended is not None
    assert {path.name for path in (tmp_path / "s").iterdir()} == {"search.json", "trials.jsonl"}, "no checkpoints"

    again = search(task, tmp_path / "s", trials=6, **settings)
    assert (again.trials, again.resumed) == (first.trials, 6)
    with pytest.raises(InputError, match=r"holds a search with other objectives"):
        search(task, tmp_path / "s", objectives=["letters"], trials=6)

    # What a setting scores depends on neither the process nor the order, and needs no Tune.
    measured = measure(task, tried[:3], Processes(actors=1))
    assert [m.per_prompt for m in measured] == [trial.per_prompt for trial in first.trials[:3]]


@pytest.mark.slow
def test_trials_that_raise_score_nan_die_or_hang_never_enter_the_front(task, lengths, tmp_path, ray_cluster):
    calls = tmp_path / "calls"

    @scorer(**lengths.metrics)
    def unreliable(prompts, responses):
        with calls.open("a") as file:
            file.write("x")
            number = file.tell()
        if number == 2:
            raise RuntimeError("the judge is out for lunch")
        if number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 7:
            time.sleep(600)
        scores = lengths(prompts, responses)
        if number == 4:
            scores["letters"][0] = math.nan
        return scores

    task = replace(task, scorer=unreliable)
    seen: list[Progress] = []
    result = search(task, tmp_path / "s", trials=7, actors=1, timeout=10, sampler="random", progress=seen.append)
    assert [now.failure for now in seen if now.failure] == result.failed, "each is reported when it fails"
    assert [now.done for now in seen if not now.failure] == [1, 2, 3, 4]
    errors = [failed.error for failed in result.failed]
    assert errors[0] == "RuntimeError: the judge is out for lunch"
    assert "metric 'letters' gave nan" in errors[1]
    assert errors[2] == "no result within 10 s of a rung; its process was killed"
    assert len(errors) == 3
    assert calls.stat().st_size == 8, "the setting whose process died was measured again, by another process"
    assert len(result.trials) == 4
    assert all(math.isfinite(trial.mean(name)) for trial in result.trials for name in OBJECTIVES)
    bad = [failed.coefficients for failed in result.failed]
    assert not [trial for trial in result.trials if trial.coefficients in bad]
    assert result.stopped == "all 7 settings were tried"


@pytest.mark.slow
def test_a_front_that_stands_still_ends_a_search_for_good(task, lengths, tmp_path, ray_cluster):
    """What is in flight then is cancelled; opened again the result is the same; with more patience it goes on."""

    @scorer(**lengths.metrics)
    def constant(prompts, responses):
        return {"length": [1.0] * len(responses), "letters": [1.0] * len(responses)}

    task = replace(task, scorer=constant)
    lines: list[Progress] = []
    settings = {"trials": 40, "actors": 2, "sampler": "random"}
    patient = search(task, tmp_path / "patient", patience=3, **settings)
    assert "the last 3 settings added nothing" in patient.stopped
    assert len(patient.trials) == 6
    in_flight = patient.trials[4].coefficients

    class Hanging(Task):
        """The setting that is in flight when the front has stood still never comes back."""

        def fidelity_schedule(self, rungs):
            schedule = super().fidelity_schedule(rungs)
            evaluate = schedule.evaluate_rungs

            def evaluate_or_hang(coefficients):
                if coefficients == in_flight:
                    time.sleep(3600)
                return evaluate(coefficients)

            schedule.evaluate_rungs = evaluate_or_hang  # type: ignore[method-assign]
            return schedule

    hanging = Hanging(**{field.name: getattr(task, field.name) for field in fields(task)})
    first = search(hanging, tmp_path / "s", patience=2, progress=lines.append, **settings)
    assert "the last 2 settings added nothing" in first.stopped
    assert [trial.coefficients for trial in first.trials] == [trial.coefficients for trial in patient.trials[:4]]
    assert len(lines) == 4

    again = search(task, tmp_path / "s", patience=2, **settings)
    assert again.model_dump_json() == first.model_copy(update={"resumed": 4}).model_dump_json()
    more = search(task, tmp_path / "s", patience=3, **settings)
    assert more.trials[:4] == first.trials
    assert "the last 3 settings added nothing" in more.stopped
    assert len(more.trials) == 6
    assert search(task, tmp_path / "s", patience=3, **settings).trials == more.trials


def test_a_failing_setting_is_shown_at_once_and_is_no_progress():
    output, bar = io.StringIO(), []
    show = show_progress(Console(file=output, width=60), lambda done, total: bar.append((done, total)))
    failed = FailedTrial(
        coefficients={"left": 1.0}, error="RuntimeError: the judge [out] is out for lunch and for long"
    )
    now = Progress(done=3, trials=7, dropped=0, failed=1, answers=9, front=1, hypervolume=0.1, seconds=2.0)
    show(now)
    assert output.getvalue() == ""
    show(replace(now, failure=failed))
    assert output.getvalue() == f"failed at {{'left': 1.0}}: {failed.error}\n"
    assert bar == [(3, 7), (3, 7)]


def test_a_journal_keeps_how_the_search_ended_unless_it_went_on(tmp_path, measured):
    tried = Tried(rungs=[measured({}, length=1.0)], complete=True, answers=2)
    failed = FailedTrial(coefficients={"left": 1.0}, error="TimeoutError: the judge\nsleeps")
    end = Ended(stopped="all 1 settings were tried", asked={"trials": 1, "start": []}, failed=[failed], seconds=0.1)
    with Journal(tmp_path, {}) as journal:
        assert (journal.done, journal.end) == ([], None)
        journal.add(tried)
    with Journal(tmp_path, {}) as journal:
        assert (journal.done, journal.end) == ([tried], None)  # as every journal of earlier versions
        journal.close_with(end)
    with Journal(tmp_path, {}) as journal:
        assert (journal.done, journal.end) == ([tried], end)
        journal.add(tried)
    with Journal(tmp_path, {}) as journal:
        assert (journal.done, journal.end) == ([tried, tried], None)


@pytest.mark.slow
def test_a_node_that_does_not_see_the_base_ends_the_search_at_once(task, tmp_path, new_cluster, blind_node):
    script = tmp_path / "drive.py"
    script.write_text(SCRIPT)
    with new_cluster(num_cpus=0, include_dashboard=False) as cluster, blind_node(cluster, task.base.parent):
        done = subprocess.run(
            [sys.executable, str(script), str(task.base.parent), str(tmp_path / "s")],
            env={**os.environ, "RAY_ADDRESS": cluster.address},
            capture_output=True,
            text=True,
            timeout=400,
        )
    told = rf"node blind.* does not see {task.base}: is the storage mounted there\?; 0 measured settings are kept in .*"
    last = done.stderr.splitlines()[-1]
    assert re.fullmatch(rf"prefvec_ray.common.errors.JobError: a trial process could not be set up: {told}", last), (
        done.stderr
    )
    # A busy machine is slow to start a process, which is said in a line.
    assert all("the search" in line for line in done.stdout.splitlines()), "no setting is reported as failed for it"


def test_what_cannot_be_loaded_is_one_line_that_names_the_node(task, tmp_path):
    shutil.copytree(task.base, tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text("{}")
    broken = replace(task, base=tmp_path / "base", base_fingerprint="none")
    with pytest.raises(JobError, match=rf"^node {os.uname().nodename}.* cannot load what it is to measure: base .+$"):
        broken.evaluator()
    with pytest.raises(JobError, match=rf"does not see {tmp_path / 'nowhere'}: is the storage mounted"):
        replace(task, vectors={"left": tmp_path / "nowhere"}).evaluator()


@pytest.mark.slow
def test_measuring_survives_a_process_that_dies_and_tells_what_a_scorer_raised(task, lengths, tmp_path, ray_cluster):
    calls = tmp_path / "calls"

    @scorer(**lengths.metrics)
    def unreliable(prompts, responses):
        with calls.open("a") as file:
            file.write("x")
            number = file.tell()
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 4:
            raise RuntimeError("the judge is out for lunch")
        return lengths(prompts, responses)

    settings = [{}, {"left": 1.0}]
    task = replace(task, batch_size=8)  # a setting fills a batch, so they go one by one
    expected = [task.evaluator().evaluate(setting) for setting in settings]
    unsteady = replace(task, scorer=unreliable)
    assert [e.metrics for e in measure(unsteady, settings, Processes(actors=1))] == [e.metrics for e in expected]
    with pytest.raises(JobError, match=r"measuring failed: RuntimeError: the judge is out for lunch$"):
        measure(unsteady, settings, Processes(actors=1))


@pytest.mark.slow
def test_a_search_that_cannot_measure_its_base_ends_and_says_why(task, lengths, tmp_path, ray_cluster):
    @scorer(**lengths.metrics)
    def broken(prompts, responses):
        raise RuntimeError("the judge is out for lunch")

    with pytest.raises(JobError, match=r"the base itself could not be measured: RuntimeError: the judge is out"):
        search(replace(task, scorer=broken), tmp_path / "s", trials=3, actors=1)


def test_another_label_is_another_search(task, tmp_path):
    """A scorer may read it, and what is in the folder was scored by the old one."""
    folder = tmp_path / "s"
    config = SearchConfig(objectives=["length"])

    def opened(label):
        labelled = replace(task, prompts=[TextPrompt("Why?", label)], base_fingerprint="none")
        return Journal(folder, _definition(labelled, config))

    for _ in range(2):
        with opened("safe") as journal:
            assert journal.done == []
    with pytest.raises(InputError, match="holds a search with other prompts"):
        opened("unsafe")


def test_one_search_at_a_time_in_a_folder(task, tmp_path):
    with Journal(tmp_path / "s", {}), pytest.raises(JobError, match="another search is running in"):
        Journal(tmp_path / "s", {})
    with Journal(tmp_path / "s", {}):
        pass


SCRIPT = """
import os, sys, time
from pathlib import Path
import ray
from prefvec_ray.scorers import Metric, scorer
from prefvec_ray.evaluation import Sampling
from prefvec_ray.search import SearchConfig, Task, search

@scorer(length=Metric(direction="minimize", low=0, high=1000), letters=Metric(direction="maximize", low=0, high=1))
def slow(prompts, responses):
    time.sleep(0.3)
    return {
        "length": [float(len(text)) for text in responses],
        "letters": [sum(c.isalpha() for c in text) / max(1, len(text)) for text in responses],
    }

root, folder = map(Path, sys.argv[1:])
local = os.environ["RAY_ADDRESS"] == "local"
ray.init(log_to_driver=False, **({"num_cpus": 1, "include_dashboard": False} if local else {}))
task = Task(base=root / "base", vectors={name: root / name for name in ("left", "right")},
            prompts=["Why?", "How?"], scorer=slow, sampling=Sampling(samples_per_prompt=2, max_new_tokens=12))
config = SearchConfig(objectives=["length", "letters"], trials=10, actors=1, sampler="random")
result = search(task, config, folder, progress=print)
print(result.model_dump_json())
"""


@pytest.mark.slow
def test_a_driver_killed_in_the_middle_goes_on(task, tmp_path):
    script = tmp_path / "drive.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(task.base.parent), str(tmp_path / "s")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    driver = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = tmp_path / "s" / "trials.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (journal.exists() and journal.read_text().count("\n") >= 3):
        assert driver.poll() is None
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = [json.loads(line) for line in journal.read_text().splitlines()]
    with journal.open("a") as file:
        file.write('{"rungs": [{"coefficients": {"left": 0.1')  # a kill in the middle of a line
    assert 3 <= len(before) < 10

    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=True)
    *lines, last = done.stdout.splitlines()
    result = json.loads(last)
    assert result["resumed"] == len(before)
    full = [line["rungs"][-1] for line in before if line["complete"]]
    assert result["trials"][: len(full)] == full, "what was paid for is kept"
    assert len(result["trials"]) + len(result["dropped"]) == 10
    trials = [line for line in lines if line.startswith("search: ")]
    assert len(trials) == 10 - len(before), "one line a trial"
    rest = [line for line in lines if line not in trials]
    assert all("the search is starting" in line for line in rest), "besides, a slow machine says what it waits for"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objectives": ["kindness"]}, "'kindness' is not a metric"),
        ({"ranges": {"up": (0, 1)}}, "a range is given for 'up'"),
        ({"ranges": {"left": (0.2, 1)}}, "it must contain 0, the base"),
        ({"ranges": {"left": (-math.inf, 1)}}, r"ranges\.left\.0: Input should be a finite number"),
        ({"start": [{"left": 7.0}]}, "not within the ranges"),
        ({"start": [{"up": 0.5}]}, "not within the ranges"),
        ({"trials": 0}, "trials: Input should be greater than or equal to 2"),
        ({"trials": 2, "start": [{"left": 0.5}, {"left": 1.0}]}, "2 trials; this search begins with 3 settings"),
        ({"actors": 0}, "actors: Input should be greater than or equal to 1"),
        ({"timeout": 0}, "timeout: Input should be greater than 0"),
        ({"answers": 15}, "a budget of 15 answers; one setting alone takes 16"),
        ({"sampler": "cma"}, "sampler: Input should be 'auto', 'gp', 'tpe', 'nsga2', 'random' or 'grid'"),
        ({"sampler": "grid", "grid_steps": 13}, "begins with 170 settings"),
        ({"patience": 1}, "patience: Input should be greater than or equal to 2"),
        ({"rungs": (0.5, 0.25)}, "expected rising shares"),
    ],
)
def test_bad_requests_are_refused_before_any_work(change, message, task, tmp_path):
    def asked():
        config = parse_config({"objectives": OBJECTIVES, **change}, SearchConfig, source="search")
        return run_search(task, config, tmp_path / "s")

    with pytest.raises(InputError, match=message):
        asked()
    assert not (tmp_path / "s").exists()


def test_a_vector_of_another_base_is_refused_by_name(task, tmp_path):
    stranger = vector_from_state(
        {"model.norm.weight": torch.ones(64)}, preference="left", base_fingerprint="blake3:" + "0" * 64
    )
    save_vector(stranger, tmp_path / "stranger")
    vectors = {**task.vectors, "left": tmp_path / "stranger"}
    with pytest.raises(InputError, match=r"vector 'left' .* belongs to base"):
        search(replace(task, vectors=vectors), tmp_path / "s")
