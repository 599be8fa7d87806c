"""A web page where visitors try a model: drop an image, see what its answer rests on, turn the ranking, add images."""

import argparse
import importlib.util
import sys
from argparse import ArgumentParser, Namespace

from ..training.thumbnails import read_thumbnails
from .model_options import at_least, load_model

MISSING = "The demo needs Gradio, which is not installed: pip install 'bpgcn[app]'"
NO_PICTURES = (
    "No thumbnails lie beside the model: neighbors are shown by their ids. For pictures build the bank with: python -m"
    " modeling_bpgcn index MODEL IMAGES --output FOLDER --thumbnails"
)


def main(arguments: list[str] | None = None) -> None:
    """Serve the page until the process is stopped.

    Raises:
        SystemExit: 2 after saying what is wrong with the options or the model, or that Gradio is missing.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("gradio") is None:
        parser.error(MISSING)
    try:
        _run(options)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def _run(options: Namespace) -> None:
    from ..app.answering import Demonstration  # with Gradio, seconds to import
    from ..app.server import bind, build_app, serve, share_heaps, upload_folder, url_of

    try:
        listener = bind(options.host, options.port)  # before the model is loaded, which takes longer
    except OSError as error:
        raise OSError(
            f"--host {options.host} --port {options.port} cannot be listened at: {error.strerror}. Choose another"
            " port, or 0 for any."
        ) from None
    share_heaps()
    with listener, upload_folder() as folder:
        model, processor = load_model(options)
        thumbnails = read_thumbnails(options.model, model, options.revision)
        demonstration = Demonstration(model, processor, thumbnails)
        app = build_app(demonstration, folder, options.max_upload_mib * 2**20, options.max_pixels, options.embedded_in)
        url, is_loopback = url_of(listener)
        if not is_loopback:
            print(
                f"Warning: whoever reaches {options.host} can use the page; without --host only you.", file=sys.stderr
            )
        if not thumbnails:
            print(NO_PICTURES, file=sys.stderr)
        print(f"The demo is at {url} (stop it with Ctrl+C)", flush=True)
        serve(app, listener)


def _port(text: str) -> int:
    port = at_least(0)(text)
    if port > 65535:  # of which the system would take the rest of a division
        raise argparse.ArgumentTypeError(f"{port} must be at most 65535")
    return port


def _parser() -> ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m modeling_bpgcn app", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="Folder or Hub name of a BPGCN model.")
    parser.add_argument("--revision", help="Branch, tag or commit of a model on the Hub.")
    parser.add_argument("--device", help="Where the model runs, as torch names it. Default: cuda if there is one.")
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen at. Default: 127.0.0.1, you alone.")
    parser.add_argument("--port", type=_port, default=7860, help="Default: 7860; 0 takes any that is free.")
    parser.add_argument("--max_upload_mib", type=at_least(1), default=10, help="Size of an image file. Default: 10.")
    parser.add_argument(
        "--max_pixels", type=at_least(1), default=25_000_000, help="Pixels of an image. Default: 25 million."
    )
    parser.add_argument(
        "--embedded_in", metavar="ORIGIN", default="'none'", help="Site whose pages may show this one in a frame."
    )
    return parser
