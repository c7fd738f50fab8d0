"""LoRA adapters as vectors, exactly: PEFT says what it would add to the base, and that is kept as factors.

    phi = vectors_from_adapters("runs/helpful+", "runs/helpful-", base="models/base", preference="helpful")

One adapter's delta is s B A (LoRA, arXiv 2106.09685, section 4.1) with s = alpha / r, or alpha / sqrt(r) for rsLoRA
(arXiv 2312.03732). The difference of two is one low-rank entry: B = [s+ B+, -s- B-], A = [A+; A-], rank r+ + r-.
"""

import dataclasses
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import JsonValue
from torch import Tensor

from prefvec_ray.common.errors import InputError
from prefvec_ray.common.extras import require
from prefvec_ray.common.files import read_json, taking_apart
from prefvec_ray.common.names import check_preference
from prefvec_ray.common.patterns import compile_pattern
from prefvec_ray.common.pretrained import from_pretrained
from prefvec_ray.vectors.checkpoint import Checkpoint, TensorPiece, checkpoint_layout
from prefvec_ray.vectors.entries import Entry, Full, LowRank, added
from prefvec_ray.vectors.extract import is_zero, stored_as, subtract
from prefvec_ray.vectors.file import PreferenceVector, VectorInfo
from prefvec_ray.vectors.fingerprint import fingerprint
from prefvec_ray.vectors.shards import Shards

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

PREFIX = "base_model.model."
# What may differ from LoRA's defaults without changing what an adapter adds to the weights, or is honoured
# here. Anything else that is set (DoRA, QALoRA, layer replication, and whatever comes next) is refused by its
# name.
UNDERSTOOD = {
    *(
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "fan_in_fan_out",
        "bias",
        "lora_bias",
    ),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters"),
    *("modules_to_save", "lora_dropout", "init_lora_weights", "inference_mode", "runtime_config"),
    *("base_model_name_or_path", "revision", "task_type", "peft_type", "auto_mapping", "peft_version"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying"),
}
MODULE_LISTS = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters", "layers_pattern")
LITERAL = re.compile(r"[\w.-]{1,500}")
# These initialisations change the base's weights, so that s B A is not what training changed.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def vectors_from_adapters(
    positive: "PeftModel | str | Path",
    negative: "PeftModel | str | Path",
    *,
    base: str | Path,
    preference: str,
    dtype: torch.dtype = torch.float32,
) -> PreferenceVector:
    """phi of two LoRA adapters over one base, exact, of rank r+ + r-; see `vector_from_adapter`."""
    runs = [
        vector_from_adapter(adapter, base=base, preference=preference + sign)
        for adapter, sign in ((positive, "+"), (negative, "-"))
    ]
    return subtract(*runs, preference=preference, dtype=dtype)


