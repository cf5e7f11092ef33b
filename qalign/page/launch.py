"""Starts the page: arguments, credentials, loading the base, Gradio's server. Imports no torch and no Gradio."""

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qalign.cli import Parser, run_parsed
from qalign.config.load import load as load_recipe
from qalign.errors import UserError
from qalign.page.models import ModelEntry, available_models, default_pair
from qalign.page.votes import VoteFile

MAX_WAITING = 24  # requests in the queue for the one model
NOT_NEEDED = ("run_history", "enable_monitoring", "ssr_mode", "pwa", "mcp_server")  # parts of Gradio


def main(words: Sequence[str] | None = None) -> None:
    """Opens the page until it is stopped; does not return."""
    program = "python app.py" if Path(sys.argv[0]).name == "app.py" else "qalign page"
    parser = Parser(prog=program, description="Base against aligned, side by side, in a browser.")
    parser.add_argument("models", nargs="*", metavar="RUN", help="runs or adapter folders to compare, or 'base'")
    parser.add_argument("--runs", default="runs", metavar="FOLDER", help="folder of finished runs (default: runs)")
    parser.add_argument("--recipe", help="recipe whose base to load, if no run says it")
    parser.add_argument("--votes", default="votes.jsonl", metavar="FILE", help="file for votes (default: votes.jsonl)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this computer only)")
    parser.add_argument("--port", type=int, help="port (default: the first free one from 7860)")
    parser.add_argument("--share", action="store_true", help="open a public link through Gradio's servers")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="ask for these; QALIGN_AUTH hides them from `ps`")
    run_parsed(parser, serve, words)


def serve(args: argparse.Namespace) -> None:
    """Checks the arguments, then loads the base and opens the page; a `UserError` if Gradio isn't installed."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs Gradio: pip install 'qalign[page]'")
    from qalign.page.security import credentials  # needs Starlette, which comes with Gradio

    auth = credentials(args.host, args.auth, share=args.share)
    recipe = load_recipe(args.recipe) if args.recipe else None
    found = available_models(args.models, Path(args.runs), recipe)
    votes = VoteFile(args.votes)
    os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="qalign-page-")  # holds no other user's files
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

    # Imported here: torch and Gradio take seconds, and a mistyped folder should be reported at once.
    from qalign.page.actions import Page
    from qalign.page.chat import Chat
    from qalign.page.ui import build

    page, pair = None, ("", "")
    if found:
        pair = default_pair(found[0], args.models)
        print(f"loading {found[1].base} …", flush=True)

        def search() -> list[ModelEntry]:
            return (available_models(args.models, Path(args.runs), recipe) or ([],))[0]

        page = Page(Chat(*found, pair), votes, search)
    launch(build(page, pair), args, auth)


def launch(blocks: Any, args: argparse.Namespace, auth: tuple[str, str] | None) -> None:
    """Serves the page until it is stopped."""
    from starlette.middleware import Middleware

    from qalign.page.security import LocalOnlyMiddleware
    from qalign.page.ui import CSS, THEME

    blocks.queue(max_size=MAX_WAITING, api_open=False)
    try:
        blocks.launch(
            server_name=args.host,
            server_port=args.port,
            share=args.share,
            auth=auth,
            app_kwargs={"middleware": [Middleware(LocalOnlyMiddleware, any_host=auth is not None)]},
            theme=THEME,
            css=CSS,
            footer_links=[],
            max_file_size=1,
            state_session_capacity=500,
            **dict.fromkeys(NOT_NEEDED, False),
        )
    except OSError as error:
        raise UserError(f"--port: {error}") from None
