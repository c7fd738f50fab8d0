"""`prefvec data`."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prefvec_ray.cli.shared import Commands, console, load
from prefvec_ray.common.text import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from prefvec_ray.on_policy import MadePairs
    from prefvec_ray.preferences import DataCheck
    from prefvec_ray.preferences.measures import Lengths, PreferenceCheck
    from prefvec_ray.preferences.show import ShownPair
    from prefvec_ray.training import TrainingConfig


@click.group(cls=Commands)
def data() -> None:
    """Inspect preference data before training on it."""


@data.command("check")
@click.argument("sources", nargs=-1, metavar="[[NAME=]SOURCE]...")
@click.option("--config", "path", type=click.Path(path_type=Path), help="A training config instead of sources.")
@click.option("--test", help="Source of held-out pairs; default: a tenth of the prompts.")
@click.option("--format", help="Name of the format; default: found by itself, see `prefvec data formats`.")
@click.option("--split", help="Split of a hub dataset or of a folder.")
@click.option(
    "--system", type=click.Choice(["keep", "fold"]), default="keep", help="fold: into the first user message."
)
@click.option("--skip-bad", type=click.IntRange(min=0), default=0, help="Leave out up to N rows that cannot be used.")
@click.option("--base", type=click.Path(path_type=Path), help="Folder of the base: measures lengths in its tokens.")
@click.option("--chat-template", help="A Jinja file, or `transcript`, where the base has no chat template.")
@click.option("--max-length", type=click.IntRange(min=1), default=1024, show_default=True, help="In tokens.")
@click.option("--json", "as_json", is_flag=True)
def check_data(sources: tuple[str, ...], path: Path | None, as_json: bool, **options: Any) -> None:
    """What SOURCEs hold and what is wrong with them; exit code 2 where training on them would be garbage.

    A source is a file, a folder, s3://…, or org/name of the hub. NAME is the preference that it is for.
    """
    config = load(path, "prefvec_ray.training", "TrainingConfig") if path else None
    found = run_check(sources, config, **options)
    if as_json:
        click.echo(found.model_dump_json(indent=2))
        for error in found.errors:
            click.echo(f"error: {printable(error)}", err=True)
    else:
        print_check(found, console())
    sys.exit(2 if found.errors else 0)


@data.command("show")
@click.argument("source", metavar="SOURCE", required=False)
@click.option("--base", type=click.Path(path_type=Path), required=True, help="Folder of the base.")
@click.option("-n", "count", type=click.IntRange(min=1), default=5, show_default=True, help="Pairs to show.")
@click.option("--preference", help="In data labelled for both (PKU-SafeRLHF): helpful or harmless.")
@click.option("--format", help="Name of the format; default: found by itself, see `prefvec data formats`.")
@click.option("--split", help="Split of a hub dataset or of a folder.")
@click.option("--system", type=click.Choice(["keep", "fold"]), default="keep")
@click.option("--chat-template", help="A Jinja file, or `transcript`, where the base has no chat template.")
@click.option("--max-length", type=click.IntRange(min=1), default=1024, show_default=True, help="In tokens.")
@click.option("--chat", metavar="JSON", help="Messages of a request instead: what a served model reads.")
@click.option("--sft", is_flag=True, help="SOURCE holds examples for supervised fine-tuning.")
def show_data(
    source: str | None,
    base: Path,
    count: int,
    chat_template: str | None,
    max_length: int,
    chat: str | None,
    sft: bool,
    **options: Any,
) -> None:
    """The first rows of SOURCE as they are trained on: decoded tokens, special ones in « », and what is cut off.

    A source is a file, a folder, s3://…, or org/name of the hub.
    """
    from prefvec_ray.common.errors import InputError
    from prefvec_ray.preferences import give_template, load_preferences
    from prefvec_ray.preferences.show import show_pair
    from prefvec_ray.training.model import load_tokenizer

    if (source is None) == (chat is None):
        raise InputError("give either a source of preference data or --chat JSON")
    if not base.is_dir():
        raise InputError(f"base {base}: no such folder; give the folder of a Hugging Face model")
    tokenizer = load_tokenizer(base)
    if chat_template is not None:
        give_template(tokenizer, chat_template)
    if chat is not None:
        print_request(chat, tokenizer)
        return
    if sft:
        print_examples(str(source), count, options["split"], tokenizer, max_length)
        return
    loaded = load_preferences(str(source), rows=count, **options)
    for number, row in enumerate(loaded.dataset.to_list(), start=1):
        print_pair(number, show_pair(row, tokenizer, max_length), max_length)


@data.command("make")
@click.option("--config", "path", required=True, type=click.Path(path_type=Path), help="YAML, see jobs/configs.")
def make_data(path: Path) -> None:
    """Make pairs of a base's own answers, ranked by a scorer; an interrupted run is resumed."""
    from rich.markup import escape

    from prefvec_ray.common.cluster import connect, progress_bar
    from prefvec_ray.common.paths import check_lasting

    config = load(path, "prefvec_ray.on_policy", "OnPolicyConfig")
    check_lasting(output=config.output)
    from prefvec_ray.on_policy import make_pairs

    out = console()
    connect(out)
    with progress_bar(out, "prompts") as show:
        made = make_pairs(config, out, progress=show)
    out.print(made_table(made))
    for line in made.warnings():
        out.print(f"[yellow]warning[/yellow]: {escape(line)}", soft_wrap=True)
    out.print(f"{config.output / 'pairs.jsonl'}, and made.json beside it: where they come from", soft_wrap=True)


