"""Foreign text on its way to a terminal, a log or a Markdown page."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefvec_ray.common.text import cell, fenced, markdown_cell, mermaid_label, printable, printable_json

HOSTILE = ["\x1b[2J", "a\nb", "\x9b31m", "\u202egnp", "zero\u200bwidth", "\x07", "\r", "\ud800"]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_acts_on_a_terminal(text):
    assert printable(text).isprintable()
    assert printable_json([text]).isascii()
    assert "\\" in printable(text)


@given(st.text())
def test_plain_text_stays_as_it_is(text):
    shown = printable(text)
    assert shown.isprintable()
    if text.isprintable():
        assert shown == text


@pytest.mark.parametrize("text", ["[/]", "[red]x[/red]", "[link=http://x]y[/link]", "\\[", "[bold"])
def test_a_cell_has_no_markup(text):
    from rich.console import Console
    from rich.table import Table

    out = io.StringIO()
    table = Table("x")
    table.add_row(cell(text))
    Console(file=out, width=200).print(table)
    assert text in out.getvalue()


def render(text: str) -> str:
    import markdown

    return markdown.markdown(text, extensions=["tables", "fenced_code"])


@given(st.text(alphabet="`~#-|<>=\n abc*[]()!"))
def test_a_fence_is_not_left(text):
    page = render(f"before\n\n{fenced(text)}\n\nafter")
    assert page.count("<h1>") == page.count("<h2>") == page.count("<a ") == page.count("<table>") == 0
    assert page.startswith("<p>before</p>")
    assert page.endswith("<p>after</p>")


@pytest.mark.parametrize(
    "text", ["a | b", "x\n| forged | row |", "<script>", "`code`", "[a](http://x)", "![a](x)", "**b**", "\\|", "&lt;"]
)
def test_a_markdown_cell_is_one_cell(text):
    page = render(f"| key | value |\n|---|---|\n| text | {markdown_cell(text)} |\n")
    assert page.count("<td>") == 2
    for tag in ("<script", "<code", "<a ", "<img", "<strong"):
        assert tag not in page


def test_a_mermaid_label_stays_inside_its_quotes():
    label = mermaid_label(["vector", 'x"] --> y["<b>', "a\nb"])
    assert label.count('"') == 2
    assert "<" not in label
    assert "\n" not in label
