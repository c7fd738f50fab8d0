"""The study: does TRADES overestimate robustness, how often, and more than plain adversarial training does? Many runs
on Ray.

A run is one cell and one seed, with its own curve and its own audit. Finished runs are lines of `runs.jsonl`: the
same command resumes from them.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from prefvec_ray.common.atomic import write_whole
from prefvec_ray.common.cluster import reason
from prefvec_ray.common.config import Config
from prefvec_ray.common.errors import InputError
from prefvec_ray.common.extras import require
from prefvec_ray.common.files import parse_models, read_json, read_model
from prefvec_ray.common.lines import LineWriter, whole_lines
from prefvec_ray.robustness.audit import LADDERS, OVERESTIMATE, Audit, Ladder
from prefvec_ray.robustness.images import Network
from prefvec_ray.robustness.run_files import RunFiles
from prefvec_ray.robustness.threat import Norm
from prefvec_ray.robustness.train import Method, Moment, Recipe, Remedy


class Cell(Config):
    """One point of the study: a recipe and how many classes it distinguishes."""

    recipe: Recipe
    classes: int = 10

    @property
    def factors(self) -> dict[str, Any]:
        """What distinguishes cells, in the words of the tables. Plain adversarial training has no beta."""
        recipe = self.recipe
        return {
            "method": recipe.method,
            "norm": recipe.norm,
            "epsilon": recipe.epsilon,
            "beta": recipe.beta if recipe.method == "trades" else None,
            "lr": recipe.lr,
            "batch": recipe.batch,
            "classes": self.classes,
            "noise": f"{recipe.remedy.sigma:g} above {recipe.remedy.threshold:g}" if recipe.remedy else None,
        }

    @property
    def name(self) -> str:
        f = self.factors
        method = "TRADES" if f["method"] == "trades" else "adversarial"
        beta = f" beta {f['beta']:g}" if f["beta"] is not None else ""
        noise = f", noise {f['noise']}" if f["noise"] else ""
        radius = f"{'L2 ' if f['norm'] == 'l2' else ''}eps {f['epsilon']:.3g}"
        return f"{method}{beta}, {radius}, lr {f['lr']:g}, batch {f['batch']}, {f['classes']} classes{noise}"


class Grid(Config):
    """Cells: the product of the lists, with `seeds` runs each. Cells named twice are run once, with the larger number
    of seeds."""

    methods: tuple[Method, ...] = ("trades",)
    norm: Norm = "linf"
    epsilon: tuple[float, ...]
    beta: tuple[float, ...] = (1.0,)
    lr: tuple[float, ...] = (0.1,)
    batch: tuple[int, ...] = (32,)
    classes: tuple[int, ...] = (10,)
    remedy: Remedy | None = None
    seeds: int = Field(default=5, ge=1)


class StudyConfig(Config):
    """What `prefvec robustness study` runs."""

    data: str = "digits"
    """"digits", or CIFAR-10 as a .npz or a folder; see `load_images`."""
    network: Network = "tiny"
    grids: tuple[Grid, ...] = Field(min_length=1)
    train: int | None = None
    """How many images to train on; all by default."""
    merge: bool = False
    """Fewer classes by merging neighbouring labels: every image stays."""
    watch: int = 200
    test: int = 300
    epochs: int = 20
    weight_decay: float = 0.0
    drops: tuple[float, ...] = ()
    augment: bool = False
    watch_every: int = 2
    ladder: Ladder = Ladder()
    resources: dict[str, float] = {"cpu": 1.0}
    """What one run occupies on the cluster."""

    def cells(self) -> dict[Cell, int]:
        """Every cell and its number of seeds."""
        found: dict[str, tuple[Cell, int]] = {}
        for grid in self.grids:
            product = itertools.product(grid.methods, grid.epsilon, grid.beta, grid.lr, grid.batch, grid.classes)
            for method, epsilon, beta, lr, batch, classes in product:
                recipe = Recipe(
                    method=method, norm=grid.norm, epsilon=epsilon, beta=beta if method == "trades" else 1.0, lr=lr,
                    batch=batch, epochs=self.epochs, weight_decay=self.weight_decay, drops=self.drops,
                    augment=self.augment, remedy=grid.remedy, watch_every=self.watch_every,
                )  # fmt: skip
                cell = Cell(recipe=recipe, classes=classes)
                key = cell.model_dump_json()
                found[key] = (cell, max(grid.seeds, found.get(key, (cell, 0))[1]))
        return dict(found.values())

    def runs(self) -> list[tuple[Cell, int]]:
        """Every run, the first seed of all cells first: an interrupted study has seen everything once."""
        counts = self.cells()
        return [(cell, seed) for seed in range(max(counts.values())) for cell, n in counts.items() if seed < n]


PRESETS: dict[str, StudyConfig] = {
    "quick": StudyConfig(
        grids=(Grid(methods=("trades", "adversarial"), epsilon=(0.3,), seeds=2, batch=(64,), classes=(4,)),),
        train=256, watch=60, test=80, epochs=3,
        ladder=Ladder(strong_steps=20, restarts=2, apgd_steps=10, fab_steps=2, square_queries=100),
    ),
    "digits": StudyConfig(
        grids=(
            Grid(methods=("trades", "adversarial"), epsilon=(0.1, 0.3), beta=(1.0, 6.0)),
            Grid(epsilon=(0.3,), lr=(0.02, 0.2)),
            Grid(epsilon=(0.3,), batch=(16, 128)),
            Grid(epsilon=(0.3,), remedy=Remedy(threshold=1.0, sigma=0.2)),
            Grid(methods=("trades", "adversarial"), epsilon=(0.3,), classes=(5,)),
            Grid(methods=("adversarial",), epsilon=(0.3,), lr=(0.2,)),
            Grid(methods=("adversarial",), epsilon=(0.3,), batch=(16,)),
        ),
    ),
    "cifar": StudyConfig(
        data="", network="small", train=1500, epochs=15,
        grids=(
            Grid(methods=("trades", "adversarial"), epsilon=(8 / 255,), beta=(1.0, 6.0), batch=(64,), seeds=3),
            Grid(epsilon=(8 / 255,), batch=(32,), seeds=3),
        ),
        ladder=Ladder(square_queries=500),
    ),
    "narrow": StudyConfig(
        data="", network="narrow", train=4800, merge=True, epochs=10, weight_decay=5e-4, drops=(0.7,), augment=True,
        watch_every=2,
        grids=(
            Grid(methods=("trades", "adversarial"), epsilon=(8 / 255,), beta=(1.0,), batch=(32,), seeds=3),
            Grid(epsilon=(8 / 255,), beta=(6.0,), lr=(0.02,), batch=(128,), seeds=3),
            Grid(methods=("trades", "adversarial"), epsilon=(8 / 255,), beta=(1.0,), batch=(32,), classes=(5,),
            seeds=3),
        ),
    ),
    "paper": StudyConfig(
        data="", network="resnet18", watch=500, test=1000, epochs=110, weight_decay=5e-4, drops=(0.68, 0.82, 0.91),
        augment=True, watch_every=5, resources={"cpu": 2.0, "gpu": 1.0},
        grids=(
            Grid(methods=("trades", "adversarial"), epsilon=(8 / 255,), beta=(1.0, 3.0, 6.0), batch=(128, 256, 512),
            seeds=5), Grid(epsilon=(8 / 255,), lr=(0.01, 0.05), batch=(128,)), Grid(epsilon=(8 / 255,),
            batch=(128,), remedy=Remedy(threshold=0.1, sigma=8 / 255)),
        ),
        ladder=LADDERS["standard"].model_copy(update={"batch": 500}),
    ),
}  # fmt: skip
"""`quick` is a minute, for tests. `digits` is the default. The others want CIFAR-10. `narrow` is `paper` for a CPU: a
narrow ResNet, a tenth of the images, few epochs, where the paper predicts overestimation, its opposite and the
control. `paper` is the paper's size, for a GPU: it has not been run."""