@data.command("formats")
def data_formats() -> None:
    """The forms of preference data that can be read."""
    console().print(formats_table())


def run_check(
    sources: Sequence[str],
    config: "TrainingConfig | None",
    *,
    base: Path | None,
    chat_template: str | None,
    max_length: int,
    format: str | None,
    split: str | None,
    **options: Any,
) -> "DataCheck":
    """Check the data of a config as its training would, or of sources given by hand as `[NAME=]SOURCE`."""
    from prefvec_ray.common.errors import InputError
    from prefvec_ray.common.redact import source_name
    from prefvec_ray.preferences import PKU_LABELS, check_splits, first_format, give_template, load_split

    if (config is None) == (not sources):
        raise InputError("give either sources of preference data or --config FILE")
    if config is not None:
        from prefvec_ray.training.train import check_data as check_config

        config.check()
        return check_config(config, collect_flaws=True)[1]
    splits: dict[str, Any] = {}
    for given in sources:
        named = re.fullmatch(r"([\w-]+)=(.+)", given)
        source = named[2] if named else given
        found = format or first_format(source, split=split)
        stem = Path(source_name(source)).name.partition(".")[0]
        names = [named[1]] if named else list(PKU_LABELS) if found == "pku-saferlhf" else [stem]
        for name in names:
            key = name if name not in splits else f"{name} {len(splits) + 1}"
            splits[key] = load_split(source, preference=name, format=format, split=split, collect_flaws=True, **options)
    tokenizer = context = ends = None
    if base is not None:
        if not base.is_dir():
            raise InputError(f"base {base}: no such folder; give the folder of a Hugging Face model")
        from prefvec_ray.common.pretrained import context_length
        from prefvec_ray.training.model import base_ends, load_tokenizer

        tokenizer, context = load_tokenizer(base), context_length(base)
        if chat_template is not None:
            give_template(tokenizer, chat_template)
        ends = base_ends(base, tokenizer)
    return check_splits(splits, tokenizer=tokenizer, max_length=max_length, context=context, ends=ends)


def print_check(check: "DataCheck", console: "Console") -> None:
    """A column a preference, then what pairs of preferences have in common, then the findings."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title_justify="left")
    table.add_column()
    for name in check.preferences:
        table.add_column(name, overflow="fold")
    columns = [_lines(preference) for preference in check.preferences.values()]
    for line in dict.fromkeys(line for column in columns for line in column):
        table.add_row(line, *(escape(column.get(line, "–")) for column in columns))
    console.print(table)
    for overlap in check.overlaps:
        names = " and ".join(overlap.preferences)
        if overlap.shared:
            share = overlap.opposite / overlap.shared
            console.print(
                f"{names}: {overlap.shared} pairs in both, {overlap.opposite} ({share:.0%}) ordered oppositely"
            )
        else:
            console.print(f"{names}: no pair in both")
    if (sft := check.demonstrations) is not None:
        lengths = f"; tokens of the first {sft.sampled}: median {sft.tokens['p50']}, most {sft.tokens['max']}"
        about = f"sft: {sft.examples} examples ({sft.shape}) of {sft.source}{lengths if sft.sampled else ''}"
        for line in [about, *(f"sft: {note}" for note in sft.notes)]:
            console.print(escape(line), soft_wrap=True)
    for level, color, lines in (("error", "red", check.errors), ("warning", "yellow", check.warnings)):
        for line in lines:
            console.print(f"[{color}]{level}[/]: {escape(line)}", soft_wrap=True)
    if not check.errors and not check.warnings:
        console.print("[green]nothing wrong found[/]")


def print_pair(number: int, pair: "ShownPair", max_length: int) -> None:
    """A line for each part, marked by its name; colours on a terminal."""
    dropped = f", left out of training: the prompt fills max_length {max_length}" if pair.is_dropped else ""
    click.secho(f"pair {number}{dropped}", bold=True)
    for name, text, color in (
        ("prompt", pair.prompt, "cyan"),
        ("chosen", pair.chosen, "green"),
        ("rejected", pair.rejected, "red"),
    ):
        click.echo(f"{name}, {text.tokens} tokens: " + click.style(printable(text.kept), fg=color))
        if text.cut:
            click.echo("   cut off: " + click.style(printable(text.cut), dim=True))


def print_examples(source: str, count: int, split: str | None, tokenizer: Any, max_length: int) -> None:
    """The first examples of a source for supervised fine-tuning, each as `print_pair` shows a pair."""
    from jinja2 import TemplateError

    from prefvec_ray.common.errors import InputError
    from prefvec_ray.preferences.demonstrations import Demonstrations, tokenize_demonstration
    from prefvec_ray.preferences.show import marked

    for number, example in enumerate(Demonstrations(source, split=split, limit=count), start=1):
        try:
            prompt, whole = tokenize_demonstration(example, tokenizer)
        except TemplateError as error:
            raise InputError(f"the chat template refuses example {number}: {error}") from None
        click.secho(f"example {number}", bold=True)
        if prompt:
            click.echo(f"prompt, {len(prompt)} tokens: {click.style(printable(marked(prompt, tokenizer)), fg='cyan')}")
        kept = whole[len(prompt) : max_length]
        click.echo(f"learned, {len(kept)} tokens: {click.style(printable(marked(kept, tokenizer)), fg='green')}")
        if cut := whole[max(max_length, len(prompt)) :]:
            click.echo("   cut off: " + click.style(printable(marked(cut, tokenizer)), dim=True))


def print_request(chat: str, tokenizer: Any) -> None:
    """What a served model reads of a chat's messages."""
    from prefvec_ray.common.chat import special_tokens
    from prefvec_ray.common.errors import InputError
    from prefvec_ray.preferences.show import marked
    from prefvec_ray.serving.encoding import Tokenization

    try:
        messages = json.loads(chat)
        turns = [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in messages]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InputError('--chat: expected messages such as [{"role": "user", "content": "Hi"}]') from None
    if tokenizer.chat_template is None:
        raise InputError("the base has no chat template; give --chat-template")
    ids = Tokenization(tokenizer, None, special_tokens(tokenizer)).encode_chat(turns, len(chat) * 100)
    click.echo(f"{len(ids)} tokens: {printable(marked(ids, tokenizer))}")


