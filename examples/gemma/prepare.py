"""Makes the case study's files out of public data: demonstrations, preference pairs, labelled answers, prompts.

    python examples/gemma/prepare.py <data> runs/gemma-data [--short]

<data> holds the files that README.md lists. Conversations longer than 600 characters are left out, so that a run takes
minutes on two cores. Of HH-RLHF a fifth of the first questions, drawn by their digest, is kept for prompts: no pair and
no demonstration has one of them.
"""

import argparse
import csv
import gzip
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from blake3 import blake3

from prefvec_ray.common.errors import InputError
from prefvec_ray.preferences.formats import UnusableError, transcript_turns

HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant: "
LONGEST = 600
"""Characters of a conversation."""
SIZES = {"pairs": 460, "demonstrations": 600, "prompts": 24}
SHORT = {"pairs": 40, "demonstrations": 24, "prompts": 4}
"""Of `make test-real`."""


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON, JSON Lines or CSV file, gzipped or not."""
    name = path.name.removesuffix(".gz")
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        if name.endswith(".csv"):
            return list(csv.DictReader(lines))
        return json.load(lines) if name.endswith(".json") else [json.loads(line) for line in lines]


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    rows = list(rows)
    with path.open("w", newline="") as out:
        if path.suffix == ".csv":
            table = csv.DictWriter(out, fieldnames=list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        else:
            out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"   {path}: {len(rows)} rows")


def first_question(transcript: str) -> str:
    return transcript.removeprefix(HUMAN).split(ASSISTANT)[0].strip()


def is_kept_for_prompts(transcript: str) -> bool:
    return blake3(first_question(transcript).casefold().encode()).digest()[0] < 256 // 5


def is_short(row: dict[str, str], longest: int = LONGEST) -> bool:
    return max(len(row["chosen"]), len(row["rejected"])) <= longest


def conversation(row: dict[str, str]) -> list[dict[str, str]] | None:
    """The messages of the chosen transcript; None unless question and answer alternate and none is empty."""
    try:
        turns = transcript_turns(row, "chosen", "HH-RLHF")
    except (InputError, UnusableError):
        return None
    alternate = [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
    return turns if alternate and all(turn["content"] for turn in turns) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--short", action="store_true", help="a tenth of it, for make test-real")
    given = parser.parse_args()
    sizes, out, draw = SHORT if given.short else SIZES, given.out, random.Random(0)
    out.mkdir(parents=True, exist_ok=True)

    helpful = read(given.data / "preference/hh-helpful-base/test.jsonl.gz")
    harmless = read(given.data / "preference/hh-harmless-base/test.jsonl.gz")
    safety = read(given.data / "preference/pku_seferlhf_realign_dpo_5k.json.gz")
    alpaca = read(given.data / "sft/alpaca_en_demo.json")
    xstest = read(given.data / "eval/xstest_prompts.csv")
    advbench = read(given.data / "eval/advbench_harmful_behaviors.csv")
    for rows in (helpful, harmless, safety, alpaca, advbench):
        draw.shuffle(rows)

    prompts = [first_question(row["chosen"]) for row in helpful if is_kept_for_prompts(row["chosen"])]
    helpful = [row for row in helpful if not is_kept_for_prompts(row["chosen"])]
    harmless = [row for row in harmless if not is_kept_for_prompts(row["chosen"])]
    short_helpful, short_harmless = list(filter(is_short, helpful)), list(filter(is_short, harmless))

    # Preference pairs, all as HH-RLHF's transcripts: helpful, and harmless half of which is PKU's, one pair a prompt.
    half = sizes["pairs"] // 2
    write(out / "helpful.jsonl", short_helpful[: sizes["pairs"]])
    by_prompt = {row["prompt"]: row for row in safety}
    pku = [
        {
            name: f"{HUMAN}{row['prompt'].strip()}{ASSISTANT}{answer.strip()}"
            for name, answer in zip(("chosen", "rejected"), row["response"], strict=True)
        }
        for row in by_prompt.values()
    ]
    write(out / "harmless.jsonl", short_harmless[:half] + list(filter(is_short, pku))[:half])

    # Demonstrations: Alpaca's, and chosen answers of HH-RLHF that no pair above has.
    shown = [{"messages": turns} for row in short_helpful[sizes["pairs"] :] if (turns := conversation(row))]
    instructions = [
        {
            "messages": [
                {"role": "user", "content": "\n\n".join(filter(None, (row["instruction"], row["input"])))},
                {"role": "assistant", "content": row["output"]},
            ]
        }
        for row in alpaca
        if row["output"].strip() and len(row["instruction"] + row["input"] + row["output"]) <= LONGEST
    ]
    half = sizes["demonstrations"] // 2
    write(out / "sft.jsonl", instructions[:half] + shown[:half])

    # What the scorers learn from: pairs up to twice as long, and PKU's answers with their labels.
    for name, rows in (("helpful", helpful), ("harmless", harmless)):
        fitting = [row for row in rows if is_short(row, 2 * LONGEST)]
        write(out / f"reward-{name}.jsonl", fitting[: 2 * sizes["pairs"]])
    labelled = [
        {"text": answer, "label": label}
        for row in safety[: 2 * sizes["pairs"]]
        for label, answer in zip(("safe", "unsafe"), row["response"], strict=True)
    ]
    write(out / "harm.csv", labelled)

    # Prompts, to search on and to report on: questions of HH-RLHF, XSTest, AdvBench.
    questions = [
        {"prompt": text, "label": "", "source": "hh"} for text in dict.fromkeys(prompts) if len(text) <= LONGEST // 2
    ]
    unsafe = [{"prompt": row["goal"], "label": "unsafe", "source": "advbench"} for row in advbench]
    parts = [questions, unsafe]
    for label in ("safe", "unsafe"):
        rows = [
            {"prompt": row["prompt"], "label": label, "source": "xstest"} for row in xstest if row["label"] == label
        ]
        draw.shuffle(rows)
        parts.append(rows)
    count = sizes["prompts"]
    write(out / "search.csv", [row for part in parts for row in part[:count]])
    write(out / "report.csv", [row for part in parts for row in part[count : 3 * count]])


if __name__ == "__main__":
    main()