def vector_from_adapter(
    adapter: "PeftModel | str | Path",
    *,
    base: str | Path,
    preference: str,
    adapter_name: str = "default",
    data_digest: str = "",
    recipe: Mapping[str, JsonValue] | None = None,
) -> PreferenceVector:
    """One run's delta over the base folder: low-rank entries in fp32; trained norms, heads and biases as full ones.

    `adapter` is a PEFT folder or a live PeftModel (unmerged). PEFT's own model, built without memory, resolves target
    patterns, rank and alpha patterns, rsLoRA and fused experts. Raises InputError for adapters that are not plain LoRA
    (by the option's name), patterns that cannot be matched in bounded time, tensors that are missing, extra or
    misshapen, LoRA on tied embeddings, and convolutions.
    """
    require("lora", "peft")
    from peft import PeftModel, get_peft_model_state_dict

    if isinstance(adapter, PeftModel):
        config, source = adapter.peft_config[adapter_name], "live model"
        # The embeddings' own weights are the base's; asking for them would make PEFT look for a hub.
        state = get_peft_model_state_dict(adapter, adapter_name=adapter_name, save_embedding_layers=False)
    else:
        config, source = _read_config(Path(adapter)), str(adapter)
        shards = Shards(adapter, stem="adapter_model")
        state = {name: shards.tensor(name) for name in shards}
    check_adapter_config(config)
    checkpoint = Checkpoint(base)
    if "model_type" not in checkpoint.config():
        raise InputError(f"{base}: has no config.json with a model_type; give the folder of the base model")
    model, layout, shapes = skeleton(base, config)
    _check_tensors(state, get_peft_model_state_dict(model, save_embedding_layers=False), source)

    entries: dict[str, Entry] = {}
    for parameter, delta in [*_factors(model, state), *_values(state)]:
        if parameter not in layout:
            why = "is tied: untie the base first" if parameter in shapes else "the base does not have"
            raise InputError(f"the adapter {source} changes '{parameter}', which {why}")
        for piece in layout[parameter]:
            part = _piece_of(delta, shapes[parameter], piece)
            if isinstance(delta, Tensor):  # a trained value, not a change
                part = Full(part.dense() - checkpoint[piece.name].float())
                if is_zero(part):
                    continue
            entries[piece.name] = added(entries[piece.name], part) if piece.name in entries else part
    info = VectorInfo(
        preference=check_preference(preference),
        form="low-rank",
        dtype="float32",
        base_fingerprint=fingerprint(checkpoint),
        data_digest=data_digest,
        recipe=dict(recipe or {"method": "lora", "rank": config.r, "alpha": config.lora_alpha}),
    )
    return stored_as(info, entries, torch.float32)


def _read_config(folder: Path) -> "LoraConfig":
    from peft import LoraConfig

    file = folder / "adapter_config.json"
    if not file.is_file():
        raise InputError(f"{folder}: no adapter_config.json; give a folder that PEFT's save_pretrained wrote")
    fields = read_json(file, "not a PEFT adapter config; save the adapter again")
    kind = fields.get("peft_type")
    if not isinstance(kind, str):
        raise InputError(f"{file}: not a PEFT adapter config (no peft_type); save the adapter again")
    if kind != "LORA":
        raise InputError(f"{file}: a {kind} adapter; only LoRA can be kept as a preference vector")
    # PEFT drops options that it does not know; here one of them could change what the adapter means.
    unknown = {name for name, value in fields.items() if value} - {f.name for f in dataclasses.fields(LoraConfig)}
    if unknown:
        raise InputError(f"{file}: unknown option '{min(unknown)}'; install the PEFT version that wrote it")
    with taking_apart(str(file), "save the adapter again"):
        _check_kinds(fields)
        return LoraConfig(**{name: value for name, value in fields.items() if value is not None})


