"""The playground in a real, headless Chromium, against the real endpoint: slide, chat, compare, copy, be refused."""

import contextlib
import io
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from prefvec_ray.serving.http.page import TYPES

ASKED = """it's "the quick" brown \\ fox — why not?"""
REASON = "the front's <b>knee</b>"
FIGURES = {"helpful": {"mean": 0.6, "stderr": 0.02, "n": 64}, "harmless": {"mean": 0.8, "stderr": 0.03, "n": 64}}
BASE = {"helpful": {"mean": 0.4, "stderr": 0.02, "n": 64}, "harmless": {"mean": 0.7, "stderr": 0.03, "n": 64}}


@pytest.fixture(scope="module")
def site(endpoint: Any) -> str:
    """Where the page is; its one preset has a measured trade-off."""
    publish(endpoint, helpful=0.25, harmless=0.75)
    return endpoint.url.removesuffix("v1")


def publish(endpoint: Any, reason: str = REASON, **coefficients: float) -> None:
    """A new version of the preset, if none is quite the same."""
    evidence = {"verdict": "confirmed", "search": {"objectives": ["helpful", "harmless"]}, "base": BASE}
    pinned = {f"{name}@1": eta for name, eta in coefficients.items()}
    endpoint.registry.publish_preset("cautious", pinned, metrics=FIGURES | {"evidence": evidence}, reason=reason)


@pytest.fixture
def visit(browser: Any, site: str) -> Iterator[Callable[..., Any]]:
    """Opens the page in a context of its own. Whatever breaks in it, its policy on content included, fails the test."""
    contexts, broken = [], []

    def open_page(**settings: Any) -> Any:
        context = browser.new_context(permissions=["clipboard-read", "clipboard-write"], **settings)
        context.set_default_timeout(15_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: broken.append(str(error)))
        page.on("console", lambda said: broken.append(said.text) if "Content Security" in said.text else None)
        page.goto(site)
        page.wait_for_selector("body.ready")
        page.locator("#settings summary").click()
        page.get_by_label("Most tokens").fill("12")
        page.keyboard.press("Escape")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert broken == []


def ask(page: Any, prompt: str = ASKED) -> Any:
    """Send a question; its turn, once every answer in it has ended."""
    page.get_by_label("Message", exact=True).fill(prompt)
    page.keyboard.press("Enter")
    turn = page.locator(".turn").last
    page.locator("#stop").wait_for(state="hidden")
    return turn


def told(endpoint: Any, prompt: str = ASKED, model: str = "tiny", **settings: Any) -> Any:
    messages: Any = [{"role": "user", "content": prompt}]
    return endpoint.client.chat.completions.create(
        model=model, messages=messages, temperature=0, max_tokens=12, **settings
    )


def words(turn: Any, side: int) -> str:
    return turn.locator(".words").nth(side).text_content()


def use_key(page: Any, secret: str) -> None:
    page.locator("#key-menu summary").click()
    page.get_by_label("API key").fill(secret)
    page.get_by_role("button", name="Use key").click()


