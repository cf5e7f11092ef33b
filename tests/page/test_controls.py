"""Every control of the page is used by a visitor in Chromium. A control that no step here uses fails the test."""

import json
from pathlib import Path

import pytest
from selenium.webdriver.common.keys import Keys

from tests.chat_runs import finished_run, serving
from tests.page.browser import Browser

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::ResourceWarning")]  # Selenium's own sockets
CONTROLS = Path(__file__).with_name("controls.js").read_text(encoding="utf-8")


class Visitor(Browser):
    """Uses controls by name, and keeps the names of those that were ever shown and of those that were used."""

    def __init__(self, votes: Path):
        super().__init__()
        self.votes, self.seen, self.used = votes, set(), set()

    def look(self) -> set[str]:
        now = set(self.run(CONTROLS))
        self.seen |= now
        return now

    def use(self, name: str, *keys: str):
        """Clicks a control, or types into it."""

        def done() -> bool:
            self.look()
            control = self.driver.execute_script(CONTROLS, name)
            if not self.stands_still(control):
                return False
            control.send_keys(*keys) if keys else control.click()
            return True

        self.until(done)
        self.used.add(name)

    def ask(self, text: str = "Why?") -> None:
        self.type(text)
        self.use("send: Send")
        self.answered()
        self.look()

    def says(self, selector: str, words: str) -> None:
        self.until(lambda: words in self.text(selector))

    def number(self, name: str) -> float:
        return float(self(f"#{name} input[type=number]").get_attribute("value"))


