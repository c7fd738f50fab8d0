"""From a config to published vectors: data, reference log-probs, parallel DPO runs, extraction.

Every step writes its result under `config.folder` and is skipped when that result is there: an interrupted job is
simply started again. Results are keyed by what they were made from (base, data, recipe): a changed config trains anew.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from datasets import load_from_disk
from trl import DPOConfig

from prefvec_ray.common.errors import InputError
from prefvec_ray.preferences import DataCheck, Split, check_splits, data_digest, load_split, read_template
from prefvec_ray.training.checkpoints import check_space, told_when_full
from prefvec_ray.training.config import MIXED, PreferenceData, TrainingConfig
from prefvec_ray.training.delta import bf16_checkpoints_keep
from prefvec_ray.training.dpo import SIGN, Polarity, RunSpec
from prefvec_ray.training.model import load_tokenizer
from prefvec_ray.training.plan import is_finished, run_plan, slots
from prefvec_ray.training.plot import plot_runs
from prefvec_ray.training.progress import job_board
from prefvec_ray.training.references import PARTS, compute_references, key_of, working_base
from prefvec_ray.training.sft import fine_tuned
from prefvec_ray.vectors import fingerprint, load_vector, save_vector, subtract


def train_vectors(config: TrainingConfig, prepared: dict[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    """The whole training job on the connected Ray cluster.

    Args:
        prepared: what `prepare_data` gave, where it was already called.

    Returns:
        What `<folder>/training.json` holds: the base that the vectors belong to, every run's result, every vector's
        folder, and how many pairs of each preference were left out because their prompt alone fills `max_length` (TRL
        drops them).

    Raises:
        InputError: bad config, data or base; before any run starts.
        RunsFailedError: some runs failed; the others are kept and skipped next time.
        DiskFullError: names the folder.
    """
    config.check()
    prepared = prepare_data(config) if prepared is None else prepared
    with job_board(config.folder) as board, told_when_full(config.folder):
        config = fine_tuned(config, board)
        references = compute_references(config, prepared, board)
        left_out = {
            name: {part: data[key] - len(load_from_disk(references[name][part])) for part, key in PARTS.items()}
            for name, data in prepared.items()
        }
        specs = plan_runs(config, references)
        _check_space(config, specs)
        runs = run_plan(specs, config.resources, config.folder / "ray", retries=config.retries, board=board)
        vectors = extract_vectors(config, specs)
    made = {key: str(folder) for key, folder in vectors.items()}
    summary = {"base": str(working_base(config)), "left_out": left_out, "runs": runs, "vectors": made}
    (config.folder / "training.json").write_text(json.dumps(summary, indent=2))
    plot_runs(runs, config.folder / "training.png")
    return summary


def _check_space(config: TrainingConfig, specs: list[RunSpec]) -> None:
    unfinished = [spec for spec in specs if not is_finished(spec)]
    if config.method == "full" and unfinished:  # what LoRA writes is small beside its base
        check_space(
            config.folder,
            config.base,
            runs=len(unfinished),
            at_once=slots(config.resources),
            vectors=len(config.preferences) * len(config.seeds),
            checkpoints=config.checkpoint_every is not None,
        )


def prepare_data(config: TrainingConfig) -> dict[str, dict[str, Any]]:
    """Read, check and split every preference's pairs; write them under `data/`.

    Returns:
        By preference: {"train": folder, "test": folder, "digest": of the training pairs, "pairs", "test_pairs",
        "format", "why", "notes", "warnings"}.

    Raises:
        InputError: data that cannot be read, or that would train on garbage (`check_splits`).
    """
    splits, found = check_data(config)
    if found.errors:
        raise InputError("; ".join(found.errors))
    if config.chat_template is not None:
        _write_templated_base(config)
    prepared = {}
    for name, split in splits.items():
        info: dict[str, Any] = {
            "digest": data_digest(split.train),
            "pairs": len(split.train),
            "test_pairs": len(split.test),
            "format": split.loaded.format,
            "why": split.loaded.why,
            "notes": list(split.loaded.notes),
            "warnings": [f.text for f in found.findings if f.level == "warning" and f.preference == name],
        }
        folder = config.folder / "data" / f"{name}-{key_of(info['digest'], data_digest(split.test))}"
        if not (folder / "info.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            split.train.save_to_disk(folder / "train")
            split.test.save_to_disk(folder / "test")
            (folder / "info.json").write_text(json.dumps(info))
        prepared[name] = {"train": str(folder / "train"), "test": str(folder / "test"), **info}
    return prepared


def check_data(config: TrainingConfig, *, collect_flaws: bool = False) -> tuple[dict[str, Split], DataCheck]:
    """Read and split every preference's pairs, and check them with the tokenizer and length of the training."""
    tokenizer = load_tokenizer(config.base)
    if config.chat_template is not None:
        tokenizer.chat_template = read_template(config.chat_template)
    splits = {name: _load_split(config, name, source, collect_flaws) for name, source in config.preferences.items()}
    max_length = config.dpo.get("max_length", DPOConfig.max_length)
    return splits, check_splits(splits, tokenizer=tokenizer, max_length=max_length)


