"""Base against aligned, side by side, in a browser.

    python app.py                               # the newest run under runs/ against its base
    python app.py runs/a/dpo runs/b/ppo         # any two, or `base`

It answers to this computer only, unless --host or --share say otherwise; those ask for --auth. What the page looks like
is in `qalign/page/ui.py`, what it does in `qalign/page/actions.py`, what the models say in `qalign/page/chat.py`.
"""

import argparse
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

from qalign.cli import exit_code
from qalign.config.load import load as load_recipe
from qalign.errors import UserError
from qalign.page.models import lineup, opponents
from qalign.page.security import LocalOnlyMiddleware, credentials
from qalign.page.votes import VoteFile

WAITING = 24  # requests that may queue for the one model


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python app.py", description=__doc__.partition("\n")[0])
    parser.add_argument("sides", nargs="*", metavar="RUN", help="runs or adapter folders to compare, or 'base'")
    parser.add_argument("--runs", default="runs", metavar="FOLDER", help="where finished runs lie (default: runs)")
    parser.add_argument("--recipe", help="whose base to load, where no run says it")
    parser.add_argument("--votes", default="votes.jsonl", metavar="FILE", help="where votes go (default: votes.jsonl)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this computer only)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument("--share", action="store_true", help="a public link through Gradio's servers")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="ask for these; QALIGN_AUTH hides them from `ps`")
    return parser.parse_args()


def serve(args: argparse.Namespace) -> None:
    """Checks what was asked for, then loads the base and opens the page."""
    auth = credentials(args.host, args.auth, share=args.share)
    recipe = load_recipe(args.recipe) if args.recipe else None
    found = lineup(args.sides, Path(args.runs), recipe)
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs Gradio: pip install 'qalign[page]'")
    votes = VoteFile(args.votes)
    os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="qalign-page-")  # nobody else's files in it
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

    # Imported here, not above: torch and Gradio take seconds, and a mistyped folder must not wait for them.
    from qalign.page.actions import Page
    from qalign.page.chat import Chat
    from qalign.page.ui import build

    page, sides = None, ("", "")
    if found:
        contenders, model = found
        sides = opponents(contenders, args.sides)
        print(f"loading {model.base} …", flush=True)
        chat = Chat.open(contenders, model)
        chat.load(*sides)
        page = Page(chat, votes, lambda: (lineup(args.sides, Path(args.runs), recipe) or ([],))[0])
    launch(build(page, sides), args, auth)


def launch(blocks, args: argparse.Namespace, auth: tuple[str, str] | None) -> None:
    """Serves the page until it is stopped."""
    from starlette.middleware import Middleware

    from qalign.page.ui import CSS, theme

    blocks.queue(max_size=WAITING, api_open=False)
    try:
        blocks.launch(
            server_name=args.host,
            server_port=args.port,
            share=args.share,
            auth=auth,
            app_kwargs={"middleware": [Middleware(LocalOnlyMiddleware, open_to_others=auth is not None)]},
            theme=theme(),
            css=CSS,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            max_file_size=1,
            state_session_capacity=500,
        )
    except OSError as error:
        raise UserError(f"--port: {error}") from None


def main() -> None:
    args = arguments()
    sys.exit(exit_code(lambda: serve(args)))


if __name__ == "__main__":
    main()
