"""A check of preference data as people read it."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prefvec_ray.preferences.check import DataCheck
from prefvec_ray.preferences.formats import FORMATS
from prefvec_ray.preferences.measures import Lengths, PreferenceCheck


def print_check(check: DataCheck, console: Console) -> None:
    """A column a preference, then what pairs of preferences have in common, then the findings."""
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
    for finding in check.findings:
        color = "red" if finding.level == "error" else "yellow"
        console.print(f"[{color}]{finding.level}[/]: {escape(finding.text)}", soft_wrap=True)
    if not check.findings:
        console.print("[green]nothing wrong found[/]")


def formats_table() -> Table:
    """Every format, with the fields that it is known by."""
    table = Table(title="Formats of preference data, found by their fields", title_justify="left")
    for column in ("format", "what", "fields"):
        table.add_column(column, no_wrap=column == "format")
    for format in FORMATS.values():
        table.add_row(format.name, escape(format.about), escape(format.fields))
    return table


def _lines(check: PreferenceCheck) -> dict[str, str]:
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


def _length_lines(lengths: Lengths) -> dict[str, str]:
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
