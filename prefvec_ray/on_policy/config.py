"""What `prefvec data make` is given: a base, prompts, and what ranks the answers."""

from pathlib import Path

from pydantic import Field, FiniteFloat

from prefvec_ray.common.errors import InputError
from prefvec_ray.common.names import Name
from prefvec_ray.evaluation.generate import Sampling
from prefvec_ray.scorers.base import Scorer
from prefvec_ray.scorers.config import ScoredPrompts, build_scorers
from prefvec_ray.search.options import Processes


class OnPolicyConfig(ScoredPrompts, Sampling, Processes):
    """Several answers of one base to every prompt, the best and the worst of which become pairs."""

    preference: Name
    """What the pairs are for."""
    base: Path
    """Folder of the base model, with a tokenizer that has a chat template."""
    exclude: list[str] = []
    """Prompts to leave out, each entry as `prompts`: those that vectors will be searched and reported on."""
    rank_by: str | None = None
    """The metric that ranks answers; may be left out where the scorers state one with a direction."""
    samples_per_prompt: int = Field(default=8, ge=2)
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    pairs_per_prompt: int = Field(default=1, ge=1)
    """At most so many: the best answer with the worst, the second best with the second worst, and so on."""
    margin: FiniteFloat = Field(default=0.0, ge=0)
    """A pair's chosen answer is better than its rejected one by more than this."""
    output: Path
    """Folder of the results. Answers that it holds already are not generated again."""

    def ranking(self) -> tuple[Scorer, str]:
        """The scorer, and which of its metrics ranks. InputError where it cannot be built, or does not tell which."""
        scorer = build_scorers(self.scorers, name=self.scorer, cache=self.score_cache)
        directed = [name for name, metric in scorer.metrics.items() if metric.direction]
        if self.rank_by is not None and self.rank_by not in directed:
            raise InputError(
                f"rank_by {self.rank_by!r} is no metric with a direction; those are {', '.join(directed) or 'none'}"
            )
        if self.rank_by is None and len(directed) != 1:
            raise InputError(f"rank_by is left out, and the scorers state {', '.join(directed) or 'none'}; name one")
        return scorer, self.rank_by or directed[0]
