"""What a finished training job left in its folder: the vectors and deltas of one seed, and the held-out pairs."""

from pathlib import Path
from typing import Any

from prefvec_ray.common.errors import InputError
from prefvec_ray.common.extras import require
from prefvec_ray.common.files import read_json, taking_apart
from prefvec_ray.evaluation.likelihood import TokenPair, cut_pairs
from prefvec_ray.evaluation.settings import MIXED

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
        self.summary: dict[str, Any] = read_json(record, ADVICE)
        with taking_apart(str(record), ADVICE):
            self.specs: list[dict[str, Any]] = [_spec(run["spec"]) for run in self.summary["runs"]]
            self.summary["vectors"] = {str(key): str(folder) for key, folder in self.summary["vectors"].items()}

    @property
    def preferences(self) -> list[str]:
        """In the order of the job's config."""
        return [name for name in dict.fromkeys(spec["preference"] for spec in self.specs) if name != MIXED]

    @property
    def seeds(self) -> list[int]:
        return list(dict.fromkeys(spec["seed"] for spec in self.specs))

    @property
    def mixed(self) -> bool:
        """Whether a run on all preferences' pairs was made."""
        return any(spec["preference"] == MIXED for spec in self.specs)

    def vectors(self, seed: int) -> dict[str, Path]:
        """By the names that `settings.baselines` uses: every phi (`helpful`), every positive run's own delta
        (`helpful+`) and `mixed`.

        Raises:
            InputError: no run has that seed.
        """
        if seed not in self.seeds:
            raise InputError(f"runs {self.folder}: no run of seed {seed}; there are: {', '.join(map(str, self.seeds))}")
        with taking_apart(str(self.folder / "training.json"), ADVICE):
            found = {p: self._at(self.summary["vectors"][f"{p}-s{seed}"]) for p in self.preferences}
        for spec in self.specs:
            if spec["seed"] == seed and spec["polarity"] == "positive":
                name = spec["preference"] + ("" if spec["preference"] == MIXED else "+")
                found[name] = self._at(spec["out"]) / "delta"
        return found

    def pairs(self) -> dict[str, list[TokenPair]]:
        """The held-out pairs of every preference, tokenized and cut as the job's own evaluation saw them."""
        require("train", "trl")
        from datasets import load_from_disk
        from trl import DPOConfig

        found = {}
        default = DPOConfig.__dataclass_fields__["max_length"].default
        for spec in self.specs:
            for name, folder in spec["test"].items():
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
                    found[name] = cut_pairs(pairs, spec["dpo"].get("max_length", default))
        return found

    def _at(self, recorded: str) -> Path:
        """A recorded path, or the same place under this folder where the job's folder has been moved."""
        path = Path(recorded)
        if not path.exists():
            for depth in range(1, len(path.parts)):
                here = self.folder.joinpath(*path.parts[depth:])
                if here.exists():
                    return here
        return path


def _spec(spec: dict[str, Any]) -> dict[str, Any]:
    """The same, where it has what is read of it here; otherwise KeyError or TypeError."""
    kinds = {"preference": str, "polarity": str, "seed": int, "out": str, "test": dict, "dpo": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(spec[name], kind)]
    if wrong:
        raise TypeError(f"spec.{wrong[0]} is {spec[wrong[0]]!r:.60}")
    return spec
