"""A Hugging Face Space of the demo: set the variable BPGCN_MODEL of the Space to the Hub name of a model."""

import os
import sys

if __name__ == "__main__":
    model = os.environ.get("BPGCN_MODEL")
    if not model:
        sys.exit("BPGCN_MODEL is not set: name a BPGCN model on the Hub in the variables of this Space's settings.")
    host, port = os.environ.get("HOST", "0.0.0.0"), os.environ.get("PORT", "7860")

    from modeling_bpgcn.commands.app import main  # seconds to import

    main([model, "--host", host, "--port", port, "--embedded_in", "https://huggingface.co"])
