"""From a config to published vectors: data, reference log-probs, parallel DPO runs, extraction.

Every step writes its result under `config.folder` and is skipped when that result is there, so the same command resumes
an interrupted job. Results are keyed by what they were made from (base, data, recipe): a changed config trains anew.
"""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from datasets import load_from_disk
from transformers import GenerationConfig
from trl import DPOConfig, SFTConfig

from prefvec_ray.artifacts.training import (
    MIXED,
    Polarity,
    PreparedPairs,
    ReferencePairs,
    RunSpec,
    TrainingSummary,
)
from prefvec_ray.common.atomic import new_folder
from prefvec_ray.common.chat import template_ends
from prefvec_ray.common.errors import InputError
from prefvec_ray.common.pretrained import context_length
from prefvec_ray.preferences import DataCheck, Split, check_splits, data_digest, give_template, load_split
from prefvec_ray.preferences.demonstrations import check_demonstrations
from prefvec_ray.training.checkpoints import check_space, named_when_full
from prefvec_ray.training.config import PreferenceData, TrainingConfig
from prefvec_ray.training.delta import bf16_checkpoints_keep, parameter_layout
from prefvec_ray.training.model import base_ends, generation_config, load_tokenizer
from prefvec_ray.training.plan import run_plan, slots
from prefvec_ray.training.plot import plot_runs
from prefvec_ray.training.recipe import check_whole_batch
from prefvec_ray.training.references import compute_references, key_of, working_base
from prefvec_ray.training.sft import demonstrations, fine_tuned
from prefvec_ray.training.status import job_status
from prefvec_ray.training.worker_groups import worker_groups
from prefvec_ray.vectors import fingerprint, load_vector, save_vector, subtract, subtract_deltas
from prefvec_ray.vectors.extract import positive_only


def train_vectors(config: TrainingConfig, prepared: dict[str, PreparedPairs] | None = None) -> TrainingSummary:
    """The whole training job on the connected Ray cluster.

    Args:
        prepared: what `prepare_data` gave, where it was already called.

    Returns:
        What `<folder>/training.json` holds.

    Raises:
        InputError: bad config, data or base; before any run starts.
        RunsFailedError: some runs failed; the others are kept and skipped next time.
        DiskFullError: names the folder.
        JobError: another job trains into the folder, or this one was cancelled (`training.status.cancel`).
    """
    config.check()
    prepared = prepare_data(config) if prepared is None else prepared
    with (
        worker_groups(config.folder, config.folder / "ray", retries=config.retries) as groups,
        job_status(config.folder, groups.board) as status,
        named_when_full(config.folder),
    ):
        config = fine_tuned(config, groups)
        references = compute_references(config, prepared, groups)
        left_out = {name: _left_out(data, references[name]) for name, data in prepared.items()}
        specs = plan_runs(config, references)
        _check_space(config, specs)
        status.plan(specs)
        runs = run_plan(specs, config.resources, groups.storage, groups=groups)
        vectors = extract_vectors(config, specs)
    summary = TrainingSummary(
        base=str(working_base(config)),
        left_out=left_out,
        runs=runs,
        vectors={key: str(folder) for key, folder in vectors.items()},
    )
    (config.folder / "training.json").write_text(json.dumps(summary.model_dump(), indent=2))
    plot_runs(runs, config.folder / "training.png")
    return summary


def _left_out(given: PreparedPairs, scored: ReferencePairs) -> dict[Literal["train", "test"], int]:
    return {
        "train": given.pairs - len(load_from_disk(scored.train)),
        "test": given.test_pairs - len(load_from_disk(scored.test)),
    }


def _check_space(config: TrainingConfig, specs: list[RunSpec]) -> None:
    unfinished = [spec for spec in specs if not spec.is_finished]
    if config.method == "full" and unfinished:  # what LoRA writes is small beside its base
        check_space(
            config.folder,
            config.base,
            runs=len(unfinished),
            at_once=slots(config.resources),
            vectors=len(config.preferences) * len(config.seeds),
            checkpoints=config.checkpoint_every is not None,
        )


