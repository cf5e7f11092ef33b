"""The real page in headless Chromium, driven by Selenium (`make test-browser`): on the tiny model, whose answers are
noise, and on SmolLM2 where speed and streaming matter."""

import json
import time

import pytest
from selenium.webdriver.common.keys import Keys

from tests.chat_runs import finished_run, serving
from tests.helpers import SMOLLM2
from tests.page.browser import Browser

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::ResourceWarning")]  # Selenium's own sockets
EVIL = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script> ![a](http://evil.example/a.png) **bold**"


@pytest.fixture(scope="module")
def browser():
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def runs(tiny_folder, tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("browser") / "runs" / "a", tiny_folder).parent.parent


@pytest.fixture(scope="module")
def votes(runs):
    return runs.parent / "votes.jsonl"


@pytest.fixture(scope="module")
def address(runs, votes):
    with serving("--runs", str(runs), "--votes", str(votes)) as address:
        yield address


@pytest.fixture
def page(browser, address) -> Browser:
    """The page as a visitor finds it."""
    browser.open(address)
    return browser


def test_the_page_loads_and_asks_nobody_else(browser, address):
    browser.requests()  # Chromium's own first ones
    browser.open(address)
    assert "qalign" in browser.driver.title
    assert "base" in browser.text("#left")
    assert "a/dpo" in browser.text("#right")
    assert browser.requests() <= {"127.0.0.1"}


def test_enter_sends_and_shift_enter_breaks_the_line(page):
    page.type("one", Keys.SHIFT + Keys.ENTER + Keys.NULL, "two")
    assert page.prompt() == "one\ntwo"
    page.type(Keys.ENTER)
    page.answered()
    assert "one\ntwo" in page.text("#left")
    assert page.prompt() == ""


def test_the_whole_page_can_be_used_by_keyboard(page):
    reached = set()
    for _ in range(60):
        element = page.driver.switch_to.active_element
        reached.add(page.run("return document.activeElement.closest('[id]')?.id"))
        element.send_keys(Keys.TAB)
    assert reached >= {"prompt", "send", "retry", "edit", "clear", "blind", "download"}


def test_a_blind_vote_lands_in_the_file_and_names_the_sides(page, votes):
    page.click("#blind input")
    page.until(lambda: "A" in page.text("#left label, #left"))
    page.ask("Why?")
    assert "a/dpo" not in page.text("#left") + page.text("#right")
    assert "seed" not in page.text("#left-figures")
    page.until(lambda: (page("#comment textarea, #comment input").send_keys("both fine"), True)[1])
    before = len(votes.read_text().splitlines()) if votes.exists() else 0
    page.click("#vote-tie")
    page.until(lambda: "Vote saved" in page.text("#status"))
    kept = [json.loads(line) for line in votes.read_text().splitlines()]
    assert len(kept) == before + 1
    assert (kept[-1]["vote"], kept[-1]["comment"]) == ("tie", "both fine")
    assert "a/dpo" in page.text("#left") + page.text("#right")
    assert "blind vote" in page.text("#tally")
    page.until(lambda: not any(vote.is_displayed() for vote in page.driver.find_elements("id", "vote-tie")))


def test_the_button_downloads_the_votes(browser, address, votes, tmp_path):
    votes.write_text('{"vote": "tie", "no_pair": "a vote for \'tie\'"}\n')
    browser.open(address)
    browser.driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    browser.click("#download")
    browser.until(lambda: (tmp_path / "votes.jsonl").is_file(), 20)
    assert (tmp_path / "votes.jsonl").read_text() == votes.read_text()


def test_the_dial_mixes_the_sides_from_one_to_the_other_and_beyond(page):
    page.click("#sampling button")
    page.until(lambda: (page("#seed input, #seed textarea").send_keys("7"), True)[1])
    page.until(
        lambda: (
            page("#temperature input[type=number]").send_keys(Keys.CONTROL + "a" + Keys.NULL, "0", Keys.TAB),
            True,
        )[1]
    )
    shown = {}
    for dial in ("1", "0", "2"):
        box = page("#dial input[type=number]")
        box.send_keys(Keys.CONTROL + "a" + Keys.NULL, dial, Keys.TAB)
        page.until(lambda dial=dial: page("#dial input[type=number]").get_attribute("value") == dial)
        page.ask("Why?")
        shown[dial] = [page.text(f"#{side}").partition("Why?")[2].strip() for side in ("left", "right")]
        assert ("λ" in page.text("#right-figures")) == (dial != "1")
        assert "λ" not in page.text("#left-figures")
        page.click("#clear")
        page.until(lambda: not page.text("#left-figures"))
    assert shown["0"][0] == shown["0"][1] == shown["1"][0]  # at temperature 0 the base's own answer
    assert len({shown[dial][1] for dial in shown}) == 3


def test_a_reload_keeps_serving_even_in_the_middle_of_an_answer(browser, address):
    browser.open(address)
    browser.type("Why?\n")
    browser.until(lambda: browser.text("#left-figures"))
    browser.open(address)
    assert not browser.text("#left-figures")
    browser.ask("Why?")


def test_a_seed_is_drawn_for_each_question_unless_one_is_given(page):
    seeds = []
    for given in ("", "", "7"):
        if given:
            page.click("#sampling button")
            page.until(lambda: (page("#seed input, #seed textarea").send_keys("7"), True)[1])
        page.ask("Why?")
        seeds.append(page.text("#left-figures").split("seed ")[1].split()[0])
        page.click("#clear")
        page.until(lambda: not page.text("#left-figures"))
    assert seeds[0] != seeds[1], "both votes would be on the same draw"
    assert seeds[2] == "7"


def test_retry_edit_and_clear(page):
    page.ask("First question")
    first = page.text("#left-figures")
    page.click("#retry")
    page.until(lambda: page("#send").is_displayed() and page.text("#left-figures") not in ("", first))
    page.click("#edit")
    page.until(lambda: page.prompt() == "First question")
    assert "First question" not in page.text("#left")
    page.ask("")
    page.click("#clear")
    page.until(lambda: "First question" not in page.text("#left"))


def test_a_phone_has_no_sideways_scroll(browser, address):
    browser.open(address, 390)
    browser.ask("Averyveryverylongwordwithoutanyspaceinitthatcannotbebrokenanywhereatall" * 3)
    assert browser.run("return document.documentElement.scrollWidth") <= 390
    for selector in ("#left", "#right", "#prompt", "#send"):
        edges = f"const b = document.querySelector('{selector}').getBoundingClientRect(); return [b.left, b.right]"
        left, right = browser.until(lambda edges=edges: browser.run(edges))
        assert 0 <= left < right <= 390


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 800), (1440, 1600)])
def test_the_chats_fill_the_window_and_no_title_lies_on_a_text(browser, address, width, height):
    browser.open(address, width, height)
    browser.ask("Why? " * 12)
    browser.run("window.scrollTo(0, 0)")
    box = "const b = document.querySelector({!r}).getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]"
    for side in ("#left", "#right"):
        _, _, _, title_bottom = browser.run(box.format(f"{side} label"))
        left, text_top, right, text_bottom = browser.run(box.format(f"{side} .bubble-wrap"))
        assert title_bottom <= text_top
        assert text_bottom <= browser.run(box.format(side))[3]
        assert right - left > 250
    if width > 640:  # one beside the other, and the prompt below them is in sight
        _, top, _, bottom = browser.run(box.format("#left"))
        assert bottom - top == max(300, height - 560)
        assert browser.run(box.format("#prompt"))[3] < height


