"""Loading what a Hugging Face model folder holds: the one call of `from_pretrained`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefvec_ray.common.errors import InputError, JobError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def from_pretrained(kind: Any, folder: str | Path, *, what: str = "base", **options: Any) -> Any:
    """`kind.from_pretrained(folder, **options)`, such as of `AutoTokenizer`.

    Code that comes with a folder is not run unless `options` say so, and nobody is asked whether it should be.

    Raises:
        InputError: the folder is missing, incomplete or damaged; named as `what`.
    """
    options.setdefault("trust_remote_code", False)
    try:
        return kind.from_pretrained(folder, **options)
    except (InputError, JobError, MemoryError):
        raise
    except Exception as error:  # transformers, tokenizers and safetensors have no common class of errors
        if "outofmemory" in type(error).__name__.lower():
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
        part = kind.__name__.removeprefix("Auto")
        raise InputError(
            f"{what} {folder}: its {part} cannot be loaded ({why:.300}); give the folder of a whole Hugging Face model"
        ) from error


def load_for_sampling(folder: str | Path, *, threads: int = 1) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The language model of a folder in its own dtype, on this process's best device, and its tokenizer.

    From here on Torch computes with `threads`, and Transformers prints no progress bars.

    Raises:
        InputError: as `from_pretrained`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from prefvec_ray.common.device import best_device

    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    model = from_pretrained(AutoModelForCausalLM, folder, dtype="auto", use_safetensors=True)
    return model.to(best_device()), from_pretrained(AutoTokenizer, folder)


def position_room(model: Any) -> int | None:
    """The tokens that a loaded model has positions for; None where its config does not say.

    RoBERTa and its kin count positions from behind the padding's, so that `max_position_embeddings` are not all theirs.
    """
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None and length is not None:
            return int(length) - padding - 1
    return None if length is None else int(length)


def context_length(folder: str | Path) -> int | None:
    """The tokens that the model in a folder has positions for; None where its config does not say."""
    from transformers import AutoConfig

    return positions(from_pretrained(AutoConfig, folder))


def positions(config: "PretrainedConfig") -> int | None:
    """The tokens that a model of this config has positions for; None where it does not say."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if length is None else int(length)
