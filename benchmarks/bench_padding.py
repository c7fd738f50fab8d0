"""What padding costs a DPO run, and what grouping by length and leaving padding out save: `make bench-padding`.

    python benchmarks/bench_padding.py --size 10M --pairs 128 --batch 8 --rounds 3

Random weights on random pairs, whose lengths spread like those of HH-RLHF (log-normal, a factor of two either way). The
variants take turns; what is compared is the CPU time of all steps, which other work on the machine changes little. The
last line of stdout is one JSON object: CPU seconds of each variant over those with padding, and the share of padding.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
from datasets import Dataset
from merge_models import config_of
from transformers import LlamaForCausalLM, PrinterCallback

from prefvec_ray.artifacts.training import Method
from prefvec_ray.tiny_world import TinyWorld, build_tokenizer
from prefvec_ray.training.dpo import TokenizedDPOTrainer, dpo_config, pair_lengths
from prefvec_ray.training.model import load_model, load_tokenizer

GROUPED = {"train_sampling_strategy": "group_by_length"}
VARIANTS = {
    "padded": {},
    "grouped": GROUPED,
    "padding_free": {"padding_free": True},
    "both": {**GROUPED, "padding_free": True},
}


def write_base(folder: Path, size: str) -> None:
    tokenizer, config = build_tokenizer(TinyWorld("micro", 0)), config_of(size)
    config.dtype, config.pad_token_id = "float32", tokenizer.pad_token_id
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def random_pairs(count: int, median: int) -> Dataset:
    """Tokenized pairs; prompt and answers of `median` tokens each, in the middle."""
    draw = np.random.default_rng(0)

    def ids() -> list[int]:
        return draw.integers(300, 400, int(np.clip(draw.lognormal(np.log(median), 0.7), 4, 8 * median))).tolist()

    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [{column: ids() for column in columns} for _ in range(count)]
    reference = {"ref_chosen_logps": -100.0, "ref_rejected_logps": -100.0}
    return Dataset.from_list([row | reference for row in rows])


def cpu_seconds(base: Path, pairs: Dataset, work: str, batch: int, recipe: dict[str, object]) -> float:
    args = dpo_config({"per_device_train_batch_size": batch, "num_train_epochs": 1, "bf16": False, **recipe}, work)
    trainer = TokenizedDPOTrainer(
        model=load_model(base, Method(), args), args=args, train_dataset=pairs, processing_class=load_tokenizer(base)
    )
    trainer.remove_callback(PrinterCallback)
    start = time.process_time()
    trainer.train()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="10M", choices=["1M", "10M", "110M"])
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8, help="pairs of a batch")
    parser.add_argument("--tokens", type=int, default=60, help="of a prompt or an answer, in the middle")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        base, pairs = Path(work) / "base", random_pairs(given.pairs, given.tokens)
        write_base(base, given.size)
        seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
        for _ in range(given.rounds):
            for name, recipe in VARIANTS.items():
                seconds[name].append(cpu_seconds(base, pairs, work, given.batch, recipe))
                print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    lengths = np.array(pair_lengths(pairs, None))
    batches = lengths[np.random.default_rng(0).permutation(len(lengths))][: len(lengths) // given.batch * given.batch]
    rows = batches.reshape(-1, given.batch)
    whole = 2 * rows.max(1).sum() * given.batch
    real = sum(len(row["prompt_ids"]) * 2 + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in pairs)
    over = {name: round(median / medians["padded"], 3) for name, median in medians.items()}
    print(json.dumps({"cpu_over_padded": over, "padding": round(float(1 - real / whole), 3), "size": given.size}))


if __name__ == "__main__":
    main()