def prepare_data(config: TrainingConfig) -> dict[str, PreparedPairs]:
    """Read, check and split every preference's pairs; write them under `data/`. Returns them by preference.

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
        check_whole_batch(name, len(split.train), config.pairs_at_once, config.dpo)
        digest = data_digest(split.train)
        folder = config.folder / "data" / f"{name}-{key_of(digest, data_digest(split.test))}"
        prepared[name] = PreparedPairs(
            train=str(folder / "train"),
            test=str(folder / "test"),
            digest=digest,
            pairs=len(split.train),
            test_pairs=len(split.test),
            format=split.loaded.format,
            why=split.loaded.why,
            notes=list(split.loaded.notes),
            warnings=[f.text for f in found.findings if f.level == "warning" and f.preference == name],
        )
        if not (folder / "info.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            split.train.save_to_disk(folder / "train")
            split.test.save_to_disk(folder / "test")
            (folder / "info.json").write_text(json.dumps(prepared[name].model_dump(exclude={"train", "test"})))
    return prepared


def check_data(config: TrainingConfig, *, collect_flaws: bool = False) -> tuple[dict[str, Split], DataCheck]:
    """Read and split every preference's pairs, and check them and the examples of the SFT stage, with the tokenizer and
    the lengths of the training."""
    tokenizer = load_tokenizer(config.base)
    parameter_layout(config.base)  # refuses a base whose files are not the model
    if config.chat_template is not None:
        give_template(tokenizer, config.chat_template)
    splits = {name: _load_split(config, name, source, collect_flaws) for name, source in config.preferences.items()}
    max_length = config.dpo.get("max_length", DPOConfig.max_length)
    ends = base_ends(config.base, tokenizer)
    if config.chat_template is not None:
        ends |= template_ends(tokenizer)  # as the templated base will have it
    context = context_length(config.base)
    found = check_splits(splits, tokenizer=tokenizer, max_length=max_length, context=context, ends=ends)
    if config.sft is not None:
        examples, longest = demonstrations(config.sft), config.sft.recipe.get("max_length", SFTConfig.max_length)
        checked = check_demonstrations(examples, tokenizer, max_length=longest, context=context, ends=ends)
        found = found.model_copy(update={"demonstrations": checked})
    return splits, found


def _write_templated_base(config: TrainingConfig) -> None:
    """`<folder>/base`: the base's own files, linked, and its tokenizer with the config's chat template.

    Its generation config also names the tokens that the template ends an answer with.
    """
    folder = working_base(config)
    if folder.resolve() == config.base.resolve():
        raise InputError(f"base {folder}: a chat_template would overwrite this base; choose another name or output")
    tokenizer = load_tokenizer(config.base)
    give_template(tokenizer, str(config.chat_template))
    if not folder.is_dir():
        with new_folder(folder) as made:
            for file in config.base.iterdir():
                if file.is_file():
                    (made / file.name).symlink_to(file.resolve())
    elif not _holds(folder, fingerprint(config.base)):
        raise InputError(
            f"{folder}: made from another base than {config.base}, or its links lead nowhere; give this training "
            "another name, or delete that folder"
        )
    for file in folder.glob("*token*"):
        file.unlink()  # never write through a link into the base itself
    tokenizer.save_pretrained(folder)
    ends, more = base_ends(config.base, tokenizer), template_ends(tokenizer)
    if more - ends:
        generation = generation_config(config.base) or GenerationConfig()
        generation.eos_token_id = sorted(ends | more)
        (folder / "generation_config.json").unlink(missing_ok=True)
        generation.save_pretrained(folder)


def _holds(folder: Path, base_fingerprint: str) -> bool:
    with suppress(InputError):  # a link that leads nowhere
        return fingerprint(folder) == base_fingerprint
    return False


def _load_split(config: TrainingConfig, name: str, source: PreferenceData, collect_flaws: bool) -> Split:
    given = source.model_dump(exclude={"data", "label"})
    return load_split(
        source.data,
        preference=source.label or name,
        test_fraction=config.test_fraction,
        collect_flaws=collect_flaws,
        **given,
    )


def plan_runs(config: TrainingConfig, references: dict[str, ReferencePairs]) -> list[RunSpec]:
    """Preferences x polarities x seeds, and one run on mixed data a seed where asked for. Keys are stable."""
    base = fingerprint(config.base)
    wanted: list[tuple[list[str], Polarity]] = [([n], polarity) for n in references for polarity in config.polarities]
    if config.mixed:
        wanted.append((list(references), "positive"))
    specs = []
    for seed in config.seeds:
        for names, polarity in wanted:
            parts = [references[name] for name in names]
            train = [part.train for part in parts]
            preference = names[0] if len(names) == 1 else MIXED
            digest = parts[0].digest if len(names) == 1 else key_of(*(part.digest for part in parts))
            pairs = [Path(folder).parent.name for folder in train]  # which says what they are, wherever the job lies
            key = f"{preference}-{polarity}-s{seed}-{key_of(base, *pairs, config.recipe_key)}"
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
                    test={name: references[name].test for name in names},
                    dpo=config.recipe,
                    method=config.run_method,
                    out=str(config.folder / "dpo" / key),
                    answers=[part.answers for part in parts if part.answers],
                    watch=config.watch,
                    checkpoint_every=config.checkpoint_every,
                    tensorboard=str(config.folder / "tensorboard" / key),
                )
            )
    return specs


def extract_vectors(config: TrainingConfig, specs: list[RunSpec]) -> dict[str, Path]:
    """phi_p = theta_p+ - theta_p- for every preference and seed (arXiv 2504.20106, eq. 4), from the runs' fp32
    deltas; of positive runs alone theta_p+ - theta_base.

    Returns:
        Folder of each vector by its `vector_key`, each holding the vector file.
    """
    import torch

    pairs: dict[str, list[RunSpec]] = {}
    for spec in specs:
        if spec.preference != MIXED:
            pairs.setdefault(spec.vector_key, []).append(spec)
    folders = {}
    dtype = getattr(torch, config.vector_dtype)
    for name, runs in pairs.items():
        key = key_of(*(run.key for run in runs), config.vector_dtype)
        folders[name] = folder = config.folder / "vectors" / f"{name}-{key}"
        if not folder.is_dir():
            deltas = [load_vector(Path(run.out) / "delta") for run in runs]  # the positive run's first, as planned
            preference = runs[0].preference
            kept = {"in_bf16_checkpoints": bf16_checkpoints_keep(runs[0].base, *deltas)}
            positive, negative = deltas[0], deltas[1] if config.polarity == "both" else None
            if all(delta.info.form == "full" for delta in deltas):
                subtract_deltas(positive, negative, folder, preference=preference, dtype=dtype, precision=kept)
                continue
            if negative is None:
                vector = positive_only(positive, preference=preference, dtype=dtype)
            else:
                vector = subtract(positive, negative, preference=preference, dtype=dtype)
            save_vector(vector.replace(precision=vector.info.precision | kept), folder)
    return folders


def publish_vectors(summary: TrainingSummary, registry: Any) -> dict[str, str]:
    """Publish every vector of `train_vectors` with the held-out figures of its runs; the same again does nothing.

    Args:
        registry: a Registry or RegistryClient.

    Returns:
        By `vector_key`: `helpful-s0` -> `helpful@1`.
    """
    published = {}
    for key, folder in summary.vectors.items():
        metrics = {
            f"held_out_{figure}_{run.spec.polarity}": getattr(run.held_out[run.spec.preference], figure)
            for run in summary.runs
            if run.spec.vector_key == key
            for figure in ("accuracy", "margin")
        }
        version = registry.publish_vector(folder, metrics=metrics)
        published[key] = f"{version.name}@{version.version}"
    return published
