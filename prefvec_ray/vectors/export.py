"""A model at fixed coefficients, for programs that know nothing of preference vectors: vLLM, transformers, PEFT.

export_model("base", {"helpful": helpful, "harmless": harmless}, {"helpful": 0.7, "harmless": 1.0}, "exported")
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from prefvec_ray.common.atomic import new_folder
from prefvec_ray.common.errors import InputError
from prefvec_ray.common.extras import require
from prefvec_ray.common.files import read_json
from prefvec_ray.vectors.checkpoint import Checkpoint
from prefvec_ray.vectors.entries import FLOAT_DTYPES, Entry, LowRank
from prefvec_ray.vectors.file import PreferenceVector
from prefvec_ray.vectors.fingerprint import fingerprint
from prefvec_ray.vectors.fused import CODES, FusedMerge, Segment, part_of
from prefvec_ray.vectors.live import check_base, check_coefficients
from prefvec_ray.vectors.writer import Index, Progress, ShardWriter, write_text

# What belongs to a model besides its weights. Code (*.py) is not taken along, nor the base's own README.
BESIDE_WEIGHTS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")


def export_model(
    base_folder: str | Path,
    vectors: Mapping[str, PreferenceVector],
    coefficients: Mapping[str, float],
    out: str | Path,
    *,
    max_shard_size: int | str = "5GB",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    lineage: Mapping[str, str] | None = None,
    base_fingerprint: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write theta_base + sum_p eta_p phi_p as a Hugging Face checkpoint, and return its folder.

    The numbers are `LiveModel`'s, bit for bit: fp32 sums, one rounding, to `dtype` or else to the base's dtypes. The
    weights are streamed from mapped files in chunks of 4 MB a thread, so memory does not grow with the model. Config,
    tokenizer and chat template are copied; README.md is a model card with the coefficients and the vectors' lineage, to
    which `lineage` adds a line per vector (its registry name and digest, say). `out` appears complete or not at all;
    `overwrite` lets it replace another model folder. `base_fingerprint` skips hashing the base where it is known.

    Raises InputError before any work for what does not fit together (unknown names, shapes, too little disk), and
    without any output for another base (it is hashed while the first weights are written) and where a weight is NaN or
    infinite.
    """
    base_folder, out = Path(base_folder), Path(out)
    merge = _Merge(base_folder, vectors, coefficients)
    if dtype is not None and dtype not in FLOAT_DTYPES.values():
        raise InputError(f"cannot export in {dtype}; expected one of {', '.join(FLOAT_DTYPES)}")
    if out.resolve() == base_folder.resolve():
        raise InputError(f"{out}: is the base model's own folder; choose another")
    state = dict(merge.checkpoint)

    def produce(name: str, index: Index, scratch: Tensor) -> Tensor:
        if checked.done():
            checked.result()  # raises at once where the base is another one
        base = state[name][index]
        terms = tuple((k, part_of(entry, index)) for k, entry in merge.terms(name))
        if not terms and base.dtype == scratch.dtype:
            return base
        return merge.write(name, scratch, base, terms, threads=1)

    like = {name: tensor.to("meta", merge.dtype(tensor, dtype)) for name, tensor in state.items()}
    with (
        new_folder(out, replaces=_is_model if overwrite else None) as folder,
        ShardWriter(folder, "model", like, max_shard_size=max_shard_size, threads=threads) as writer,
        ThreadPoolExecutor(1) as aside,  # hashing takes processors where writing waits for the disk
    ):
        checked = aside.submit(merge.check_bases, base_fingerprint)
        writer.write(produce, progress)
        _copy_beside(base_folder, folder, dtype)
        write_text(folder / "README.md", model_card(base_folder.name, vectors, merge.etas, lineage or {}))
        checked.result()
        writer.finish()
    return out


