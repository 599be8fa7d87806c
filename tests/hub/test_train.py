"""`train.py --push_to_hub` as people run it: what is on the Hub when it ends, and that this answers elsewhere."""

import torch
from torch.testing import assert_close

from modeling_bpgcn import BPGCNForImageClassification
from tests.hub.fake_hub import front_matter
from tests.training_factory import ROOT, write_recipe

TRAIN = """
import runpy
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

READ = """
from transformers import AutoImageProcessor, AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("alice/trained", trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
size = AutoImageProcessor.from_pretrained("alice/trained").crop_size["height"]
images = torch.linspace(-1, 1, 4 * 3 * size * size).view(4, 3, size, size)
with torch.no_grad():
    torch.save({"images": images, "logits": model(images).logits}, sys.argv[1])
"""


def test_a_run_that_is_pushed_at_its_end_answers_in_a_process_without_the_package(hub, client, tmp_path):
    recipe = write_recipe(tmp_path, max_steps=3, push_to_hub=True, hub_model_id="alice/trained")
    options = ("--output_dir", tmp_path / "run")
    printed = client.run(TRAIN, ROOT / "train.py", recipe, *options, package=True, token="hf_alice")
    assert "BPGCN, from the support bank" in printed

    assert len(hub.repositories["alice/trained"].commits) == 2  # the empty repository, and what the end pushes
    files = hub.files("alice/trained")
    assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"} <= files.keys()
    assert {"modeling_bpgcn.py", "configuration_bpgcn.py", "support_bank.py"} <= files.keys()
    assert front_matter(files["README.md"].decode())["pipeline_tag"] == "image-classification"
    assert files["model.safetensors"] == (tmp_path / "run" / "model.safetensors").read_bytes()

    client.run(READ, tmp_path / "answers.pt", package=False)
    found = torch.load(tmp_path / "answers.pt")
    model = BPGCNForImageClassification.from_pretrained(tmp_path / "run")
    assert model.support_bank.size == 96
    with torch.no_grad():
        expected = model(found["images"]).logits
    assert (expected[0] - expected[-1]).abs().max() > 1e-3
    assert_close(found["logits"], expected, atol=1e-6, rtol=0)