def _check_kinds(fields: Mapping[str, Any]) -> None:
    """ValueError for an option of another type than PEFT writes, which it would trip over later or misread."""

    def texts(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")

    def rank(value: Any) -> bool:
        return isinstance(value, int) and number(value) and value < 1 << 20

    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    checks: dict[str, Any] = {
        "r": rank,
        "lora_alpha": number,
        "rank_pattern": lambda value: isinstance(value, dict) and all(map(rank, value.values())),
        "alpha_pattern": lambda value: isinstance(value, dict) and all(map(number, value.values())),
        "layers_to_transform": lambda value: whole(value) or (isinstance(value, list) and all(map(whole, value))),
        **dict.fromkeys(("modules_to_save", "target_parameters"), texts),
        **dict.fromkeys(
            ("target_modules", "exclude_modules", "layers_pattern"),
            lambda value: isinstance(value, str) or texts(value),
        ),
        **dict.fromkeys(("use_rslora", "fan_in_fan_out", "lora_bias"), lambda value: isinstance(value, bool)),
        "init_lora_weights": lambda value: isinstance(value, bool | str),
    }
    for name, check in checks.items():
        if fields.get(name) is not None and not check(fields[name]):
            raise ValueError(f"{name} is {fields[name]!r:.60}")


def _with_literal_patterns(config: "LoraConfig", names: Collection[str]) -> "LoraConfig":
    """The same config for a base of these module and parameter names, with every pattern replaced by the names that it
    matches. PEFT matches with `re`, which a pattern made for it can keep busy for ever.

    Raises:
        InputError: by the option's name, a pattern that RE2 does not take, or more patterns than the base has names.
    """
    for option in (*MODULE_LISTS, "rank_pattern", "alpha_pattern"):
        value = getattr(config, option) or ()
        if not isinstance(value, str) and len(value) > len(names):
            raise InputError(f"the adapter's {option} has {len(value)} entries, its base {len(names)} names")
    changed: dict[str, Any] = {}
    for option in MODULE_LISTS:
        value = getattr(config, option) or ()
        if isinstance(value, str) and option in ("target_modules", "exclude_modules"):
            if value != "all-linear":
                changed[option] = _literal(value, option, names)
        elif odd := [item for item in ([value] if isinstance(value, str) else value) if not LITERAL.fullmatch(item)]:
            raise InputError(f"the adapter's {option} has {odd[0]!r:.60}; expected the name of a module")
    if changed.get("target_modules") == "":
        raise InputError(f"the adapter's target_modules {config.target_modules!r:.60} match nothing of the base")
    for option in ("rank_pattern", "alpha_pattern"):
        kept: dict[str, Any] = {}
        for key, value in (getattr(config, option) or {}).items():
            pattern = key if LITERAL.fullmatch(key) else _literal(rf"(?:.*\.)?(?:{key})", option, names)
            if pattern:
                kept.setdefault(pattern if pattern == key else f"^(?:{pattern})", value)
        changed[option] = kept
    return dataclasses.replace(config, **changed)


def _literal(pattern: str, option: str, names: Collection[str]) -> str:
    """An alternation of the names that the pattern matches as a whole; empty where it matches none."""
    compiled = compile_pattern(pattern, f"the adapter's {option}")
    return "|".join(re.escape(name) for name in names if compiled.fullmatch(name))


def check_adapter_config(config: "LoraConfig") -> None:
    """InputError by the option's name for an adapter that is more than plain LoRA, so that s B A is not its delta."""
    usual = type(config)()
    for field in dataclasses.fields(config):
        if field.name not in UNDERSTOOD and getattr(config, field.name) not in (
            getattr(usual, field.name),
            None,
        ):
            raise InputError(f"the adapter uses '{field.name}', which is not a plain LoRA; it cannot be kept exactly")
    start = config.init_lora_weights
    if isinstance(start, str) and start.startswith(CHANGES_BASE):
        raise InputError(
            f"the adapter was initialised with '{start}', which changes the base's weights; save it with"
            " PEFT's path_initial_model_for_weight_conversion first"
        )


def _check_tensors(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    for name in sorted(set(expected) - set(state)):
        raise InputError(f"the adapter {source} lacks '{name}'; is it complete, and of this base?")
    for name, tensor in sorted(state.items()):
        if name not in expected and not name.endswith(".base_layer.weight"):  # embeddings saved along
            raise InputError(f"the adapter {source} has the unexpected '{name}'; is it of this base?")
        if name in expected and tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}; expected {tuple(expected[name].shape)}"
            raise InputError(f"the adapter {source}: '{name}' has shape {shapes}")


def skeleton(
    base: str | Path, config: "LoraConfig"
) -> tuple["PeftModel", dict[str, list[TensorPiece]], dict[str, torch.Size]]:
    """PEFT's model of this adapter without memory; the base's layout without tied parameters; all shapes."""
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(from_pretrained(AutoConfig, base))
        layout = checkpoint_layout(model)
        named = dict(model.named_parameters(remove_duplicate=False))
        uses = Counter(id(parameter) for parameter in named.values())
        free = {name: pieces for name, pieces in layout.items() if uses[id(named[name])] == 1}
        shapes = {name: parameter.shape for name, parameter in named.items()}
        with warnings.catch_warnings():  # advice about how to train and to save, which is not ours to give
            warnings.simplefilter("ignore")
            names = dict.fromkeys([*(name for name, _ in model.named_modules()), *named])
            config = _with_literal_patterns(config, names)
            try:
                return get_peft_model(model, dataclasses.replace(config, init_lora_weights=True)), free, shapes
            except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, RuntimeError) as error:
                why = " ".join(str(error).split())
                raise InputError(
                    f"the adapter does not fit the base {base} ({why:.200}); is it of this base?"
                ) from error