CONTRAST = """
const light = c => { c = c.map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
                     return .2126 * c[0] + .7152 * c[1] + .0722 * c[2]; };
const numbers = text => text.match(/[\\d.]+/g).map(Number);
let layers = [], element = arguments[0];
for (let e = element; e; e = e.parentElement) layers.unshift(numbers(getComputedStyle(e).backgroundColor));
let back = [255, 255, 255];
for (const [r, g, b, a = 1] of layers) back = back.map((v, i) => v * (1 - a) + [r, g, b][i] * a);
const pair = [light(numbers(getComputedStyle(element).color).slice(0, 3)), light(back)].sort((a, b) => b - a);
return (pair[0] + .05) / (pair[1] + .05);
"""


@pytest.mark.parametrize("dark", [False, True])
def test_text_is_legible_in_light_and_dark(browser, address, dark):
    """At least 4.5 to 1, as WCAG AA asks for."""
    browser.open(address, dark=dark)
    browser.click("#why button")
    browser.click("#colours input")
    browser.ask("Why?")
    browser.until(lambda: browser("#differences .sum"))
    selectors = ("h1", "#left .message", "#right .message", "#prompt textarea", "#differences .coloured .token",
                 "#differences .legend", "#retry", "#tally p")  # fmt: skip
    for selector in selectors:
        for element in browser.driver.find_elements("css selector", selector)[:40]:
            contrast = browser.driver.execute_script(CONTRAST, element)
            assert contrast >= 4.5, f"{selector} ({element.text!r}): {contrast:.1f}"
    back = browser.driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, back.removeprefix("rgb(").rstrip(")").split(",")[:3])) < 200) is dark