def made_table(made: "MadePairs") -> "Table":
    """How many pairs were made, and what they are like."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=escape(f"Pairs for {made.preference}, by {made.rank_by}"), title_justify="left", show_header=False
    )
    lines = {name.replace("_", " "): str(count) for name, count in made.counts.model_dump().items()}
    lines["chosen better by"] = f"{made.gain}"
    lines["chosen longer by, in tokens"] = f"{made.longer_by}"
    if made.chosen_longer is not None:
        lines["chosen is the longer"] = f"{made.chosen_longer:.1%}"
    for name, value in lines.items():
        table.add_row(name, value)
    return table


def formats_table() -> "Table":
    """Every format, with the fields that it is known by."""
    from rich.markup import escape
    from rich.table import Table

    from prefvec_ray.preferences import FORMATS

    table = Table(title="Formats of preference data, found by their fields", title_justify="left")
    for column in ("format", "what", "fields"):
        table.add_column(column, no_wrap=column == "format")
    for format in FORMATS.values():
        table.add_row(format.name, escape(format.about), escape(format.fields))
    return table


def _lines(check: "PreferenceCheck") -> dict[str, str]:
    """Name of a line to its text."""
    lines = {
        "source": check.source,
        "format": check.format + (", conversations" if check.conversational else ", plain text"),
        "because": check.why,
        "rows": f"{check.rows}",
        "rows unreadable": f"{check.unreadable}",
        **{f"left out: {reason}": f"{count}" for reason, count in check.dropped.items()},
        "pairs to train on": f"{check.pairs}",
        "pairs held out": f"{check.held_out}",
        "distinct prompts": f"{check.prompts}",
        "held-out prompts trained on": f"{check.shared_prompts} of {check.held_out_prompts}",
        "pairs that repeat": f"{check.duplicates}",
        "pairs in both orders": f"{check.contradictions}",
        "pairs with a system message": f"{check.system_messages}",
        "chosen is the longer": f"{check.chosen_longer:.1%}",
    }
    if check.labels:
        lines["chosen by place"] = ", ".join(f"{place} {count}" for place, count in sorted(check.labels.items()))
    return lines | (_length_lines(check.lengths) if check.lengths and check.lengths.whole else {})


def _length_lines(lengths: "Lengths") -> dict[str, str]:
    lines = {
        f"tokens of {what}": " / ".join(str(value) for value in values.values())
        for what, values in (
            ("prompt, p50/p90/p99/max", lengths.prompt),
            ("chosen", lengths.chosen),
            ("rejected", lengths.rejected),
            ("the whole", lengths.whole),
        )
    }
    lines["pairs tokenized"] = f"{lengths.sampled}"
    if lengths.max_length is not None:
        lines |= {
            "max_length": f"{lengths.max_length}",
            "longer than max_length": f"{lengths.truncated}",
            "dropped: prompt fills it": f"{lengths.left_out}",
            "answers equal up to it": f"{lengths.cut_equal}",
        }
    return lines