def test_the_pages_files_and_their_headers(site):
    page = httpx.get(site)
    policy = page.headers["content-security-policy"]
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert re.findall(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\bon\w+=", page.text) == []
    parts = re.findall(r'(?:href|src)="(playground/[^"]+)"', page.text)
    scripts = [part for part in parts if part.endswith(".js")]
    for part in scripts:
        scripts += [f"playground/{name}" for name in re.findall(r'from "\./([^"]+)"', httpx.get(site + part).text)]
        assert len(scripts) < 100
    assert len(set(scripts)) > 1
    for part in {*parts, *scripts}:
        answer = httpx.get(site + part)
        assert answer.headers["content-type"].startswith(TYPES[part.rpartition(".")[2]]), part
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", answer.text), part
        again = httpx.get(site + part, headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert httpx.head(site).is_success
    for elsewhere in ("nothing.js", "..%2fapp.py", "%2e%2e/app.py", "__init__.py"):
        assert httpx.get(site + "playground/" + elsewhere).status_code == 404


def test_slide_chat_and_compare(visit, endpoint):
    page = visit()
    slider = page.get_by_label("helpful", exact=True)
    assert (slider.get_attribute("min"), slider.get_attribute("max")) == ("-1", "1")
    assert page.get_by_label("harmless", exact=True).get_attribute("min") == "0"
    slider.focus()
    for _ in range(40):
        page.keyboard.press("ArrowRight")
    exact = page.get_by_label("helpful, exact coefficient")
    assert (slider.get_attribute("aria-valuetext"), exact.input_value()) == ("0.8", "0.8")
    turn = ask(page)
    steered = told(endpoint, extra_body={"preferences": {"helpful": 0.8}})
    base = told(endpoint)
    assert (words(turn, 0), words(turn, 1)) == (base.choices[0].message.content, steered.choices[0].message.content)
    assert words(turn, 0) != words(turn, 1)
    marks = turn.locator(".print").all_text_contents()
    assert marks == [each.system_fingerprint.partition(":")[2][:10] for each in (base, steered)]
    assert "12 tokens" in turn.locator("footer").first.text_content()
    exact.fill("7")
    assert "helpful may go from −1 to 1" in page.locator(".slider .wrong:visible").text_content()
    exact.blur()
    assert exact.input_value() == "0.8", "what is not allowed is told, and nothing else is put in its place"


def test_a_preset_its_reason_and_what_was_measured(visit, endpoint):
    page = visit()
    note = page.locator("#chart-note")
    assert note.text_content() == "Measured at this setting (base): helpful 0.4 ± 0.02, harmless 0.7 ± 0.03."
    preset = page.get_by_role("button", name="cautious")
    assert f"confirmed: {REASON}" in preset.text_content()
    preset.click()
    assert preset.get_attribute("aria-pressed") == "true"
    assert page.get_by_label("harmless, exact coefficient").input_value() == "0.75"
    assert "Measured at this setting (cautious): helpful 0.6 ± 0.02" in note.text_content()
    assert page.locator("#chart .point").count() == 2
    turn = ask(page)
    assert words(turn, 1) == told(endpoint, model="tiny@cautious").choices[0].message.content
    assert turn.locator("header b").all_text_contents() == ["Base", "cautious"]
    page.get_by_label("harmless, exact coefficient").fill("0.7")
    assert preset.get_attribute("aria-pressed") == "false"
    assert "Not measured at this setting" in note.text_content()
    assert page.locator("#chart .here.near").count() == 1
    page.get_by_label("helpful, exact coefficient").fill("-1")
    assert "Not measured here, nor near it" in note.text_content()
    assert page.locator("#chart .here").count() == 0
    again = page.get_by_role("button", name="Ask again")
    again.click()
    page.locator(".turn").nth(1).wait_for()
    page.locator("#stop").wait_for(state="hidden")
    steered = told(endpoint, extra_body={"preferences": {"helpful": -1, "harmless": 0.7}})
    assert words(page.locator(".turn").last, 1) == steered.choices[0].message.content, "asked as the first time"


def test_a_preset_that_moved_is_shown_as_it_answered(visit, endpoint):
    page = visit()
    page.get_by_role("button", name="cautious").click()
    publish(endpoint, helpful=0.5, harmless=0.5)
    try:
        chips = ask(page).locator(".side").last.locator(".chip").all_text_contents()
    finally:
        publish(endpoint, reason=f"{REASON}, as before", helpful=0.25, harmless=0.75)
    assert sorted(chips) == ["harmless 0.5", "helpful 0.5"]


def test_the_copied_code_gets_the_same_answer(visit, endpoint):
    page = visit()
    page.get_by_label("helpful, exact coefficient").fill("0.5")
    turn = ask(page)
    page.get_by_role("button", name="Code").click()
    page.get_by_role("tab", name="Python").click()

    def copied() -> str:
        page.get_by_role("button", name="Copy", exact=True).click()
        page.get_by_text("Copied", exact=True).wait_for()
        return page.evaluate("navigator.clipboard.readText()")

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(copied(), {})
    assert printed.getvalue().startswith(words(turn, 1) + "\n")
    assert "'helpful': 0.5" in printed.getvalue()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Code").click()
    page.get_by_role("tab", name="curl").click()
    if shutil.which("curl"):
        done = subprocess.run(["sh", "-c", copied() + " -s"], capture_output=True, text=True, timeout=60, check=True)
        assert httpx.Response(200, text=done.stdout).json()["choices"][0]["message"]["content"] == words(turn, 1)


def test_by_keyboard_alone(visit):
    page = visit()
    page.reload()
    page.wait_for_selector("body.ready")
    here = "document.activeElement.id || document.activeElement.textContent"

    def tab(until: str) -> list[str]:
        """Press Tab until that has the focus; what had it on the way."""
        reached: list[str] = []
        while not reached or reached[-1] != until:
            assert len(reached) < 40, f"{until} cannot be reached, only {reached}"
            page.keyboard.press("Tab")
            reached.append(page.evaluate(here).strip())
        return reached

    assert tab("Skip to the message box") == ["Skip to the message box"]
    page.keyboard.press("Enter")
    tab("Settings")
    page.keyboard.press("Enter")
    tab("max-tokens")
    page.keyboard.type("12")
    page.keyboard.press("Escape")
    assert page.evaluate(here) == "Settings"
    tab("send")
    tab("eta-0")
    page.keyboard.press("End")
    assert page.locator("#eta-0").get_attribute("aria-valuetext") == "1"
    marked = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert marked != "none", "what has the focus is marked"
    assert {"eta-1", "Figures"} <= set(tab("prompt"))
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    page.locator("#stop").wait_for(state="hidden")
    assert page.locator(".asked").text_content() == "one\ntwo"
    tab("code-open")
    page.keyboard.press("Enter")
    assert page.locator("#code").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#code").is_visible()


def test_a_narrow_screen_in_the_dark(visit):
    page = visit(viewport={"width": 390, "height": 844}, color_scheme="dark", reduced_motion="reduce")
    assert not page.locator("#eta-0").is_visible(), "the conversation comes first"
    page.locator("#balance > summary").click()
    page.get_by_label("helpful, exact coefficient").fill("0.5")
    turn = ask(page)
    first, second = (turn.locator(".side").nth(i).bounding_box() for i in (0, 1))
    assert second["y"] >= first["y"] + first["height"], "one below the other"
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 19, 17)"


def test_what_is_refused_is_said_in_words(visit, endpoint):
    page = visit()
    page.locator("#settings summary").click()
    page.get_by_label("Most tokens").fill("99999")
    page.keyboard.press("Escape")
    ask(page)
    problem = page.locator("#problem")
    problem.wait_for()
    assert "Refused: max_tokens: 99999 is more than 400" in problem.text_content()
    use_key(page, "pv-nobody's")
    page.locator("#state[data-kind=bad]").wait_for()
    assert "A key is needed: this key is not known here" in problem.text_content()
    page.keyboard.press("Escape")
    use_key(page, endpoint.key("hurried", requests_per_minute=1, ranges={"helpful": {"min": 0, "max": 0.5}}))
    page.locator("#state[data-kind=good]").wait_for()
    assert page.get_by_label("helpful", exact=True).get_attribute("max") == "0.5"
    page.locator("#settings summary").click()
    page.get_by_label("Most tokens").fill("12")
    page.keyboard.press("Escape")
    ask(page)
    ask(page)
    assert re.search(r"Too many requests: .* Try again in \d+ s\.", problem.text_content())


def test_a_key_stays_in_its_tab_and_bounds_the_page(visit, endpoint):
    page, secret = visit(), endpoint.key("shown", coefficients="presets")
    use_key(page, secret)
    page.get_by_text("You may ask for presets, and the operator's default, only.").wait_for()
    assert page.get_by_label("helpful", exact=True).is_disabled()
    page.get_by_role("button", name="cautious").click()
    turn = ask(page)
    assert words(turn, 1) == told(endpoint, model="tiny@cautious").choices[0].message.content
    assert words(turn, 0) == told(endpoint).choices[0].message.content, "the default is the base"
    page.get_by_role("button", name="Code").click()
    assert "$PREFVEC_API_KEY" in page.locator("#code-text").text_content()
    assert secret not in page.locator("#code-text").text_content()
    page.keyboard.press("Escape")
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    assert page.evaluate("Object.values(sessionStorage)") == [secret]
    page.locator("#key-menu summary").click()
    page.get_by_role("button", name="Forget").click()
    page.locator("#sliders-note").wait_for(state="hidden")
    assert page.evaluate("sessionStorage.length") == 0


def test_stop_ends_the_generation(visit, endpoint):
    page = visit()
    page.locator("#settings summary").click()
    page.get_by_label("Most tokens").fill("400")
    page.keyboard.press("Escape")
    page.get_by_label("helpful, exact coefficient").fill("0.3")
    before = endpoint.status()
    page.get_by_label("Message", exact=True).fill(ASKED)
    page.keyboard.press("Enter")
    page.locator(".words:not(:empty)").last.wait_for()  # generation is under way
    page.locator("#stop").click()
    page.locator("#stop").wait_for(state="hidden")
    assert "stopped" in page.locator(".side footer").last.text_content()
    assert page.locator("#problem").is_hidden()
    deadline = time.monotonic() + 30
    while (now := endpoint.status())["cancelled"] == before["cancelled"] or now["running"]:
        assert time.monotonic() < deadline, f"still running: {now}"
        time.sleep(0.05)
    assert now["failed"] == before["failed"]