@pytest.fixture(scope="module")
def visitor(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("controls")
    runs = finished_run(folder / "runs" / "a", tiny_folder).parent.parent
    with serving("--runs", str(runs), "--votes", str(folder / "votes.jsonl"), "--auth", "me:secret") as address:
        visitor = Visitor(folder / "votes.jsonl")
        visitor.address = address
        yield visitor
        visitor.close()


def test_every_control_does_what_it_says(visitor, tmp_path):
    log_in(visitor)
    for part in (turns_to_the_tabs, asks, goes_on, samples, chooses_models, votes, colours_and_folds, stops):
        part(visitor)
    downloads(visitor, tmp_path)
    visitor.use("logout: Log out")
    visitor.until(lambda: visitor("input[type=password]").is_displayed())
    assert len(visitor.seen) >= 40
    assert visitor.seen - visitor.used == set()


def log_in(visitor):
    visitor.driver.get(visitor.address)
    visitor.until(lambda: visitor("input[type=password]").is_displayed())
    text, password = visitor("input:not([type=password]), textarea"), visitor("input[type=password]")
    visitor.look()
    text.send_keys("me")
    password.send_keys("secret")
    visitor.driver.find_elements("css selector", "button")[-1].click()
    visitor.until(lambda: visitor("#prompt textarea").is_displayed())
    visitor.seen.clear()  # the form for the password is used, and gone
    visitor.until(lambda: len(visitor.look()) > 15 and visitor.text("#tally"))  # the page has greeted


def turns_to_the_tabs(visitor):
    """Only that they open: `test_training_browser` uses what is in them."""
    seen = {*visitor.seen}
    for name in ("Train", "Curves", "Compare"):
        visitor.tab(name)
        visitor.used.add(f"tabs: {name}")
    visitor.until(lambda: visitor("#prompt textarea").is_displayed())
    visitor.seen = seen


def asks(visitor):
    examples = sorted(name for name in visitor.look() if name.startswith("examples: "))
    assert len(examples) == 6
    for name in examples:
        visitor.use(name)
        visitor.until(lambda name=name: visitor.prompt().startswith(name.removeprefix("examples: ").rstrip(".")[:20]))
    visitor.use("prompt: textarea", Keys.CONTROL + "a" + Keys.NULL, "One question")
    visitor.ask("!")
    visitor.says("#left", "One question!")
    before = visitor.text("#left-figures")
    visitor.use("retry: Retry")
    visitor.until(lambda: visitor("#send").is_displayed() and visitor.text("#left-figures") not in ("", before))
    visitor.use("edit: Edit last")
    visitor.until(lambda: visitor.prompt() == "One question!")
    for clear in ("clear: Clear", "left: Clear", "right: Clear"):
        visitor.ask("")
        visitor.says("#right", "question!")
        visitor.use(clear)
        visitor.until(lambda: "question!" not in visitor.text("#left") + visitor.text("#right"))
        visitor.type("Another question!")


def goes_on(visitor):
    visitor.use("clear: Clear")
    for _ in range(9):  # until both are cut
        visitor.ask("")
        if "have not ended" in visitor.text("#cut"):
            break
        visitor.use("clear: Clear")
        visitor.type("Why?")
    assert visitor.text("#left-figures").startswith("96 tokens")
    visitor.use("more: Let it go on")
    visitor.until(lambda: visitor("#send").is_displayed() and not visitor.text("#left-figures").startswith("96 "))
    visitor.answered()
    assert "One question" not in visitor.text("#left")


def samples(visitor):
    visitor.use("sampling: Sampling")
    for name, label, default in (
        ("temperature", "Temperature", 0.7),
        ("top-p", "Top-p", 0.95),
        ("tokens", "Max tokens", 96),
        ("dial", "Dial λ", 1),
    ):
        visitor.until(lambda name=name, default=default: visitor.number(name) == default)
        typed = 2 if name == "dial" else 1
        visitor.use(f"{name}: number input for {label}", Keys.CONTROL + "a" + Keys.NULL, str(typed), Keys.TAB)
        visitor.until(lambda name=name, typed=typed: visitor.number(name) == typed)
        visitor.use(f"{name}: range slider for {label}", Keys.ARROW_LEFT)
        visitor.until(lambda name=name, typed=typed: visitor.number(name) < typed or name == "tokens")
        visitor.use(f"{name}: Reset to default value")
        visitor.until(lambda name=name, default=default: visitor.number(name) == default)
    visitor.use("tokens: number input for Max tokens", Keys.CONTROL + "a" + Keys.NULL, "3", Keys.TAB)
    visitor.use("seed: text", "7")
    visitor.use("system: textarea", "Be short.")
    visitor.use("clear: Clear")
    visitor.ask()
    visitor.says("#left-figures", "3 tokens")
    visitor.says("#left-figures", "seed 7")


def chooses_models(visitor):
    for name, label, side, model in (
        ("first", "First model", "left", "a/dpo"),
        ("second", "Second model", "right", "base"),
    ):
        visitor.use(f"{name}: {label}")
        visitor.until(lambda model=model: [option.click() for option in visitor.driver.find_elements(
            "css selector", "[role=option]") if option.text.strip().endswith(model)])  # fmt: skip
        visitor.says(f"#{side} label", model)
    visitor.ask()


def votes(visitor):
    visitor.use("blind: checkbox")
    visitor.until(lambda: visitor.text("#left label") == "A")
    for name, choice in (("A is better", "a"), ("B is better", "b"), ("Tie", "tie"), ("Both bad", "both_bad")):
        visitor.ask()
        visitor.use("comment: textarea", f"about {choice}")
        visitor.use(f"vote-{choice}: {name}")
        visitor.says("#status", "Vote saved")
        kept = json.loads(visitor.votes.read_text().splitlines()[-1])
        assert (kept["vote"], kept["comment"]) == (choice, f"about {choice}")
        assert kept["prompt"][0] == {"role": "system", "content": "Be short."}
    visitor.says("#tally", "of 4 votes in the file will train")


def colours_and_folds(visitor):
    visitor.use("why: Why they differ")
    visitor.until(lambda: visitor("#colours").is_displayed())
    visitor.use("colours: checkbox")
    visitor.until(lambda: visitor("#differences .sum"))
    visitor.use("votes: Votes")
    visitor.until(lambda: not visitor("#tally").is_displayed())
    visitor.use("votes: Votes")
    visitor.until(lambda: visitor("#tally").is_displayed())


def stops(visitor):
    for _ in range(5):  # the tiny model may end by itself before
        visitor.use("clear: Clear")
        visitor.use("tokens: number input for Max tokens", Keys.CONTROL + "a" + Keys.NULL, "190", Keys.TAB)
        visitor.use("seed: text", Keys.BACKSPACE)
        visitor.type("Why?\n")
        visitor.until(lambda: visitor("#stop").is_displayed())
        visitor.use("stop: Stop")
        visitor.answered()
        if "stopped" in visitor.text("#left-figures") + visitor.text("#right-figures"):
            return
    pytest.fail("no answer was stopped")


def downloads(visitor, folder):
    visitor.driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})
    visitor.use("download: Download votes.jsonl")
    visitor.until(lambda: (folder / "votes.jsonl").is_file())
    assert (folder / "votes.jsonl").read_text() == visitor.votes.read_text()
