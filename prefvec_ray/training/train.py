"""From a config to published vectors: data, reference log-probs, parallel DPO runs, extraction.

Every step writes its result under `config.folder` and is skipped when that result is there: an interrupted job is
simply started again. Results are keyed by what they were made from (base, data, recipe): a changed config trains anew.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from blake3 import blake3
from datasets import Dataset, load_from_disk

from prefvec_ray.errors import InputError
from prefvec_ray.preferences import data_digest, load_preferences, split_by_prompt
from prefvec_ray.training.config import MIXED, PreferenceData, TrainingConfig
from prefvec_ray.training.dpo import SIGN, Polarity, RunSpec, load_tokenizer
from prefvec_ray.training.plan import RunsFailedError, fit, run_plan, worker_setup
from prefvec_ray.vectors import fingerprint, load_vector, save_vector, subtract

TRANSCRIPT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '\\n\\n' + ('Human' if message['role'] == 'user' else 'Assistant') + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)
"""HH-RLHF's own transcript form, for a base whose tokenizer has no chat template (`chat_template: transcript`)."""


PARTS = {"train": "pairs", "test": "test_pairs"}


def train_vectors(config: TrainingConfig) -> dict[str, Any]:
    """The whole training job on the connected Ray cluster.

    Returns:
        What `<folder>/training.json` holds: every run's result, every vector's folder, and how many pairs of each
        preference were left out because their prompt alone fills `max_length` (TRL drops them).

    Raises:
        InputError: bad config, data or base; before any run starts.
        RunsFailedError: some runs failed; the others are kept and skipped next time.
    """
    config.check()
    prepared = prepare_data(config)
    references = compute_references(config, prepared)
    left_out = {
        name: {part: data[key] - len(load_from_disk(references[name][part])) for part, key in PARTS.items()}
        for name, data in prepared.items()
    }
    specs = plan_runs(config, references)
    runs = run_plan(specs, config.resources, config.folder / "ray")
    vectors = extract_vectors(config, specs)
    summary = {"left_out": left_out, "runs": runs, "vectors": {key: str(folder) for key, folder in vectors.items()}}
    (config.folder / "training.json").write_text(json.dumps(summary, indent=2))
    return summary