def _factors(model: "PeftModel", state: Mapping[str, Tensor]) -> Iterator[tuple[str, Entry]]:
    """Live parameter name -> what LoRA adds to it, from PEFT's layers (with their scales) and the tensors."""
    from peft.tuners.lora import Embedding, Linear, LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        module, scale = _live_name(path), layer.scaling["default"]
        if isinstance(layer, ParamWrapper):  # a stack of experts: one pair of factors each, laid out side by side
            A, B = state[f"{path}.lora_A.weight"].float(), state[f"{path}.lora_B.weight"].float()
            stack = layer.num_experts
            entry = LowRank(A.view(stack, -1, A.shape[1]), B.view(len(B), -1, stack).permute(2, 0, 1) * scale)
            if entry.shape[0] == 1 and layer.get_param().dim() == 2:
                entry = LowRank(entry.A_RI[0], entry.B_OR[0])
            yield f"{module}.{layer.parameter_name}", entry if _upright(layer) else _transposed(entry)
        elif isinstance(layer, Embedding):
            A, B = state[f"{path}.lora_embedding_A"].float(), state[f"{path}.lora_embedding_B"].float()
            yield f"{module}.weight", _transposed(LowRank(A, B * scale))
        elif isinstance(layer, Linear):
            entry = LowRank(state[f"{path}.lora_A.weight"].float(), state[f"{path}.lora_B.weight"].float() * scale)
            yield f"{module}.weight", _transposed(entry) if layer.fan_in_fan_out else entry
            if f"{path}.lora_B.bias" in state:
                yield f"{module}.bias", Full(state[f"{path}.lora_B.bias"].float() * scale)
        else:
            raise InputError(f"the adapter changes '{module}' through {type(layer).__name__}, which is not a matrix")


def _values(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Live parameter name -> its trained value: `modules_to_save`, biases, embeddings saved along."""
    return ((_live_name(name), tensor) for name, tensor in state.items() if ".lora_" not in name)


def _live_name(path: str) -> str:
    return path.removeprefix(PREFIX).replace(".base_layer", "")


def _upright(layer: Any) -> bool:
    """Does this stack hold (out, in) matrices, as Linear does, or (in, out)?"""
    return bool(layer._did_swap_in_out_features or layer.get_param().dim() == 2)


def _transposed(entry: LowRank) -> LowRank:
    """(B A)^T = A^T B^T"""
    return LowRank(entry.B_OR.mT, entry.A_RI.mT)


def _piece_of(delta: Entry | Tensor, shape: torch.Size, piece: TensorPiece) -> Entry:
    """The part of a live parameter's change that belongs to one checkpoint tensor.

    Rows of one matrix of a stack keep their factors; anything else is cut from the dense change.
    """
    if piece.offset == 0 and piece.shape == tuple(shape):
        return Full(delta) if isinstance(delta, Tensor) else delta
    columns = shape[-1]
    if isinstance(delta, LowRank) and piece.stride == (columns, 1) and piece.shape[1] == columns:
        first = piece.offset // columns
        A_RI, B_OR = delta.A_RI, delta.B_OR
        if delta.A_RI.dim() == 3:
            matrix, first = divmod(first, shape[-2])
            A_RI, B_OR = A_RI[matrix], B_OR[matrix]
        return LowRank(A_RI, B_OR[first : first + piece.shape[0]])
    dense = (delta if isinstance(delta, Tensor) else delta.dense()).contiguous()
    return Full(dense.as_strided(piece.shape, piece.stride, piece.offset).contiguous())