@torch.inference_mode()
def merged_weights(
    base_folder: str | Path,
    vectors: Mapping[str, PreferenceVector],
    coefficients: Mapping[str, float],
    *,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """theta_base + sum_p eta_p phi_p, (name, tensor) one at a time, for programs that load weights from an iterator.

    The numbers are `export_model`'s. A tensor is only good until the next one is asked for. Bases are not compared: do
    it once, not at every change of coefficients. Raises InputError for what does not fit together, and where a weight
    would be NaN or infinite.
    """
    merge = _Merge(base_folder, vectors, coefficients)
    for name, base in merge.checkpoint.items():
        terms, wanted = merge.terms(name), merge.dtype(base, dtype)
        yield name, merge.write(name, torch.empty(base.shape, dtype=wanted), base, terms) if terms else base.to(wanted)


class _Merge:
    """A checkpoint at fixed coefficients. InputError for what does not fit together, before any weight is read."""

    def __init__(
        self, base_folder: str | Path, vectors: Mapping[str, PreferenceVector], coefficients: Mapping[str, float]
    ):
        self.checkpoint = Checkpoint(base_folder)
        self.etas = check_coefficients(coefficients, dict(sorted(vectors.items())))
        check_fit(self.checkpoint, vectors)
        self._vectors = vectors
        self._moved = {name: vectors[name] for name, eta in self.etas.items() if eta != 0}

    def check_bases(self, known: str | None) -> None:
        """InputError unless all vectors are of this base; it is hashed unless its fingerprint is `known`."""
        known = known or fingerprint(self.checkpoint)
        for vector in self._vectors.values():
            check_base(vector, known)

    def dtype(self, base: Tensor, wanted: torch.dtype | None) -> torch.dtype:
        """What a parameter is rounded to: its own dtype, or the one that is wanted for all weights."""
        return base.dtype if wanted is None or base.dtype not in CODES else wanted

    def terms(self, name: str) -> tuple[tuple[int, Entry], ...]:
        """What is added to a parameter: (position of its coefficient, entry)."""
        return tuple((k, vector.entry(name)) for k, vector in enumerate(self._moved.values()) if name in vector)

    def write(
        self, name: str, out: Tensor, base: Tensor, terms: tuple[tuple[int, Entry], ...], *, threads: int | None = None
    ) -> Tensor:
        """base + sum eta * term into `out`, which is returned. InputError where a number is NaN or infinite."""
        merge = FusedMerge([Segment(name, out, base, terms)], threads=threads)
        if merge.run([self.etas[key] for key in self._moved]) is not None:
            raise InputError(f"'{name}' would hold NaN or infinity at {dict(self.etas)}; choose smaller coefficients")
        return out


def check_fit(checkpoint: Checkpoint, vectors: Mapping[str, PreferenceVector]) -> None:
    """InputError unless every vector changes only what the base has, in the base's shapes."""
    for key, vector in vectors.items():
        for name in vector.names():
            if name not in checkpoint:
                raise InputError(f"vector '{key}' changes '{name}', which the base {checkpoint.folder} does not have")
            base, shape = checkpoint.tensor(name), tuple(vector.shape(name))
            if base.shape != shape:
                raise InputError(f"vector '{key}': '{name}' has shape {shape}, in the base {tuple(base.shape)}")
            if base.dtype not in CODES:
                raise InputError(f"'{name}' of the base is {base.dtype}; expected fp32, bf16 or fp16 weights")


def export_adapter(
    vectors: Mapping[str, PreferenceVector],
    coefficients: Mapping[str, float],
    out: str | Path,
    *,
    base_model: str = "",
    overwrite: bool = False,
) -> Path:
    """Write low-rank vectors at fixed coefficients as one PEFT LoRA adapter, exactly: B = [eta_1 B_1, eta_2 B_2 ...],
    A = [A_1; A_2 ...], rank the sum of the ranks, lora_alpha = rank so that PEFT scales by 1. Stored in fp32.

    `base_model` is what PEFT will load it on by default. Raises InputError for what a LoRA adapter cannot hold: entries
    in full or int8 form, embeddings and fused experts. `export_model` exports those.
    """
    require("lora", "peft")
    from peft import LoraConfig
    from safetensors.torch import save_file

    out = Path(out)
    etas = check_coefficients(coefficients, dict(sorted(vectors.items())))
    factors: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for key, eta in etas.items():
        for name in vectors[key].names() if eta else []:
            entry, module = vectors[key].entry(name), name.removesuffix(".weight")
            linear = name.endswith(".weight") and "embed" not in name and ".experts." not in name
            if not isinstance(entry, LowRank) or len(entry.shape) != 2 or not linear:
                raise InputError(
                    f"vector '{key}': '{name}' is not a low-rank change of a linear layer; use export_model"
                )
            scale = torch.tensor(eta, dtype=torch.float32)
            factors.setdefault(module, []).append((entry.A_RI.float(), entry.B_OR.float() * scale))
    if not factors:
        raise InputError("all coefficients are 0, which is the base model itself; give one that is not")
    weights = {}
    for module, pairs in factors.items():
        weights[f"base_model.model.{module}.lora_A.weight"] = torch.cat([A_RI for A_RI, _ in pairs]).contiguous()
        weights[f"base_model.model.{module}.lora_B.weight"] = torch.cat([B_OR for _, B_OR in pairs], 1).contiguous()
    ranks = {module: sum(len(A_RI) for A_RI, _ in pairs) for module, pairs in factors.items()}
    rank = max(ranks.values())
    others = {module: r for module, r in ranks.items() if r != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(factors),
        rank_pattern=others,
        alpha_pattern=others,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        inference_mode=True,
    )
    with new_folder(out, replaces=_is_adapter if overwrite else None) as folder:
        save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
        (folder / "adapter_model.safetensors").chmod(0o644)
        config.save_pretrained(folder)
        card = model_card(base_model, vectors, etas, {}).replace("library_name: transformers", "library_name: peft")
        write_text(folder / "README.md", card)
    return out


def model_card(
    base: str, vectors: Mapping[str, PreferenceVector], etas: Mapping[str, float], lineage: Mapping[str, str]
) -> str:
    """README.md: front matter that the Hugging Face hub reads, then what the weights are and where they come from."""
    import yaml

    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": base,
        "base_model_relation": "merge",
        "tags": ["preference-vectors", "merge", "prefvec-ray"],
        "preferences": dict(etas),
    }
    rows = ["| preference | eta | form | data | taken from |", "|---|---|---|---|---|"]
    for key, eta in etas.items():
        info = vectors[key].info
        parents = ", ".join(f"{polarity} `{digest}`" for polarity, digest in info.parents.items())
        rows.append(f"| {key} | {eta:g} | {info.form}, {info.dtype} | `{info.data_digest or '?'}` | {parents or '?'} |")
    notes = [f"- {key}: {text}" for key, text in sorted(lineage.items())]
    fingerprint = next((vector.info.base_fingerprint for vector in vectors.values()), "?")
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
            f"# {base or 'A base model'} at fixed preferences\n",
            "The weights are `theta_base + sum eta * phi`: the base model and, for each preference, a preference",
            "vector ([arXiv 2504.20106](https://arxiv.org/abs/2504.20106)) times its coefficient, summed in fp32 and",
            "rounded once. Made with prefvec-ray.\n",
            *rows,
            "",
            *notes,
            f"- base fingerprint: `{fingerprint}`",
            "",
        ]
    )


def _copy_beside(base_folder: Path, folder: Path, dtype: torch.dtype | None) -> None:
    for file in sorted({file for pattern in BESIDE_WEIGHTS for file in base_folder.glob(pattern)}):
        if not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)
    if (base_folder / "additional_chat_templates").is_dir():
        shutil.copytree(base_folder / "additional_chat_templates", folder / "additional_chat_templates")
    config = folder / "config.json"
    if dtype is not None and config.is_file():
        changed = read_json(config, "copy the base model again")
        changed.pop("torch_dtype", None)
        config.write_text(json.dumps(changed | {"dtype": str(dtype).removeprefix("torch.")}, indent=2) + "\n", "utf-8")


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() and any(folder.glob("adapter_model*.safetensors"))
