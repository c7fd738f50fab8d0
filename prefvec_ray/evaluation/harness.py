"""Tasks of EleutherAI's lm-evaluation-harness, asked of the live model at each setting.

A task's value is the mean over its questions, and its standard error that of the harness (`mean_stderr`): both follow
from one number a question, which are kept, so that two settings are compared question by question.
"""

import contextlib
import copy
import io
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from prefvec_ray.artifacts.evaluation import Metric
from prefvec_ray.common.errors import InputError, JobError
from prefvec_ray.common.extras import require
from prefvec_ray.common.paths import this_node
from prefvec_ray.scorers.lm_eval_config import LmEvalConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHARES = ("acc", "acc_norm", "exact_match")
"""Metrics of the harness that lie between 0 and 1."""


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks that were found and read. Travels to the processes that measure, which read them again."""

    config: LmEvalConfig
    metrics: Mapping[str, Metric]
    digest: str
    """Of the tasks' versions, settings and questions."""


@dataclass(frozen=True)
class _Column:
    """A metric: the mean of one of the harness's over the questions of some tasks."""

    name: str
    tasks: tuple[str, ...]
    metric: str
    filter: str
    higher_is_better: bool

    def described(self, shots: Sequence[int]) -> Metric:
        asked = "/".join(str(n) for n in sorted(set(shots)))
        return Metric(
            direction="maximize" if self.higher_is_better else "minimize",
            low=0 if self.metric in SHARES else None,
            high=1 if self.metric in SHARES else None,
            meaning=f"{self.metric} in {self.name} of lm-evaluation-harness, {asked}-shot",
        )


def read_tasks(config: LmEvalConfig) -> HarnessTasks:
    """Find the tasks and read their questions, without a model.

    Raises:
        InputError: the harness is not installed, a task is not known or its data is not to be had here, or its metric
            is not a mean over questions; or it would run what the model writes, or needs pictures or sounds.
    """
    if config.include is not None:  # a process of the cluster may run in another folder
        config = config.model_copy(update={"include": config.include.absolute()})
    tasks, columns = _load(config)
    metrics = {column.name: column.described([_shots(tasks[name]) for name in column.tasks]) for column in columns}
    return HarnessTasks(config, metrics, _digest(config, tasks))


class Harness:
    """The tasks at one live model: `measure` asks it as it stands."""

    def __init__(self, planned: HarnessTasks, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        self._config = planned.config
        try:
            self._tasks, self._columns = _load(planned.config)
        except InputError as error:  # the driver could read them
            raise JobError(f"node {this_node()}: {error}") from error
        if _digest(planned.config, self._tasks) != planned.digest:
            asked = ", ".join(planned.config.tasks)
            raise JobError(f"node {this_node()} has other questions of lm-eval tasks {asked} than the driver")
        from lm_eval.models.huggingface import HFLM

        with _quiet():
            own = copy.deepcopy(tokenizer)  # the harness gives it a padding token where it has none
            self._model = HFLM(pretrained=model, tokenizer=own, batch_size=planned.config.batch_size)

    def measure(self) -> dict[str, list[float | None]]:
        """Metric -> one value a question, None where it is no number."""
        from lm_eval.evaluator import evaluate

        for task in self._tasks.values():
            task.set_fewshot_seed(seed=0)  # the same examples at every setting
        with _quiet():
            found = evaluate(
                self._model,
                {"tasks": self._tasks, "groups": {}, "group_map": {}},
                limit=self._config.limit,
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=self._config.apply_chat_template,
            )
        if found is None:
            raise JobError("lm-evaluation-harness gave no result")
        return {
            column.name: [
                _number(row[column.metric])
                for name in column.tasks
                for row in found["samples"][name]
                if row["filter"] == column.filter
            ]
            for column in self._columns
        }


def _load(config: LmEvalConfig) -> tuple[dict[str, Any], list[_Column]]:
    """The tasks by name, and what is measured of them."""
    require("lm-eval", "lm_eval")
    if config.include is not None and not config.include.is_dir():
        raise InputError(f"include {config.include}: no such folder; give the one with your task files")
    tasks: dict[str, Any] = {}
    columns: list[_Column] = []
    with _quiet():
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=config.include, include_defaults=config.include is None)
        if any(asked not in manager.all_tasks for asked in config.tasks):  # an index of thousands takes seconds
            manager = TaskManager(include_path=config.include)
        for asked in config.tasks:
            if asked not in manager.all_tasks:
                raise InputError(_unknown(asked, manager.all_tasks, config))
            try:
                loaded = manager.load([asked])
            except Exception as error:  # datasets and the hub have no common class of errors
                words = " ".join(str(error).split())
                raise InputError(
                    f"lm-eval task {asked!r} cannot be read ({type(error).__name__}: {words:.300}); its data must be "
                    "on this machine: load it once with network access, or give `include` and local files"
                ) from error
            found = loaded["tasks"]
            for name, task in found.items():
                kinds = {"UNSAFE_CODE": "runs code that the model writes", "MULTIMODAL": "is not of text alone"}
                for kind, what in kinds.items():
                    if getattr(task, kind, False):
                        raise InputError(f"lm-eval task {name!r} {what}; it is not measured here")
            if config.num_fewshot is not None:
                for task in found.values():
                    task.set_config(key="num_fewshot", value=config.num_fewshot)
            if asked in loaded["groups"]:
                _check_group(loaded["groups"][asked])
                columns.append(_column(asked, found, config))
            else:
                columns += [_column(name, {name: task}, config) for name, task in found.items()]
            tasks |= found
    names = [column.name for column in columns]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"lm-eval task {twice!r} is named twice")
    return tasks, columns


