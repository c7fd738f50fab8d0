"""`prefvec eval`: settings of published vectors beside every baseline that a training job's folder allows."""

from collections.abc import Callable
from dataclasses import replace

from prefvec_ray.artifacts.evaluation import Measured, ReportData, SeedResults, Setting
from prefvec_ray.common.errors import InputError
from prefvec_ray.common.redact import redacted
from prefvec_ray.evaluation import baselines, vector_settings
from prefvec_ray.scorers.base import safety_cards
from prefvec_ray.search.config import EvalConfig
from prefvec_ray.search.measure import measure
from prefvec_ray.search.run import check_vectors
from prefvec_ray.search.trial import Task


def plan_table(config: EvalConfig) -> tuple[Task, list[Setting], int]:
    """What `config` asks to measure, checked before an actor starts: the task, its settings, and the training seed.

    The base comes first. With `runs` the job's deltas join the vectors, and the baselines of `settings.baselines` and
    the usual settings of the vectors come before the config's own.

    Raises:
        InputError: nothing to measure, a setting of an unknown vector, a name used twice, a vector of another base, or
            runs that are none or trained other preferences.
    """
    task, run, seed = config.task(), config.training_run(), 0
    table = [Setting(name="base", kind="base", coefficients={})]
    if run is not None:
        seed = config.runs_seed if config.runs_seed is not None else run.seeds[0]
        task = replace(task, vectors={**run.vectors(seed), **task.vectors})
        names = [name for name in run.preferences if name in config.vectors]
        table = [*baselines(names, mixed=run.mixed and names == run.preferences), *vector_settings(names)]
    for name, coefficients in config.settings.items():
        unknown = sorted(set(coefficients) - set(task.vectors))
        if unknown:
            raise InputError(f"setting {name!r} names {unknown}; the vectors are: {', '.join(task.vectors)}")
        taken = next((setting for setting in table if setting.name == name), None)
        if taken is None:
            table.append(Setting(name=name, kind="vectors", coefficients=coefficients))
        elif {k: v for k, v in coefficients.items() if v} != taken.coefficients:
            raise InputError(f"setting {name!r} has the name of {taken.coefficients or 'the base'}; choose another")
    if len(table) == 1:
        raise InputError("nothing to measure but the base: give settings, or the folder of a training job as runs")
    return replace(task, base_fingerprint=check_vectors(task)), table, seed


def evaluate_table(
    config: EvalConfig, plan: tuple[Task, list[Setting], int], progress: Callable[[int, int], None] | None = None
) -> ReportData:
    """Measure a plan on the connected cluster; all of it is paired."""
    task, table, seed = plan
    measured = measure(task, [s.coefficients for s in table], config, progress=progress)
    metrics = task.metrics
    rows = [Measured(setting=setting, evaluation=e) for setting, e in zip(table, measured, strict=True)]
    goals = {name: name for name in config.vectors if name in metrics and metrics[name].direction is not None}
    return ReportData(
        title=f"{len(table)} settings on {len(task.prompts)} prompts",
        objectives=goals,
        metrics=metrics,
        seeds=[SeedResults(seed=seed, table=rows, grid=[])],
        cards=safety_cards(task.load_scorer()),
        config=redacted(config.model_dump(mode="json")),
    )
