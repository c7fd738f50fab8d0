"""What one trial actor does: keep the base and the vectors, and for each trial only merge, sample and score."""

import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune

from prefvec_ray.artifacts.evaluation import Metric
from prefvec_ray.common.errors import InputError, JobError
from prefvec_ray.common.paths import check_visible, this_node
from prefvec_ray.evaluation.evaluate import all_metrics
from prefvec_ray.evaluation.generate import BATCH_SIZE, Sampling
from prefvec_ray.evaluation.harness import HarnessTasks
from prefvec_ray.evaluation.likelihood import TokenPair, margin_metrics
from prefvec_ray.scorers import Scorer, load_scorer
from prefvec_ray.scorers.base import check_prompts
from prefvec_ray.search.result import Tried
from prefvec_ray.search.rungs import Block, FidelitySchedule, plan_rungs

if TYPE_CHECKING:
    from prefvec_ray.artifacts.evaluation import Evaluation
    from prefvec_ray.evaluation import Evaluator


@dataclass(frozen=True)
class Task:
    """What to measure at every setting. Travels to the trial actors; models and vectors travel as folders."""

    base: Path
    """Folder of the base model, tokenizer included."""
    vectors: dict[str, Path]
    """Name -> vector folder. The actors of a node memory-map these, and the base, and so share one copy."""
    prompts: Sequence[Any]
    """The search prompts, never the ones that are reported on."""
    scorer: Scorer | str
    """A scorer, or `module:function`."""
    sampling: Sampling = field(default_factory=Sampling)
    batch_size: int = BATCH_SIZE
    template: bool = True
    base_fingerprint: str = ""
    """Of the base; the driver fills it in, so that the actors need not hash the model."""
    threads: int = 1
    """Torch threads of an actor."""
    measures: tuple[str, ...] = ()
    """`likelihood.MEASURES` of the answers: kl, perplexity."""
    pairs: Mapping[str, Sequence[TokenPair]] = field(default_factory=dict)
    """Held-out pairs by preference, for their implicit margins."""
    harness: tuple[HarnessTasks, ...] = ()
    """Tasks of lm-evaluation-harness."""

    @property
    def metrics(self) -> dict[str, Metric]:
        """Everything that is measured: the scorer's metrics, those of `measures`, of `pairs` and of `harness`."""
        return all_metrics(self.load_scorer(), self.measures, margin_metrics(self.pairs), self.harness)

    def check(self) -> None:
        """InputError for prompts that the scorer cannot score."""
        check_prompts(self.load_scorer(), self.prompts)

    def load_scorer(self) -> Scorer:
        return load_scorer(self.scorer) if isinstance(self.scorer, str) else self.scorer

    def blocks(self, rungs: Sequence[float] = (1.0,)) -> list[list[Block]]:
        """What each rung adds; InputError where `rungs` are not shares that rise to 1."""
        return plan_rungs(len(self.prompts), self.sampling.samples_per_prompt, rungs, self.sampling.seed)

    def evaluator(self) -> "Evaluator":
        """The live model of this process, ready to measure settings in full. Heavy: once a process.

        Raises:
            InputError, JobError: as `fidelity_schedule`.
        """
        return self.fidelity_schedule((1.0,)).evaluators[0]

    def fidelity_schedule(self, rungs: Sequence[float]) -> FidelitySchedule:
        """The live model of this process, ready to measure settings rung by rung. Heavy: once a process.

        Raises:
            InputError: the scorer, or what it is given, cannot be used; as `blocks`.
            JobError: this node does not see a folder, or the base, a vector or the scorer cannot be loaded here; one
                line that names the node. Another process on this node would only fail again.
        """
        check_visible(self.base, *self.vectors.values())
        try:
            return self._loaded(rungs)
        except (InputError, JobError):
            raise
        except Exception as error:
            raise JobError(f"node {this_node()} cannot load what it is to measure: {in_a_line(error)}") from error

    def _loaded(self, rungs: Sequence[float]) -> FidelitySchedule:
        from prefvec_ray.common.pretrained import load_for_sampling
        from prefvec_ray.evaluation import Evaluator
        from prefvec_ray.vectors import Checkpoint, LiveModel, load_vector

        try:
            model, tokenizer = load_for_sampling(self.base, threads=self.threads)
        except InputError as error:  # the driver has read this base: it is this node that cannot
            raise JobError(f"node {this_node()} cannot load what it is to measure: {error}") from error
        live = LiveModel(
            model,
            {name: load_vector(folder) for name, folder in self.vectors.items()},
            base=Checkpoint(self.base),
            base_fingerprint=self.base_fingerprint,
            threads=self.threads,
        )
        scorer = self.load_scorer()

        def make(block: Block, first: bool) -> Evaluator:
            return Evaluator(
                live,
                tokenizer,
                [self.prompts[i] for i in block.prompts],
                scorer,
                self.sampling.model_copy(update={"samples_per_prompt": block.samples, "seed": block.seed}),
                batch_size=self.batch_size,
                template=self.template,
                measures=self.measures,
                # Pairs and tasks need no answers: measuring them once a setting is enough.
                pairs=self.pairs if first else None,
                tasks=self.harness if first else (),
            )

        return FidelitySchedule(make, self.blocks(rungs))


class Trial(tune.Trainable):
    """A Tune trainable of one step a rung; the actor lives on with its model (`reuse_actors`).

    A scorer that raises costs its setting, not the actor: the error is a result like any other.
    """

    def setup(self, config: dict[str, Any], task: Task, rungs: Sequence[float]) -> None:
        self.unfit = ""
        try:
            self.schedule = task.fidelity_schedule(rungs)
        except (InputError, JobError) as error:  # Tune would start a process anew that can only fail again
            self.unfit = str(error)
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        if not self.unfit:
            self.evaluations: Iterator[Evaluation] = self.schedule.evaluate_rungs(new_config["coefficients"])
        self.rungs: list[Evaluation] = []
        return True

    def step(self) -> dict[str, Any]:
        if self.unfit:
            return {"error": self.unfit, "unfit": True, "done": True}
        if not self.rungs:
            self.began = time.time()
        try:
            evaluation = next(self.evaluations)
        except Exception as error:
            return {"error": in_a_line(error), "done": True}
        # Samples of the last rung are kept; those before it are the same.
        self.rungs = [*(earlier.model_copy(update={"samples": []}) for earlier in self.rungs), evaluation]
        measured = self.schedule.rungs[: len(self.rungs)]
        tried = Tried(
            rungs=self.rungs,
            complete=len(self.rungs) == len(self.schedule.rungs),
            answers=sum(block.answers for blocks in measured for block in blocks),
            process=f"{platform.node()}:{os.getpid()}",
            began=self.began,
            ended=time.time(),
        )
        return {"tried": tried.model_dump_json(), "done": tried.complete}


def in_a_line(error: Exception) -> str:
    """The error's type and its message, however long, as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:2000]