def _write_templated_base(config: TrainingConfig) -> None:
    """`<folder>/base`: the base's own files, linked, and its tokenizer with the config's chat template."""
    folder = working_base(config)
    if folder.resolve() == config.base.resolve():
        raise InputError(f"base {folder}: a chat_template would overwrite this base; choose another name or output")
    tokenizer = load_tokenizer(config.base)
    tokenizer.chat_template = read_template(str(config.chat_template))
    folder.mkdir(parents=True, exist_ok=True)
    for file in config.base.iterdir():
        link = folder / file.name
        if file.is_file() and not link.exists():
            link.symlink_to(file.resolve())
    for file in folder.glob("*token*"):
        file.unlink()  # never write through a link into the base itself
    tokenizer.save_pretrained(folder)


def _load_split(config: TrainingConfig, name: str, source: PreferenceData, collect_flaws: bool) -> Split:
    given = source.model_dump(exclude={"data", "label"})
    return load_split(
        source.data,
        preference=source.label or name,
        test_fraction=config.test_fraction,
        collect_flaws=collect_flaws,
        **given,
    )


def plan_runs(config: TrainingConfig, references: dict[str, dict[str, Any]]) -> list[RunSpec]:
    """Preferences x polarities x seeds, and one run on mixed data a seed where asked for. Keys are stable."""
    base = fingerprint(config.base)
    wanted: list[tuple[list[str], Polarity]] = [([name], polarity) for name in references for polarity in SIGN]
    if config.mixed:
        wanted.append((list(references), "positive"))
    specs = []
    for seed in config.seeds:
        for names, polarity in wanted:
            preference = names[0] if len(names) == 1 else MIXED
            train = [references[name]["train"] for name in names]
            digest = (
                references[names[0]]["digest"] if len(names) == 1 else key_of(*(references[n]["digest"] for n in names))
            )
            key = f"{preference}-{polarity}-s{seed}-{key_of(base, *train, config.recipe_key)}"
            specs.append(
                RunSpec(
                    key=key,
                    preference=preference,
                    polarity=polarity,
                    seed=seed,
                    base=str(working_base(config)),
                    base_fingerprint=base,
                    data_digest=digest,
                    train=train,
                    test={name: references[name]["test"] for name in names},
                    dpo=config.recipe,
                    method=config.run_method,
                    out=str(config.folder / "dpo" / key),
                    answers=[references[name]["answers"] for name in names if "answers" in references[name]],
                    watch=config.watch,
                    checkpoint_every=config.checkpoint_every,
                    tensorboard=str(config.folder / "tensorboard" / key),
                )
            )
    return specs


def extract_vectors(config: TrainingConfig, specs: list[RunSpec]) -> dict[str, Path]:
    """phi_p = theta_p+ - theta_p- for every preference and seed (arXiv 2504.20106, eq. 4), from the runs' fp32 deltas.

    Returns:
        Folder of each vector by `<preference>-s<seed>`, each holding the vector file.
    """
    import torch

    pairs: dict[tuple[str, int], dict[str, RunSpec]] = {}
    for spec in specs:
        if spec.preference != MIXED:
            pairs.setdefault((spec.preference, spec.seed), {})[spec.polarity] = spec
    folders = {}
    for (preference, seed), runs in pairs.items():
        positive, negative = runs["positive"], runs["negative"]
        folder = (
            config.folder
            / "vectors"
            / f"{preference}-s{seed}-{key_of(positive.key, negative.key, config.vector_dtype)}"
        )
        folders[f"{preference}-s{seed}"] = folder
        if not folder.is_dir():
            deltas = [load_vector(Path(run.out) / "delta") for run in (positive, negative)]
            vector = subtract(*deltas, preference=preference, dtype=getattr(torch, config.vector_dtype))
            kept = {"in_bf16_checkpoints": bf16_checkpoints_keep(positive.base, *deltas)}
            save_vector(vector.replace(precision=vector.info.precision | kept), folder)
    return folders


def publish_vectors(summary: dict[str, Any], registry: Any) -> dict[str, str]:
    """Publish every vector of `train_vectors` with the held-out figures of its two runs; the same again does nothing.

    Args:
        registry: a Registry or RegistryClient.

    Returns:
        `<preference>-s<seed>` -> `<preference>@<version>`.
    """
    published = {}
    for key, folder in summary["vectors"].items():
        metrics = {
            f"held_out_{figure}_{run['spec']['polarity']}": run["held_out"][run["spec"]["preference"]][figure]
            for run in summary["runs"]
            if f"{run['spec']['preference']}-s{run['spec']['seed']}" == key
            for figure in ("accuracy", "margin")
        }
        version = registry.publish_vector(folder, metrics=metrics)
        published[key] = f"{version.name}@{version.version}"
    return published