def _column(name: str, tasks: Mapping[str, Any], config: LmEvalConfig) -> _Column:
    from lm_eval.api.registry import get_aggregation

    mean = get_aggregation("mean")
    first = next(iter(tasks.values()))
    wanted, _, kept = (config.metric or "").partition(",")
    offered = [metric for metric, how in first.aggregation().items() if how is mean]
    metric = wanted or next(iter(offered), "")
    for task_name, task in tasks.items():
        if task.aggregation().get(metric) is not mean:
            others = ", ".join(m for m, how in task.aggregation().items() if how is mean) or "none"
            raise InputError(
                f"lm-eval task {task_name!r}: {metric or 'its metric'} is no mean over questions, so it has no paired "
                f"errors; metrics of this task that are: {others}"
            )
    filters = [each.name for each in getattr(first, "_filters", [])] or ["none"]
    if kept and kept not in filters:
        raise InputError(f"lm-eval task {name!r} has no filter {kept!r}; it has: {', '.join(filters)}")
    return _Column(name, tuple(tasks), metric, kept or filters[0], bool(first.higher_is_better()[metric]))


def _check_group(group: Any) -> None:
    """InputError for a group whose score is not the mean over all its questions."""
    for aggregate in getattr(group, "aggregate_metric_list", None) or []:
        if not getattr(aggregate, "weight_by_size", True):
            raise InputError(
                f"lm-eval group {group.name!r} counts each of its tasks alike, whatever their size; name its tasks"
            )


def _unknown(name: str, known: Sequence[str], config: LmEvalConfig) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=3)
    where = f" and {config.include}" if config.include else ""
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"no task {name!r} in lm-evaluation-harness{where}{hint}"


def _shots(task: Any) -> int:
    return int(task.get_config("num_fewshot") or 0)


def _digest(config: LmEvalConfig, tasks: Mapping[str, Any]) -> str:
    """Of what is asked: each task's version and the questions, in their order."""
    kept = config.model_dump(mode="json", exclude={"include", "batch_size"})
    content = blake3(json.dumps(kept).encode())
    for name, task in tasks.items():
        content.update(json.dumps([name, str(task.VERSION), _shots(task)]).encode())
        for number, doc in enumerate(task.eval_docs):
            if config.limit is not None and number >= config.limit:
                break
            content.update(json.dumps(doc, sort_keys=True, default=repr).encode())
    return content.hexdigest()[:16]


def _number(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's log lines and bars. What it prints where it fails is in its exception."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(level)
