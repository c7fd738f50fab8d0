"""The trained tiny world that `bench_search.py` searches: a base and three preference vectors, made once.

    python benchmarks/search_world.py tiny bench-results/search-tiny

`helpful` and `harmless` are the demo's. `polite` is a third preference, trained the same way on pairs of one
answer with more and with less manners, 5% of the labels flipped like the others'. About 4 minutes on 4 cores.
"""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from prefvec_ray.demo import RECIPES
from prefvec_ray.tiny_world import TinyWorld, build_tokenizer, new_model
from prefvec_ray.tiny_world.base_model import fine_tune
from prefvec_ray.tiny_world.grammar import CLOSINGS, OPENINGS

PREFERENCES = ("helpful", "harmless", "polite")


def polite_pairs(world: TinyWorld, split: str, count: int) -> list[dict[str, object]]:
    """TRL pairs, the politer answer chosen: one body, other manners. `split` is train (noisy) or search."""
    rng = random.Random(f"polite/{world.preset}/{world.seed}/{split}")
    prompts = world.prompts(split)  # type: ignore[arg-type]
    noise = world.size.label_noise if split == "train" else 0.0
    rows: list[dict[str, object]] = []
    while len(rows) < count:
        prompt = rng.choice(prompts)
        body = world._draw(world.topics[prompt.topic], rng)
        manners = [(rng.choice((*OPENINGS, "")), rng.choice((*CLOSINGS, ""))) for _ in range(2)]
        if bool(manners[0][0]) + bool(manners[0][1]) == bool(manners[1][0]) + bool(manners[1][1]):
            continue
        manners.sort(key=lambda m: bool(m[0]) + bool(m[1]), reverse=rng.random() >= noise)
        texts = [replace(body, opening=opening, closing=closing).render() for opening, closing in manners]
        said = [[{"role": "assistant", "content": text}] for text in texts]
        rows.append({"prompt": [{"role": "user", "content": prompt.text}], "chosen": said[0], "rejected": said[1]})
    return rows


def train_base(world: TinyWorld, folder: Path) -> None:
    """The demo's base, in this process."""
    tokenizer = build_tokenizer(world)
    model = new_model(world, tokenizer)
    fine_tune(model, tokenizer, world.sft_examples())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build(preset: str, folder: Path, console: Console) -> tuple[Path, dict[str, Path]]:
    """Train what is not there yet; the base's folder and the vectors'. Needs no more than 4 cores."""
    from prefvec_ray.common.cluster import connect
    from prefvec_ray.training import PreferenceData, TrainingConfig, train_vectors

    folder = folder.absolute()
    done = folder / "training.json"
    if not done.exists():
        world = TinyWorld(preset)
        world.write(folder / "world")
        for split, name, count in (("train", "polite", world.size.pairs), ("search", "polite_test", 64)):
            rows = polite_pairs(world, split, count)
            (folder / "world" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        connect(console)
        if not (folder / "base" / "config.json").exists():
            train_base(world, folder / "base")
        data = folder / "world"
        labelled = PreferenceData(data=str(data / "preferences.jsonl"), test=str(data / "preferences_test.jsonl"))
        polite = PreferenceData(data=str(data / "polite.jsonl"), test=str(data / "polite_test.jsonl"))
        train_vectors(
            TrainingConfig(
                name=folder.name,
                output=folder.parent,
                base=folder / "base",
                preferences={"helpful": labelled, "harmless": labelled, "polite": polite},
                dpo=RECIPES[preset],
            )
        )
    vectors = json.loads(done.read_text())["vectors"]
    return folder / "base", {name: Path(vectors[f"{name}-s0"]) for name in PREFERENCES}


if __name__ == "__main__":
    print(build(sys.argv[1], Path(sys.argv[2]), Console()))
