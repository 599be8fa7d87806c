"""`python -m modeling_bpgcn COMMAND ...`: what can be done with a trained model from a terminal."""

import argparse
import importlib
import sys

PROGRAM = "python -m modeling_bpgcn"
# name: (module of this package with `main(arguments)`, what it does)
COMMANDS = {
    "predict": ("commands.predict", "classes of image files, and the support images that they rest on"),
    "index": ("commands.index", "build the support bank of a model from image files"),
    "evaluate": ("commands.evaluate", "accuracy, calibration and retrieval on labeled images"),
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


if __name__ == "__main__":
    main()
