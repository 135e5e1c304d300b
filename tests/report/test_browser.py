"""In a real browser the page's filters work, and hostile text runs nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chains import HOSTILE, answered, hostile, question, rows, sign
from chromium import Chromium
from pages import IMAGE

from chainforge.core.artifacts import write_json
from chainforge.generate.sampling import sample
from chainforge.report.html import write_report

COUNT = "document.querySelector('#filter output').value"
SHOWN = (
    "[...document.querySelectorAll('#cases > details:not([hidden]) .ask')]"
    ".map((e) => e.textContent)"
)
SIZES = [(1240, 900, "light"), (1240, 900, "dark"), (390, 800, "light"), (390, 800, "dark")]
STOPPED = "Refused to execute|violates the following Content Security Policy"


@pytest.fixture
def page(browser: Chromium, chain: Path) -> Chromium:
    """The report of a finished chain, whose data stage also dropped rows of two prompts."""
    more = [
        sample(question(i), "no form", 1, source="policy", drop=drop, correct=False)
        for i, drop in ((3, "wrong"), (7, "wrong"), (7, "format"))
    ]
    rows(chain / "traces", "samples.jsonl", more)
    write_json(
        chain / "traces" / "funnel.json",
        {"in": 23, "kept": 16, "dropped": {"duplicate": 4, "wrong": 2, "format": 1}},
    )
    rolled = [
        answered(question(i), "cold_start", i % 2 > 0, index, step=step)
        for step, i in ((1, 70), (9, 71))
        for index in range(4)
    ]
    rows(chain / "rl", "rollouts.jsonl", rolled)
    browser.look(1240, 900)
    browser.open(write_report(chain))
    return browser


def problems(browser: Chromium) -> list[Any]:
    """Return what ran, was fetched, was refused or went wrong since the page was opened."""
    fetched = [e["request"]["url"] for e in browser.seen("Network.requestWillBeSent")]
    kinds = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled",
             "Page.javascriptDialogOpening", "Page.frameAttached", "Page.windowOpen",
             "Page.frameRequestedNavigation")  # fmt: skip
    return [url for url in fetched[1:] if not url.startswith(IMAGE)] + [
        event for kind in kinds for event in browser.seen(kind)
    ]


def test_filters_show_what_they_say(page: Chromium) -> None:
    everything = page.js("document.querySelectorAll('#cases > details').length")
    assert page.js(COUNT) == f"{everything} of {everything} prompts"
    assert len(page.js(SHOWN)) == 25  # and a button for more
    page.click("#more")
    assert len(page.js(SHOWN)) == min(50, everything)

    page.pick("where", "held-out problems")
    page.pick("kind", "wrong before, right after")
    assert page.js(COUNT) == f"24 of {everything} prompts"
    page.pick("stage", "base")
    page.pick("verdict", "right")
    assert page.js(COUNT) == f"0 of {everything} prompts"
    page.pick("verdict", "wrong")
    assert page.js(COUNT) == f"24 of {everything} prompts"
    page.pick("task", "sums")
    assert page.js(COUNT) == f"12 of {everything} prompts"

    page.click("#filter button[type=reset]")
    page.js("new Promise((done) => setTimeout(done, 20))")
    assert page.js(COUNT) == f"{everything} of {everything} prompts"
    page.pick("fate", "dropped: wrong")
    assert sorted(page.js(SHOWN)) == ["What is 3 + 3?", "What is 7 + 7?"]
    page.pick("fate", "dropped")
    assert len(page.js(SHOWN)) == 6
    page.pick("fate", "dropped: format")
    page.click("#filter .tick input")
    page.click("#cases > details:not([hidden]) summary")
    visible = "[...document.querySelectorAll('#cases > details:not([hidden]) .text:not([hidden])')]"
    assert page.js(f"{visible}.map((e) => e.dataset.fate)") == ["dropped: format"]
    assert page.js(f"{visible}.every((e) => e.checkVisibility())") is True

    page.click("#filter button[type=reset]")
    page.js("new Promise((done) => setTimeout(done, 20))")
    page.pick("where", "rollouts")
    assert page.js(SHOWN) == ["What is 70 + 70?", "What is 71 + 71?"]
    page.click("#filter [name=words]")
    page.write("71 what")
    assert page.js(SHOWN) == ["What is 71 + 71?"]
    assert problems(page) == []


def test_a_funnel_leads_to_its_rows(page: Chromium) -> None:
    page.click("#data a[data-fate='dropped: wrong']")
    assert sorted(page.js(SHOWN)) == ["What is 3 + 3?", "What is 7 + 7?"]
    assert page.js("location.hash") == "#transcripts"
    page.click("#data a[data-fate='kept']")
    assert len(page.js(SHOWN)) == 16


def test_the_keyboard_alone_is_enough(page: Chromium) -> None:
    at = "document.activeElement.closest('details')?.querySelector('.ask').textContent"
    page.js("document.activeElement.blur()")
    first, second = page.js(SHOWN)[:2]
    page.press("j")
    assert page.js(at) == first
    page.press("j")
    assert page.js(at) == second
    assert page.js("document.activeElement.closest('details').open") is False
    page.press("Enter")
    assert page.js("document.activeElement.closest('details').open") is True
    page.press("k")
    assert page.js(at) == first
    page.click("#filter [name=words]")
    page.press("j")  # is a letter here
    assert page.js("document.activeElement.value") == "j"


@pytest.mark.parametrize(("width", "height", "scheme"), SIZES)
def test_every_size_and_scheme_is_readable(
    page: Chromium, width: int, height: int, scheme: str
) -> None:
    page.look(width, height, scheme)
    assert page.js("document.documentElement.scrollWidth") <= width
    colours = page.js(
        "['color', 'backgroundColor'].map((key) => getComputedStyle(document.body)[key])"
    )
    text, ground = (sum(map(int, c.strip("rgb()").split(","))) for c in colours)
    assert (text < ground) == (scheme == "light")
    assert abs(text - ground) > 450
    cut = (  # text that its own box hides
        "[...document.querySelectorAll('.lineage li > *, .tiles dd, .bar > *, figure h4')]"
        ".filter((e) => e.scrollWidth > e.clientWidth + 1 && e.checkVisibility()"
        " && !e.closest('svg') && e.tagName !== 'svg').map((e) => e.className + e.textContent)"
    )
    assert page.js(cut) == []


def test_without_scripts_all_is_there(browser: Chromium, chain: Path) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(write_report(chain))
        root = browser.call("DOM.getDocument")["root"]["nodeId"]

        def count(selector: str) -> int:
            found = browser.call("DOM.querySelectorAll", nodeId=root, selector=selector)
            return len(found["nodeIds"])

        assert count("#cases > details[hidden]") == 0
        assert count("#cases > details") >= 40
        assert count("#filter[hidden]") == 1
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_hostile_text_runs_nothing(browser: Chromium, tmp_path: Path) -> None:
    browser.look(1240, 900)
    browser.open(write_report(hostile(tmp_path / "hostile")))
    options = browser.js(
        "[...document.querySelectorAll('#filter option')].map((e) => [e.closest('select').name, e.value])"
    )
    assert ["fate", f"dropped: {HOSTILE}"] in options
    for name, value in options:
        browser.choose(name, value)
        browser.choose(name, "")
    assert HOSTILE.replace("\n", "") in browser.js("document.querySelector('h1').textContent")
    browser.js("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    for selector in ("#data a", "h1", ".text", ".alarms li", ".chip", "#filter select", "nav a",
                     ".failure .cause", ".gate li", "#accuracy .facts dd"):  # fmt: skip
        browser.click(selector)
    browser.js("new Promise((done) => setTimeout(done, 100))")
    assert browser.js("[window.hacked, top.hacked]") == [None, None]
    assert browser.js("document.scripts.length") == 1
    assert (
        browser.js(
            "[...document.querySelectorAll('*')].flatMap((e) => [...e.attributes])"
            ".filter((a) => a.name.startsWith('on') || ['style', 'srcdoc'].includes(a.name)"
            " || (a.name === 'href' && !/^#[a-z]+$/.test(a.value))).map((a) => a.name)"
        )
        == []
    )
    assert browser.js("document.querySelectorAll('iframe, base, textarea, math').length") == 0
    images = browser.js("[...document.images].map((e) => e.currentSrc)")
    assert images
    assert all(address.startswith(IMAGE) for address in images)
    assert problems(browser) == []


@pytest.mark.parametrize("policy", [False, True])
def test_the_same_text_would_run_if_it_were_not_escaped(
    browser: Chromium, tmp_path: Path, chain: Path, policy: bool
) -> None:
    """What the test above cannot see otherwise: the text is dangerous, and the policy holds it."""
    html = write_report(chain).read_text()
    if not policy:
        html = html.replace("Content-Security-Policy", "nothing")
    live = HOSTILE.replace("<meta http-equiv=refresh content=0>", "").replace("<base", "<b")
    file = tmp_path / "raw.html"
    file.write_text(html.replace("</main>", f"{live}</main>"))
    browser.open(file)
    browser.js("new Promise((done) => setTimeout(done, 100))")
    hacked = browser.js("top.hacked || 0")
    refused = [e for e in browser.seen("Log.entryAdded") if "Security" in json.dumps(e)]
    assert (hacked > 0, len(refused) > 0) == (not policy, policy)


def test_a_page_of_a_running_chain_reloads_unless_somebody_reads(
    browser: Chromium, chain: Path
) -> None:
    (chain / "eval" / "manifest.json").unlink()
    sign(chain / "eval", "evaluate")
    path = write_report(chain)
    html = path.read_text().replace("<body>", "<body data-running>")
    assert "RELOAD_SECONDS = 15" in html
    # The policy allows the script as it is and no other, so this one goes without.
    html = html.replace("RELOAD_SECONDS = 15", "RELOAD_SECONDS = 0.05")
    html = html.replace("Content-Security-Policy", "nothing")
    path.write_text(html)
    browser.open(path)
    browser.js("window.mark = 1; new Promise((done) => setTimeout(done, 200))")
    assert browser.js("window.mark") == 1  # the first prompt is open
    browser.js("document.querySelector('details[open]').open = false")
    browser.events.clear()
    while not browser.seen("Page.loadEventFired"):
        browser.events.append(browser._receive())
