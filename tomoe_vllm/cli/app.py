"""The application: output, errors and exit codes of all commands.

Messages for people go to standard error; the last line of standard output is JSON. Exit codes: 0 for success,
1 for a failure, 2 for misuse (with one line that says what to do), 130 for Ctrl-C. TOMOE_TRACEBACK=1 prints tracebacks.
"""

import json
import os
import sys
from typing import Annotated

import typer

from tomoe_vllm import __version__
from tomoe_vllm.cli.options import TYPER

app = typer.Typer(
    no_args_is_help=True,
    **TYPER,
    help="Convert a dense LLM to a Mixture-of-Experts without changing its weights (ToMoE), serve it and measure it.",
    epilog="Serve a converted model with: tomoe serve CHECKPOINT, or vllm serve CHECKPOINT --trust-remote-code",
)

_ends_at_once = False


def print_result(facts: dict) -> None:
    """Print the result of a command as one line of JSON."""
    print(json.dumps(facts))


def mark_engine_run() -> None:
    """Record that this process has run a vLLM engine, so that :func:`main` ends it at once.

    Threads of vLLM sometimes outlive the interpreter, which then aborts ("terminate called without an active
    exception", exit code -6) after the result is printed. The engine's own processes end with their parent.
    """
    global _ends_at_once
    _ends_at_once = True


def _print_version(is_given: bool) -> None:
    if is_given:
        print(__version__)
        raise typer.Exit


@app.callback()
def prepare(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Set up the process before any command."""
    from tomoe_training.process_setup import prepare_process

    prepare_process()


def main() -> None:
    """Run the command line and exit; errors become one line on standard error and an exit code."""
    try:
        code = app(standalone_mode=False)  # the code of typer.Exit; newer versions turn Ctrl-C into Exit(130)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        if os.environ.get("TOMOE_TRACEBACK"):
            raise
        format_message = getattr(error, "format_message", None)  # errors of typer's parser have one
        text = format_message() if format_message else str(error) or type(error).__name__
        text = text.replace("Value error, ", "")  # typer validates with pydantic
        if text:  # empty if typer has printed the help instead
            print(f"tomoe: {' '.join(text.split())}", file=sys.stderr)
        code = 2 if format_message or isinstance(error, (ValueError, OSError)) else 1
    if code == 130:
        print("tomoe: interrupted", file=sys.stderr)
    if _ends_at_once:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    sys.exit(code or 0)
