"""Starts the page: arguments, credentials, loading the base, the server. Imports no torch and no Gradio."""

import argparse
import atexit
import importlib.util
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from qalign.cli import Parser, run_parsed
from qalign.config.load import load as load_recipe
from qalign.config.paths import expanded
from qalign.config.recipe import Model
from qalign.errors import UserError
from qalign.model import origin
from qalign.page.models import ModelEntry, available_models, default_pair
from qalign.page.votes import VoteFile
from qalign.page.worker import Listeners

MAX_WAITING = 24  # requests in the queue for the one model
MAX_SESSIONS = 500  # whose dialogues are kept
FIRST_PORT, TRIED_PORTS = 7860, 100
RUNS = "runs"  # where recipes put runs; it need not be there yet
PREFIX = "qalign-page-"  # of the folder for the page's own files
NOT_NEEDED = ("run_history", "enable_monitoring", "ssr_mode", "pwa", "mcp_server")  # parts of Gradio


def main(words: Sequence[str] | None = None) -> None:
    """Opens the page until it is stopped; does not return."""
    program = "python app.py" if Path(sys.argv[0]).name == "app.py" else "qalign page"
    parser = Parser(prog=program, description="Base against aligned, side by side, in a browser.")
    parser.add_argument("models", nargs="*", metavar="RUN", help="runs or adapter folders to compare, or 'base'")
    parser.add_argument("--runs", default=RUNS, metavar="FOLDER", help="folder of finished runs (default: runs)")
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
    recipe = load_recipe(args.recipe, files_of=("model",)) if args.recipe else None
    runs = expanded(args.runs)
    if args.runs != RUNS and not os.path.isdir(runs):
        raise UserError(f"--runs {args.runs}: there is no such folder")
    found = available_models(args.models, runs, recipe)
    if found:
        origin.check(found[1])
    votes = VoteFile(args.votes)
    with listening(args.host, args.port) as listener:
        os.environ["GRADIO_TEMP_DIR"] = str(own_folder(Path(tempfile.gettempdir())))
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

        # Imported here: torch and Gradio take seconds, and a mistyped folder should be reported at once.
        from qalign.page.actions import Page
        from qalign.page.chat import Chat
        from qalign.page.training.curves import RunList
        from qalign.page.training.process import Training
        from qalign.page.ui import build

        def search(words: list[str]) -> tuple[list[ModelEntry], Model] | None:
            return available_models(words or args.models, runs, recipe)

        listeners, pair, chat = Listeners(), ("", ""), None
        if found:
            pair = default_pair(found[0], args.models)
            print(f"loading {found[1].base} …", flush=True)
            chat = Chat(*found, pair, listeners)
        page = Page(chat or Chat(listeners=listeners), votes, search)
        blocks = build(page, pair, RunList(runs), Training(runs), logout=auth is not None)
        launch(blocks, listener, args, auth, listeners)


def listening(host: str, port: int | None) -> socket.socket:
    """A socket that listens on a host and a port, the first free one from 7860 if it is None; a `UserError` if the port
    is taken or out of range, or the host isn't this computer's."""
    if port is not None and not 0 < port < 2**16:
        raise UserError(f"--port {port}: expected a number from 1 to 65535")
    name, ports = host.removeprefix("[").removesuffix("]"), range(FIRST_PORT, FIRST_PORT + TRIED_PORTS)
    reason: Any = ""
    for number in [port] if port else ports:
        try:
            family, *_, address = sorted(socket.getaddrinfo(name or None, number, type=socket.SOCK_STREAM))[0]
            return socket.create_server(address[:2], family=family)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            if isinstance(error, (socket.gaierror, UnicodeError)) or port:
                raise UserError(f"--host {host}, --port {number}: {reason}") from None
    raise UserError(f"--host {host}: no port from {ports[0]} to {ports[-1]} can be used ({reason}); give --port")


def own_folder(parent: Path) -> Path:
    """A new folder for the page's own files, which no other user can read. It is removed at exit, and here are removed
    those of earlier starts that were killed: their process holds no lock on them any more."""
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if folder.stat().st_uid == os.getuid() and not folder.is_symlink() and locked(folder):
                shutil.rmtree(folder)
    new = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent)).resolve()
    locked(new)
    atexit.register(shutil.rmtree, new, ignore_errors=True)
    return new


def locked(folder: Path) -> bool:
    """Locks a folder for as long as this process lives; False if another process has it."""
    import fcntl

    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(opened)
        return False
    return True


def launch(
    blocks: Any, listener: socket.socket, args: argparse.Namespace, auth: tuple[str, str] | None, listeners: Listeners
) -> None:
    """Serves the page until it is stopped."""
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI
    from gradio import networking

    from qalign.page.security import Guard, served_at
    from qalign.page.ui import CSS, THEME

    host, port = listener.getsockname()[:2]
    public = ""
    if args.share:
        try:
            tunnel = networking.setup_tunnel(host, port, blocks.share_token, None, None)
        except Exception as error:
            raise UserError(f"--share: the public link could not be made: {error}") from None
        public = f"https://{tunnel.partition('://')[2]}"
    blocks.queue(max_size=MAX_WAITING, api_open=False)
    blocks.state_session_capacity = MAX_SESSIONS
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None), blocks, path="/", server_name=host, server_port=port, auth=auth, theme=THEME,
        css=CSS, footer_links=[], max_file_size=1, show_error=False, **dict.fromkeys(NOT_NEEDED, False),
    )  # fmt: skip
    guard = Guard(app, served_at(args.host, public), Path(os.environ["GRADIO_TEMP_DIR"]), listeners)
    config = uvicorn.Config(
        guard,
        http="h11",
        loop="asyncio",  # and nothing else that happens to be installed: the tests are about these
        log_level="warning",
        ws="none",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    shown = f"[{host}]" if ":" in host else host
    print(f"the page is open at http://{shown}:{port}" + (f" and {public}" if public else ""), flush=True)
    uvicorn.Server(config).run(sockets=[listener])
