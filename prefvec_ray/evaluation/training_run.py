"""What a finished training job left in its folder: the vectors and deltas of one seed, and the held-out pairs."""

from pathlib import Path

from prefvec_ray.artifacts.training import MIXED, TrainingSummary
from prefvec_ray.common.errors import InputError
from prefvec_ray.common.extras import require
from prefvec_ray.common.files import read_model, taking_apart
from prefvec_ray.evaluation.likelihood import TokenPair, cut_pairs

ADVICE = "train again, or copy the folder again"


class TrainingRun:
    """The folder of a training job (`prefvec train`), read through its `training.json`.

    Raises:
        InputError: there is no finished job in the folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        record = self.folder / "training.json"
        if not record.is_file():
            raise InputError(f"runs {folder}: no training.json there; give the folder of a finished `prefvec train`")
        self.summary = read_model(record, TrainingSummary, ADVICE)

    @property
    def preferences(self) -> list[str]:
        """In the order of the job's config."""
        return self.summary.preferences

    @property
    def seeds(self) -> list[int]:
        return self.summary.seeds

    @property
    def mixed(self) -> bool:
        """Whether a run on all preferences' pairs was made."""
        return any(run.spec.preference == MIXED for run in self.summary.runs)

    @property
    def base(self) -> Path:
        """Folder of the base that the vectors belong to."""
        return self._at(self.summary.base)

    def vectors(self, seed: int) -> dict[str, Path]:
        """By the names that `settings.baselines` uses: every phi (`helpful`), every positive run's own delta
        (`helpful+`) and `mixed`.

        Raises:
            InputError: no run has that seed.
        """
        if seed not in self.seeds:
            raise InputError(f"runs {self.folder}: no run of seed {seed}; there are: {', '.join(map(str, self.seeds))}")
        with taking_apart(str(self.folder / "training.json"), ADVICE):
            found = {p: self._at(self.summary.vector(p, seed)) for p in self.preferences}
        for spec in (run.spec for run in self.summary.runs):
            if spec.seed == seed and spec.polarity == "positive":
                found[MIXED if spec.preference == MIXED else spec.name] = self._at(spec.out) / "delta"
        return found

    def pairs(self) -> dict[str, list[TokenPair]]:
        """The held-out pairs of every preference, tokenized and cut as the job's own evaluation saw them."""
        require("train", "trl")
        from datasets import load_from_disk
        from trl import DPOConfig

        found = {}
        default = DPOConfig.__dataclass_fields__["max_length"].default
        for spec in (run.spec for run in self.summary.runs):
            for name, folder in spec.test.items():
                if name not in found:
                    where = self._at(folder)
                    try:
                        rows = load_from_disk(str(where))
                    except (OSError, ValueError, KeyError, TypeError) as error:  # of `datasets` and Arrow
                        raise InputError(
                            f"{where}: held-out pairs cannot be read ({error!s:.200}); {ADVICE}"
                        ) from error
                    with taking_apart(str(where), ADVICE):
                        pairs = [TokenPair(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in rows]
                    found[name] = cut_pairs(pairs, spec.dpo.get("max_length", default))
        return found

    def _at(self, recorded: str | Path) -> Path:
        """A recorded path, or the same place under this folder where the job's folder has been moved."""
        path = Path(recorded)
        if not path.exists():
            for depth in range(1, len(path.parts)):
                here = self.folder.joinpath(*path.parts[depth:])
                if here.exists():
                    return here
        return path
