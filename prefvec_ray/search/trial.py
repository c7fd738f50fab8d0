"""What is measured at every setting: base, vectors, prompts and scorer, as they travel to processes that measure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefvec_ray.artifacts.evaluation import Metric
from prefvec_ray.common.errors import InputError, JobError
from prefvec_ray.common.paths import check_visible, this_node
from prefvec_ray.evaluation.evaluate import all_metrics
from prefvec_ray.evaluation.generate import Sampling
from prefvec_ray.evaluation.likelihood import TokenPair, margin_metrics
from prefvec_ray.generation.config import EngineOptions
from prefvec_ray.scorers import Scorer, load_scorer
from prefvec_ray.scorers.base import check_prompts
from prefvec_ray.search.rungs import Block, FidelitySchedule, plan_rungs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from prefvec_ray.evaluation import Evaluator
    from prefvec_ray.generation.offline import OfflineEngine


@dataclass(frozen=True)
class Task:
    """What to measure at every setting. Models and vectors travel as folders."""

    base: Path
    """Folder of the base model, tokenizer included."""
    vectors: dict[str, Path]
    """Name -> vector folder. The processes of a node memory-map these, and the base, and so share one copy."""
    prompts: Sequence[Any]
    """The search prompts, never the ones that are reported on."""
    scorer: Scorer | str
    """A scorer, or `module:function`."""
    sampling: Sampling = field(default_factory=Sampling)
    engine: EngineOptions = field(default_factory=EngineOptions)
    """How the answers are generated."""
    template: bool = True
    base_fingerprint: str = ""
    """Of the base; the driver fills it in, so that the processes need not hash the model."""
    measures: tuple[str, ...] = ()
    """`likelihood.MEASURES` of the answers: kl, perplexity."""
    pairs: Mapping[str, Sequence[TokenPair]] = field(default_factory=dict)
    """Held-out pairs by preference, for their implicit margins."""

    @property
    def metrics(self) -> dict[str, Metric]:
        """Everything that is measured: the scorer's metrics, those of `measures` and those of `pairs`."""
        return all_metrics(self.load_scorer(), self.measures, margin_metrics(self.pairs))

    def check(self) -> None:
        """InputError for prompts that the scorer cannot score."""
        check_prompts(self.load_scorer(), self.prompts)

    def load_scorer(self) -> Scorer:
        return load_scorer(self.scorer) if isinstance(self.scorer, str) else self.scorer

    def blocks(self, rungs: Sequence[float] = (1.0,)) -> list[list[Block]]:
        """What each rung adds; InputError where `rungs` are not shares that rise to 1."""
        return plan_rungs(len(self.prompts), self.sampling.samples_per_prompt, rungs, self.sampling.seed)

    def evaluator(self) -> "Evaluator":
        """The engine of this process, ready to measure settings in full. Heavy: once a process.

        Raises:
            InputError, JobError: as `fidelity_schedule`.
        """
        return self.fidelity_schedule((1.0,)).evaluators[0]

    def fidelity_schedule(self, rungs: Sequence[float]) -> FidelitySchedule:
        """The engine of this process, ready to measure settings rung by rung. Heavy: once a process.

        Raises:
            InputError: the scorer, or what it is given, cannot be used; as `blocks`.
            JobError: this node does not see a folder, or the base, a vector or the scorer cannot be loaded here; one
                line that names the node. Another process on this node would only fail again.
        """
        check_visible(self.base, *self.vectors.values())
        try:
            engine, tokenizer = self._loaded()
        except Exception as error:
            raise JobError(f"node {this_node()} cannot load what it is to measure: {in_a_line(error)}") from error
        try:
            scorer = self.load_scorer()
        except (InputError, JobError):
            raise
        except Exception as error:
            raise JobError(f"node {this_node()} cannot load the scorer: {in_a_line(error)}") from error
        from prefvec_ray.evaluation import Evaluator

        def make(block: Block, first: bool) -> Evaluator:
            return Evaluator(
                engine,
                tokenizer,
                [self.prompts[i] for i in block.prompts],
                scorer,
                self.sampling.model_copy(update={"samples_per_prompt": block.samples, "seed": block.seed}),
                template=self.template,
                measures=self.measures,
                # Pairs need no answers: measuring them once a setting is enough.
                pairs=self.pairs if first else None,
            )

        return FidelitySchedule(make, self.blocks(rungs))

    def _loaded(self) -> "tuple[OfflineEngine, PreTrainedTokenizerBase]":
        import torch
        from transformers import AutoTokenizer
        from transformers.utils import logging

        from prefvec_ray.generation.offline import OfflineEngine
        from prefvec_ray.vectors import fingerprint, load_vector

        torch.set_num_threads(self.engine.threads)
        logging.disable_progress_bar()
        tokenizer = AutoTokenizer.from_pretrained(self.base, trust_remote_code=False)
        vectors = {name: load_vector(folder) for name, folder in self.vectors.items()}
        expected = self.base_fingerprint or fingerprint(self.base)
        return OfflineEngine.load(self.base, expected, tokenizer, vectors, self._engine_options()), tokenizer

    def _engine_options(self) -> EngineOptions:
        """On a CPU `auto` merges settings that fill more than half of a batch by themselves: that is faster there."""
        import torch

        options, answers = self.engine, len(self.prompts) * self.sampling.samples_per_prompt
        if options.kind == "vllm" or torch.cuda.is_available() or 2 * answers <= options.max_batch:
            return options
        return options.model_copy(update={"mode": "merged"}) if options.mode == "auto" else options


def in_a_line(error: Exception) -> str:
    """The error's type and its message, however long, as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:2000]