class Run(Config):
    """One finished run."""

    cell: Cell
    seed: int
    curve: tuple[Moment, ...]
    audit: Audit
    seconds: float

    @property
    def overestimated(self) -> bool:
        """The interval of PGD minus ensemble lies above the tolerance."""
        return self.audit.gap(OVERESTIMATE).low > self.audit.ladder.tolerance


def run_cell(config: StudyConfig, cell: Cell, seed: int, files: RunFiles | None = None) -> Run:
    """Train and audit one run, on a GPU where torch sees one. Plain torch; the same seed gives the same run on the
    same device. With `files` it continues from what is stored there, and raises Pause once the budget is spent."""
    import torch

    from prefvec_ray.common.device import best_device
    from prefvec_ray.robustness.audit import audit
    from prefvec_ray.robustness.images import build_network, load_images
    from prefvec_ray.robustness.run_files import Rungs
    from prefvec_ray.robustness.threat import Ball
    from prefvec_ray.robustness.train import train_classifier

    started = time.monotonic()
    device = best_device()
    if device.type == "cpu":
        torch.set_num_threads(1)
    images = load_images(
        config.data, cell.classes, train=config.train, watch=config.watch, test=config.test, merge=config.merge
    )
    train, watch, test = ((x.to(device), y.to(device)) for x, y in (images.train, images.watch, images.test))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_network(config.network, train[0].shape[1], cell.classes).to(device)
    recipe = cell.recipe
    ball = Ball(recipe.epsilon, norm=recipe.norm)
    curve = train_classifier(model, train, watch, recipe, seed=seed, files=files)
    rungs = Rungs(files, device) if files else None
    found = audit(model, *test, ball, config.ladder, space="images in [0, 1]", seed=seed, rungs=rungs)
    return Run(cell=cell, seed=seed, curve=tuple(curve), audit=found, seconds=round(time.monotonic() - started, 2))


