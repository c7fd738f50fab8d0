"""Peak memory of one DPO step over a large vocabulary: log-probs in tiles against all logits at once.

    python benchmarks/bench_head.py --base <folder> --pairs 16 --length 256 --rounds 3

Both train the same LoRA adapter on the same random tokens, each in a process of its own; half of each conversation is
the answer. Prints a line a round on stderr; the last line of stdout is one JSON object with the medians: bytes above
those of the loaded model, seconds of the second step, and `tiles_over_logits` of both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
STEPS = 2


def one(way: str, base: str, pairs: int, length: int) -> dict[str, float]:
    """Two steps in this process."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    from prefvec_ray.artifacts.training import Method
    from prefvec_ray.training.dpo import TokenizedDPOTrainer, dpo_config
    from prefvec_ray.training.lora import adapter_config
    from prefvec_ray.training.model import load_model, load_tokenizer

    class Whole(TokenizedDPOTrainer):
        """All logits at once, as a plain DPO loss computes them."""

        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> torch.Tensor:
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
            mask = inputs["completion_mask"][:, 1:]
            logps = torch.log_softmax(logits.float(), -1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
            chosen, rejected = (logps * mask).sum(1).chunk(2)
            reference = inputs["ref_chosen_logps"] - inputs["ref_rejected_logps"]
            self._metrics["train"]["num_tokens"] = [0]
            return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected - reference)).mean()

    class Clock(TrainerCallback):
        ends = [0.0]

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.ends.append(time.perf_counter())

    method = Method(kind="lora", lora={"r": 8})
    generator = torch.Generator().manual_seed(0)
    tokenizer = load_tokenizer(base)
    draws = torch.randint(10, len(tokenizer), (STEPS * pairs, 3, length // 2), generator=generator).tolist()
    rows = [
        {"prompt_ids": p, "chosen_ids": c, "rejected_ids": r, "ref_chosen_logps": -100.0, "ref_rejected_logps": -100.0}
        for p, c, r in draws
    ]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        recipe = {"per_device_train_batch_size": pairs, "max_length": length, "max_steps": STEPS}
        args = dpo_config(recipe, folder)
        trainer = (TokenizedDPOTrainer if way == "tiles" else Whole)(
            model=load_model(base, method, args),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[clock],
            peft_config=adapter_config(method),
        )
        with Resident() as memory:
            trainer.train()
    return {"bytes": memory.most - memory.before, "seconds": clock.ends[-1] - clock.ends[-2]}


class Resident:
    """The most memory that this process holds within the block: on its GPU, or without one resident and its own."""

    def __enter__(self) -> Resident:
        import torch

        self.gpu = torch.cuda.is_available()
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        self.before = self.most = self.now()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def now(self) -> int:
        import psutil
        import torch

        if self.gpu:
            return torch.cuda.memory_allocated()
        memory = psutil.Process().memory_info()
        return int(memory.rss - memory.shared)

    def watch(self) -> None:
        while not self.ended.wait(0.01):
            self.most = max(self.most, self.now())

    def __exit__(self, *exc: object) -> None:
        import torch

        self.ended.set()
        self.thread.join()
        if self.gpu:
            self.most = torch.cuda.max_memory_allocated()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["tiles", "logits"], help="one of the two, where both do not fit")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given.one, given.base, given.pairs, given.length)))
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ("tiles", "logits") if given.only in (None, way)}
    for _ in range(given.rounds):
        for way, results in found.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--one", way]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:  # killed for memory, most likely
                print(f"{way}: exit code {done.returncode}: {done.stderr[-300:]}", file=sys.stderr)
                continue
            results.append(json.loads(done.stdout.splitlines()[-1]))
            print(way, results[-1], file=sys.stderr, flush=True)
    result: dict[str, Any] = {"pairs": given.pairs, "length": given.length, "rounds": given.rounds}
    for figure in ("bytes", "seconds"):
        medians = {way: statistics.median(r[figure] for r in results) for way, results in found.items() if results}
        result |= {f"{way}_{figure}": value for way, value in medians.items()}
        if len(medians) == 2:
            result[f"tiles_over_logits_{figure}"] = round(medians["tiles"] / medians["logits"], 3)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
