"""Draws page.png: the page with two models of finished runs, in Chromium (`make test-browser` needs the same packages).

PYTHONPATH=. python docs/make_page_png.py --runs runs base runs/demo/dpo
"""

import sys
import tempfile
from pathlib import Path

from tests.chat_runs import serving
from tests.page.browser import Browser

QUESTION = "How do I get red wine out of a white shirt?"
SEED = "3"


def main() -> None:
    """Asks with a fixed seed, colours the tokens, saves the picture."""
    with tempfile.TemporaryDirectory() as folder, serving(*sys.argv[1:], "--votes", f"{folder}/votes.jsonl") as address:
        browser = Browser()
        browser.open(address, 1280, 1250)
        for part in ("#sampling", "#why"):
            browser.click(f"{part} button")
        browser.until(lambda: browser("#seed input, #seed textarea").send_keys(SEED) is None)
        browser.click("#colours input")
        browser.click("#sampling button")
        browser.type(QUESTION, "\n")
        browser.answered(300)
        browser.until(lambda: browser("#differences .sum"))
        browser.run("window.scrollTo(0, 0)")
        browser.driver.save_screenshot(str(Path(__file__).with_name("page.png")))
        browser.close()


if __name__ == "__main__":
    main()