_MAY_CHANGE = ("grids", "resources")
ADVICE = "give another folder, or delete this one"


class Study:
    """The finished runs of one study in a folder: `study.json` describes it, `runs.jsonl` holds a line a run.

    A study may grow: grids with more cells or seeds keep what is finished. Runs that its grids no longer ask for stay
    in the file, and out of `runs`.

    Raises:
        InputError: the folder holds a study that differs in more than its grids and resources.
    """

    def __init__(self, folder: str | Path, config: StudyConfig | None = None) -> None:
        self.folder = Path(folder).absolute()
        described = self.folder / "study.json"
        if config is None:
            if not described.is_file():
                raise InputError(f"{folder} holds no study: no study.json")
            config = read_model(described, StudyConfig, ADVICE)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config = config
        if described.exists():
            there, wanted = read_json(described, ADVICE), config.model_dump(mode="json")
            changed = sorted(key for key in wanted if wanted[key] != there.get(key) and key not in _MAY_CHANGE)
            if changed:
                raise InputError(
                    f"{folder} holds a study with other {', '.join(changed)}; give another folder or delete it"
                )
        write_whole(described, config.model_dump_json(indent=2))
        self.path = self.folder / "runs.jsonl"
        asked = set(config.runs())
        found = parse_models(whole_lines(self.path), Run, str(self.path), ADVICE)
        self.runs = [run for run in found if (run.cell, run.seed) in asked]

    @property
    def missing(self) -> list[tuple[Cell, int]]:
        done = {(run.cell, run.seed) for run in self.runs}
        return [wanted for wanted in self.config.runs() if wanted not in done]


def run_study(study: Study, *, workers: int = 2, progress: Callable[[int, int], None] | None = None) -> dict[str, str]:
    """Run what is missing, up to `workers` runs at once on the cluster that Ray is joined to; every finished run is
    on disk at once.

    Returns the runs that failed, name to reason. They are not written: the same call tries them again.

    Raises:
        JobError: another process is at it.
    """
    require("robustness", "ray", "sklearn")
    import ray
    from rich.console import Console

    from prefvec_ray.common.scheduling import Waiting, actor_options, bundle_of, check_room

    bundle = bundle_of({"cpu": 1, **study.config.resources})
    check_room("a run of the study", [bundle])
    wait = Waiting(Console(highlight=False), "a run of the study", [bundle], starts=False)
    task: Any = ray.remote(run_cell).options(**actor_options(bundle), max_retries=2)
    waiting, failed = study.missing[::-1], dict[str, str]()
    under_way: dict[Any, str] = {}
    total, config = len(study.config.runs()), ray.put(study.config)
    with LineWriter(study.path, f"another command is running the study in {study.folder}; wait for it") as lines:
        while waiting or under_way:
            while waiting and len(under_way) < workers:
                cell, seed = waiting.pop()
                under_way[task.remote(config, cell, seed)] = f"{cell.name}, seed {seed}"
            ready, _ = ray.wait(list(under_way), num_returns=1, timeout=1.0)
            wait.poll(started=bool(ready))
            if not ready:
                continue
            name = under_way.pop(ready[0])
            try:
                run: Run = ray.get(ready[0])
                lines.add(run.model_dump_json())
                study.runs.append(run)
            except ray.exceptions.RayError as error:
                failed[name] = reason(error)
            if progress:
                progress(len(study.runs), total)
    return failed


Runs = Mapping[Cell, Sequence[Run]]
"""The runs of every cell."""


def by_cell(study: Study) -> dict[Cell, list[Run]]:
    """The finished runs of every cell that learned, in the order of the study and of their seeds."""
    found: dict[Cell, list[Run]] = {cell: [] for cell in study.config.cells()}
    for run in sorted(study.runs, key=lambda run: run.seed):
        if learned(run):
            found[run.cell].append(run)
    return {cell: runs for cell, runs in found.items() if runs}


def learned(run: Run) -> bool:
    """Better than chance without an attack. The gap of a run that collapsed is 0, and means nothing."""
    return run.audit.clean.low > 1 / run.cell.classes


def gap_of(run: Run) -> float:
    return run.audit.gap(OVERESTIMATE).mean
