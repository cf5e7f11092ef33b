"""Draws page.png: the page with two models of finished runs, in Chromium (`make test-browser` needs the same packages).

PYTHONPATH=. python docs/make_page_png.py --runs runs base runs/demo/dpo
"""

import base64
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
        browser.open(address, 1280, 900)
        for part in ("#sampling", "#why"):
            browser.click(f"{part} button")
        browser.until(lambda: browser("#seed input, #seed textarea").send_keys(SEED) is None)
        browser.click("#colours input")
        browser.click("#sampling button")
        browser.type(QUESTION, "\n")
        browser.answered(300)
        browser.until(lambda: browser("#differences .sum"))
        clip = {"x": 0, "y": 0, "width": 1280, "height": browser.run("return document.body.scrollHeight"), "scale": 1}
        whole = {"captureBeyondViewport": True, "clip": clip}
        picture = browser.driver.execute_cdp_cmd("Page.captureScreenshot", whole)["data"]
        Path(__file__).with_name("page.png").write_bytes(base64.b64decode(picture))
        browser.close()


if __name__ == "__main__":
    main()
