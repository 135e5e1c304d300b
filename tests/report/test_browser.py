"""In a real browser the page's filters work, and hostile text runs nothing."""

import json

import pytest
from chains import HOSTILE, answered, hostile, question, rows, tiny
from pages import IMAGE

from chainforge.core.artifacts import write_json
from chainforge.generate.sampling import sample
from chainforge.report.html import write_report

COUNT = "document.querySelector('#filter output').value"
SHOWN = (
    "[...document.querySelectorAll('#cases > details:not([hidden]) .ask')]"
    ".map((e) => e.textContent)"
)
WAIT = "new Promise((done) => setTimeout(done, {}))"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of a finished chain, whose data stage also dropped rows of two prompts."""
    chain = tiny(tmp_path_factory.mktemp("browser") / "tiny")
    more = [
        sample(question(i), "no form", 1, source="policy", drop=drop, correct=False)
        for i, drop in ((3, "wrong"), (7, "wrong"), (7, "format"))
    ]
    rows(chain / "traces", "samples.jsonl", more)
    dropped = {"duplicate": 4, "wrong": 2, "format": 1}
    write_json(chain / "traces/funnel.json", {"in": 23, "kept": 16, "dropped": dropped})
    rolled = [
        answered(question(i), "cold_start", i % 2 > 0, index, step=step)
        for step, i in ((1, 70), (9, 71))
        for index in range(4)
    ]
    rows(chain / "rl", "rollouts.jsonl", rolled)
    return write_report(chain)


@pytest.fixture
def page(browser, report):
    browser.look(1240, 900)
    browser.open(report)
    return browser


def problems(browser):
    """Return what ran, was fetched, was refused or went wrong since the page was opened."""
    fetched = [e["request"]["url"] for e in browser.seen("Network.requestWillBeSent")]
    kinds = ["Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"]
    kinds += [f"Page.{name}" for name in ("javascriptDialogOpening", "frameAttached", "windowOpen")]
    kinds += ["Page.frameRequestedNavigation"]
    seen = [event for kind in kinds for event in browser.seen(kind)]
    return [url for url in fetched[1:] if not url.startswith(IMAGE)] + seen


def reset(page):
    page.click("#filter button[type=reset]")
    page.js(WAIT.format(20))


def test_filters_show_what_they_say(page):
    everything = page.js("document.querySelectorAll('#cases > details').length")
    assert page.js(COUNT) == f"{everything} of {everything} prompts"
    assert len(page.js(SHOWN)) == 25  # and a button for more
    page.click("#more")
    assert len(page.js(SHOWN)) == min(50, everything)
    page.pick("where", "evaluations")
    for name, value, count in (
        ("kind", "wrong before, right after", 24),
        ("stage", "base", 24),
        ("verdict", "right", 0),
        ("verdict", "wrong", 24),
        ("task", "sums", 12),
    ):
        page.pick(name, value)
        assert page.js(COUNT) == f"{count} of {everything} prompts"
    reset(page)
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
    reset(page)
    page.pick("where", "rollouts")
    assert page.js(SHOWN) == ["What is 70 + 70?", "What is 71 + 71?"]
    page.click("#filter [name=words]")
    page.write("71 what")
    assert page.js(SHOWN) == ["What is 71 + 71?"]
    reset(page)
    page.click("#data a[data-fate='dropped: wrong']")  # a funnel leads to its rows
    assert sorted(page.js(SHOWN)) == ["What is 3 + 3?", "What is 7 + 7?"]
    assert page.js("location.hash") == "#transcripts"
    page.click("#data a[data-fate='kept']")
    assert len(page.js(SHOWN)) == 16
    assert problems(page) == []


def test_the_keyboard_alone_is_enough(page):
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


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1240, 900), (390, 800)])
def test_every_size_and_scheme_is_readable(page, width, height, scheme):
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
    # Each plot is drawn, in the colours of the scheme.
    drawn = "[...document.images].map((e) => e.complete && e.naturalWidth && atob({}))"
    sources = page.js(drawn.format("e.currentSrc.split(',')[1]"))
    colour = {"light": "#0b62b8", "dark": "#6db3f8"}[scheme]
    assert sources
    assert all(f"stroke: {colour}" in source for source in sources)


def test_without_scripts_all_is_there(browser, report):
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(report)
        root = browser.call("DOM.getDocument")["root"]["nodeId"]

        def count(selector: str) -> int:
            found = browser.call("DOM.querySelectorAll", nodeId=root, selector=selector)
            return len(found["nodeIds"])

        assert count("#cases > details[hidden]") == 0
        assert count("#cases > details") >= 40
        assert count("#filter[hidden]") == 1
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_hostile_text_runs_nothing(browser, tmp_path):
    browser.look(1240, 900)
    browser.open(write_report(hostile(tmp_path / "hostile")))
    options = browser.js(
        "[...document.querySelectorAll('#filter option')]"
        ".map((e) => [e.closest('select').name, e.value])"
    )
    assert ["fate", f"dropped: {HOSTILE}"] in options
    for name, value in options:
        browser.pick(name, value)
        browser.pick(name, "")
    assert HOSTILE.replace("\n", "") in browser.js("document.querySelector('h1').textContent")
    browser.js("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    shown = ["h1", "#data a", "#accuracy .facts dd", "nav a", "#filter select"]
    for selector in (*shown, ".text", ".alarms li", ".chip", ".failure .cause", ".gate li"):
        browser.click(selector)
    browser.js(WAIT.format(100))
    assert browser.js("[window.hacked, top.hacked]") == [None, None]
    assert browser.js("document.scripts.length") == 1
    odd = (
        "[...document.querySelectorAll('*')].flatMap((e) => [...e.attributes])"
        ".filter((a) => a.name.startsWith('on') || ['style', 'srcdoc'].includes(a.name)"
        " || (a.name === 'href' && !/^#[a-z]+$/.test(a.value))).map((a) => a.name)"
    )
    assert browser.js(odd) == []
    assert browser.js("document.querySelectorAll('iframe, base, textarea, math').length") == 0
    images = browser.js("[...document.images].map((e) => e.currentSrc)")
    assert images
    assert all(address.startswith(IMAGE) for address in images)
    assert problems(browser) == []


@pytest.mark.parametrize("policy", [False, True])
def test_the_same_text_would_run_if_it_were_not_escaped(browser, tmp_path, report, policy):
    """What the test above cannot see otherwise: the text is dangerous, and the policy holds it."""
    html = report.read_text()
    if not policy:
        html = html.replace("Content-Security-Policy", "nothing")
    live = HOSTILE.replace("<meta http-equiv=refresh content=0>", "").replace("<base", "<b")
    file = tmp_path / "raw.html"
    file.write_text(html.replace("</main>", f"{live}</main>"))
    browser.open(file)
    browser.js(WAIT.format(100))
    hacked = browser.js("top.hacked || 0")
    refused = [e for e in browser.seen("Log.entryAdded") if "Security" in json.dumps(e)]
    assert (hacked > 0, len(refused) > 0) == (not policy, policy)


def test_a_page_of_a_running_chain_reloads_unless_somebody_reads(browser, report, tmp_path):
    # The policy allows the script as it is and no other, so this one goes without.
    html = report.read_text().replace("<body>", "<body data-running>")
    assert "RELOAD_SECONDS = 15" in html
    html = html.replace("RELOAD_SECONDS = 15", "RELOAD_SECONDS = 0.05")
    file = tmp_path / "running.html"
    file.write_text(html.replace("Content-Security-Policy", "nothing"))
    browser.open(file)
    browser.js(f"window.mark = 1; {WAIT.format(200)}")
    assert browser.js("window.mark") == 1  # the first prompt is open
    browser.js("document.querySelector('details[open]').open = false")
    browser.events.clear()
    while not browser.seen("Page.loadEventFired"):
        browser.events.append(browser._receive())
