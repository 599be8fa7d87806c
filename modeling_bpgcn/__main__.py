"""`python -m modeling_bpgcn COMMAND ...`: what can be done with a trained model from a terminal."""

import argparse
import importlib
import os
import select
import signal
import sys
from typing import TextIO

PROGRAM = "python -m modeling_bpgcn"
# name: (module of this package with `main(arguments)`, what it does)
COMMANDS = {
    "predict": ("commands.predict", "classes of image files, and the support images that they rest on"),
    "index": ("commands.index", "build the support bank of a model from image files"),
    "evaluate": ("commands.evaluate", "accuracy, calibration and retrieval on labeled images"),
    "app": ("commands.app", "a web page where visitors try the model on images of their own"),
    "export": ("commands.export", "a model as an ONNX file or a torch.export program, checked against the model"),
    "inspect": (
        "commands.inspect",
        "where the gradient arrives, and whether the ranking trains: a table and a picture",
    ),
}


def main(arguments: list[str] | None = None) -> None:
    """Run a command; its module, and what that needs, is imported only then."""
    listing = "\n".join(f"  {name:<10} {what}" for name, (_, what) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=f"commands:\n{listing}\n\n{PROGRAM} COMMAND --help lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=f"one of {', '.join(COMMANDS)}")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what the command takes")
    given = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    module = importlib.import_module(f"{__package__}.{COMMANDS[given.command][0]}")
    module.main(given.arguments)


def run() -> None:
    """`main` as a process of its own: where the reader of its output has gone (`| head -1`), it ends without a word.

    Raises:
        SystemExit: with the status that a shell gives to a process which SIGPIPE has ended. The signal itself would
            also end a server whose client goes away.
    """
    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # a short output is not written before
    except BrokenPipeError:
        closed = [stream for stream in (sys.stdout, sys.stderr) if _reader_is_gone(stream)]
        if not closed:  # it was another pipe
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in closed:  # Python flushes what is left in their buffers when it exits
            os.dup2(nowhere, stream.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None


def _reader_is_gone(stream: TextIO) -> bool:
    poll = select.poll()
    poll.register(stream, 0)  # errors are always reported
    return any(event & select.POLLERR for _, event in poll.poll(0))


if __name__ == "__main__":
    run()