def test_html_markdown_and_indentation_in_an_answer_stay_as_they_are(browser, runs, tmp_path):
    answer = f"    indented\n  def f():\n        return 1  # and not a docstring\n{EVIL}"
    forged = f"import qalign.page.chat\nqalign.page.chat.text_of = lambda *_: {answer!r}"
    with serving("--runs", str(runs), "--votes", str(tmp_path / "v.jsonl"), before=forged) as address:
        browser.requests()
        browser.open(address)
        browser.ask(EVIL)
        time.sleep(1)
        assert not browser.run("return window.hacked")
        assert "evil.example" not in browser.requests()
        for side in ("#left", "#right"):
            assert browser.text(side).count("onerror=") == 2  # the question and the answer, as text
            assert browser.text(side).count("**bold**") == 2
            assert not browser.driver.find_elements("css selector", f"{side} .message img, {side} .message script")
        seen = "return document.querySelector('#right .bot .message-content').innerText"  # as it is laid out
        browser.until(lambda: browser.run(seen) == answer)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2") / "runs"
    finished_run(folder / "demo", SMOLLM2, scale=0.005)
    with serving("--runs", str(folder), "--votes", str(folder / "votes.jsonl")) as address:
        yield address


def test_both_sides_of_smollm2_stream_and_the_aligned_answer_is_coloured(browser, smollm2):
    browser.open(smollm2)
    browser.click("#why button")
    browser.click("#colours input")
    began = time.monotonic()
    browser.type("Is it too late to plant tulips in December?\n")
    browser.until(lambda: browser.text("#left-figures") and browser.text("#right-figures"))
    assert time.monotonic() - began < 10  # what a busy machine may take; benchmarks/chat.py measures
    seen = set()
    while not browser.run("return Boolean(document.querySelector('#send')?.offsetParent)"):
        seen.add(browser.run("return document.querySelector('#right').innerText.length"))
        assert time.monotonic() - began < 120
        time.sleep(0.05)
    assert len(seen) > 5, "the answers came in one piece"
    browser.until(lambda: browser("#differences .sum"))
    assert len(browser.driver.find_elements("css selector", "#differences .coloured .token")) > 3
    assert "nats" in browser.text("#differences .sum")


@pytest.mark.parametrize("button", ["stop", "clear"])
def test_a_growing_answer_can_be_stopped_or_cleared(browser, smollm2, button):
    browser.open(smollm2)
    browser.type("Tell me a very long story about a fox, with many chapters.\n")
    browser.until(lambda: browser.text("#left-figures"))
    browser.click(f"#{button}")
    if button == "stop":
        browser.until(lambda: "stopped" in browser.text("#left-figures") + browser.text("#right-figures"), 5)
    browser.until(lambda: browser("#send").is_displayed())
    if button == "clear":
        time.sleep(3)  # whatever came after it has come
        assert browser("#send").is_displayed()
        assert "fox" not in browser.text("#left")
        assert not browser.text("#left-figures")