def prepare_data(config: TrainingConfig) -> dict[str, dict[str, Any]]:
    """Read, check and split every preference's pairs; write them under `data/`.

    Returns:
        By preference: {"train": folder, "test": folder, "digest": of the training pairs, "pairs", "test_pairs",
        "format", "notes"}.
    """
    chats = config.chat_template is not None or load_tokenizer(config.base).chat_template is not None
    splits = {name: _load_split(config, name, source) for name, source in config.preferences.items()}
    for name, (train, test, _) in splits.items():
        if not chats and not isinstance(train[0]["prompt"], str):
            raise InputError(
                f"base {config.base}: its tokenizer has no chat template, and the pairs of {name!r} are conversations; "
                "set chat_template to a Jinja file or to 'transcript'"
            )
        if not len(test):
            raise InputError(f"preference {name!r}: no held-out pairs left; give a test file or raise test_fraction")
    if config.chat_template is not None:
        _write_templated_base(config)
    prepared = {}
    for name, (train, test, info) in splits.items():
        folder = config.folder / "data" / f"{name}-{_key(info['digest'], data_digest(test))}"
        if not (folder / "info.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            train.save_to_disk(folder / "train")
            test.save_to_disk(folder / "test")
            (folder / "info.json").write_text(json.dumps(info))
        prepared[name] = {"train": str(folder / "train"), "test": str(folder / "test"), **info}
    return prepared


def working_base(config: TrainingConfig) -> Path:
    """The base with the chat template that it is trained with: what to evaluate, search and serve with."""
    return config.folder / "base" if config.chat_template is not None else config.base.absolute()


def _write_templated_base(config: TrainingConfig) -> None:
    """`<folder>/base`: the base's own files, linked, and its tokenizer with the config's chat template."""
    folder = working_base(config)
    if folder.resolve() == config.base.resolve():
        raise InputError(f"base {folder}: a chat_template would overwrite this base; choose another name or output")
    tokenizer = load_tokenizer(config.base)
    if config.chat_template == "transcript":
        tokenizer.chat_template = TRANSCRIPT_TEMPLATE
    else:
        tokenizer.chat_template = Path(str(config.chat_template)).read_text()
    folder.mkdir(parents=True, exist_ok=True)
    for file in config.base.iterdir():
        link = folder / file.name
        if file.is_file() and not link.exists():
            link.symlink_to(file.resolve())
    for file in folder.glob("*token*"):
        file.unlink()  # never write through a link into the base itself
    tokenizer.save_pretrained(folder)


def _load_split(config: TrainingConfig, name: str, source: PreferenceData) -> tuple[Dataset, Dataset, dict[str, Any]]:
    loaded = load_preferences(source.data, preference=source.label or name, format=source.format)
    if source.test is not None:
        train = loaded.dataset
        test = load_preferences(source.test, preference=source.label or name, format=source.format).dataset
    else:
        train, test = split_by_prompt(loaded.dataset, config.test_fraction, seed=0)
    if source.rows is not None:
        train = train.select(range(min(source.rows, len(train))))
    info = {
        "digest": data_digest(train),
        "pairs": len(train),
        "test_pairs": len(test),
        "format": loaded.format,
        "notes": list(loaded.notes),
    }
    return train, test, info


def compute_references(config: TrainingConfig, prepared: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Reference log-probs of every split, once per base x data x tokenization, in one Ray Train run on all workers.

    Returns:
        By preference: {"train": folder, "test": folder, "digest"} of the tokenized pairs with reference columns.
    """
    base = fingerprint(config.base)
    tokenizer = load_tokenizer(working_base(config))
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    shape = {field: config.dpo.get(field) for field in ("max_length", "truncation_mode", "ld_alpha", "pad_token")}
    key = _key(base, vocabulary, tokenizer.chat_template or "", json.dumps(shape))
    references = {}
    missing = {}
    for name, split in prepared.items():
        folder = config.folder / "reference" / f"{Path(split['train']).parent.name}-{key}"
        references[name] = {
            "train": str(folder / "train"),
            "test": str(folder / "test"),
            "digest": split["digest"],
        }
        missing.update({split[part]: str(folder / part) for part in ("train", "test") if not (folder / part).is_dir()})
    if missing:
        job = {
            "base": str(working_base(config)),
            "dpo": config.dpo,
            "datasets": missing,
        }
        print(f"   reference log-probs of {len(missing)} sets of pairs, once for all runs", flush=True)
        name = f"reference-{_key(*missing.values())}"
        try:
            fit(_reference_worker, job, name, config.resources, config.folder / "ray")
        except RunsFailedError as error:
            raise RunsFailedError(f"reference log-probs failed, no run was started: {error}") from error
    return references


def _reference_worker(config: dict[str, Any]) -> None:
    import tempfile

    import torch.distributed as dist

    from prefvec_ray.training.dpo import reference_logps

    worker_setup()
    for source, target in config["datasets"].items():
        with tempfile.TemporaryDirectory() as work_dir:
            pairs = load_from_disk(source)
            scored = reference_logps(config["base"], pairs, config["dpo"], work_dir)
            if not dist.is_initialized() or dist.get_rank() == 0:
                partial = Path(target).with_name(f".{Path(target).name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                scored.save_to_disk(partial)
                partial.rename(target)


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
                references[names[0]]["digest"] if len(names) == 1 else _key(*(references[n]["digest"] for n in names))
            )
            key = f"{preference}-{polarity}-s{seed}-{_key(base, *train, json.dumps(config.dpo, sort_keys=True))}"
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
                    dpo=config.dpo,
                    out=str(config.folder / "dpo" / key),
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
            config.folder / "vectors" / f"{preference}-s{seed}-{_key(positive.key, negative.key, config.vector_dtype)}"
        )
        folders[f"{preference}-s{seed}"] = folder
        if not folder.is_dir():
            vector = subtract(
                load_vector(Path(positive.out) / "delta"),
                load_vector(Path(negative.out) / "delta"),
                preference=preference,
                dtype=getattr(torch, config.vector_dtype),
            )
            save_vector(vector, folder)
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


def _key(*parts: str | bytes) -> str:
    """Ten hex digits that stand for all the parts."""
    digest = blake3()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:10]
