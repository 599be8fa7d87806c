"""Models and runs on the Hub: pushed, read, refused, over HTTP with the real client in processes of their own."""

import ast
import json
import re
import socket
from io import BytesIO
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from torch.testing import assert_close

from tests.hub.fake_hub import FakeHub, front_matter, metadata_errors
from tests.training_factory import ROOT

RUN, MODEL = "alice/digit-run", "alice/model"
IMPORT = re.compile(r"from \.(\w+) import")

PUBLISH = """
import json
from pathlib import Path
from modeling_bpgcn.training.data import DataArguments
from modeling_bpgcn.training.images import image_transform
from modeling_bpgcn.training.report import own_results, write_report
from tests.training_factory import PROCESSOR, digit_trainer, digits

folder = Path(sys.argv[1])
saving = {"save_strategy": "steps", "save_steps": 1, "push_to_hub": True, "hub_model_id": "digit-run"}
trainer = digit_trainer(folder / "run", max_steps=2, curves=True, **saving)
trainer.train()
results = own_results(trainer.evaluate(metric_key_prefix="test"))
trainer.save_model()
trainer.save_state()
arguments = DataArguments("digits", labels_per_class=4, max_images=64)
settings = {"dataset": str(folder / "images"), "num_neighbors": 4}
write_report(trainer, digits(), arguments, results, image_transform(PROCESSOR), settings, None)
trainer.push_to_hub()
trainer.args.push_thumbnails, trainer.args.hub_model_id, trainer.hub_model_id = True, "pictured", None
trainer.push_to_hub()

model = trainer.model.eval()
images = torch.stack([trainer.eval_dataset[row]["pixel_values"] for row in range(8)])
model.push_to_hub("alice/model")
PROCESSOR.push_to_hub("alice/model")
with torch.no_grad():
    answers = {"images": images, "old": model(images).logits}
    for parameter in model.head.parameters():
        parameter.mul_(1.5)
    model.set_support_bank(*(getattr(model.support_bank, name) for name in ("features", "classes", "ids")))
    answers["new"] = model(images).logits
model.push_to_hub("alice/model")
model.push_to_hub("alice/secret", private=True)
torch.save(answers, folder / "answers.pt")
"""

READ = """
import contextlib, importlib.util, io, json, re
from pathlib import Path
from huggingface_hub import ModelCard, hf_hub_download
from transformers import AutoModelForImageClassification, pipeline

package, folder, revision = sys.argv[1] == "with", Path(sys.argv[2]), sys.argv[3]
assert (importlib.util.find_spec("modeling_bpgcn") is not None) == package
if package:
    import modeling_bpgcn
options = {} if package else {"trust_remote_code": True}
images = torch.load(folder / "answers.pt")["images"]
answers = {}
for key, name, kwargs in [
    ("run", "alice/digit-run", {}),
    ("new", "alice/model", {}),
    ("old", "alice/model", {"revision": revision}),
]:
    model = AutoModelForImageClassification.from_pretrained(name, **kwargs, **options)
    assert type(model).__module__.startswith("modeling_bpgcn." if package else "transformers_modules."), type(model)
    with torch.no_grad():
        answers[key] = model(images).logits
torch.save(answers, folder / f"read-{sys.argv[1]}.pt")
said = {"pipeline": pipeline("image-classification", "alice/digit-run", **options)("image.jpg")}

card = ModelCard.load("alice/digit-run")
card.validate()
said["results"] = [[r.dataset_type, r.metric_type, r.metric_value] for r in card.data.eval_results]
if not package:
    said["snippets"] = []
    for snippet in re.findall(r"^```python\\n(.*?)^```", card.content, re.MULTILINE | re.DOTALL):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(snippet, {})
        said["snippets"].append(printed.getvalue())
    said["inferred"] = pipeline(model="alice/digit-run", **options)("image.jpg")
else:
    from modeling_bpgcn.training.thumbnails import read_thumbnails
    ids = model.support_bank.ids.tolist()
    pictures = read_thumbnails("alice/pictured", model)
    said["pictures"] = [list(pictures) == ids, pictures[ids[0]].size, len(read_thumbnails("alice/digit-run", model))]
print(json.dumps(said))
"""

REFUSE = """
import json
from huggingface_hub import hf_hub_download
from modeling_bpgcn import BPGCNForImageClassification
from transformers import AutoModel, AutoModelForImageClassification, Dinov2Model

def outcome(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except Exception as error:
        chain, link = [], error
        while link is not None:
            chain.append(type(link).__name__)
            link = link.__cause__
        return [str(error).split("(Request ID")[0], chain]
    return None

said = {}
cases = [("missing", None), ("secret", False), ("secret", "hf_bob"), ("gated", "hf_bob"), ("secret", "hf_alice")]
for name, token in cases:
    name, options = f"alice/{name}", {"token": token}
    said[f"{name} {token}"] = {
        "client": outcome(hf_hub_download, name, "config.json", **options),
        "transformers": outcome(Dinov2Model.from_pretrained, name, **options),
        "BPGCN": outcome(BPGCNForImageClassification.from_pretrained, name, **options),
        "Auto": outcome(AutoModelForImageClassification.from_pretrained, name, **options),
    }
said["backbone"] = [
    outcome(AutoModel.from_pretrained, "alice/missing"),
    outcome(BPGCNForImageClassification.from_backbone_pretrained, "alice/missing"),
]
model = BPGCNForImageClassification.from_pretrained("alice/model")
said["push"] = {token: outcome(model.push_to_hub, "alice/model", token=token) for token in ("hf_bob", "wrong")}
said["revision"] = outcome(BPGCNForImageClassification.from_pretrained, "alice/model", revision="v9")
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def published(hub, client, tmp_path_factory) -> Path:
    """The folder of what `PUBLISH` did: a run and a model (twice) on the Hub, `answers.pt` and an image here."""
    folder = tmp_path_factory.mktemp("published")
    client.run(PUBLISH, folder, package=True, token="hf_alice")
    Image.effect_noise((20, 16), 80).convert("RGB").save(folder / "image.jpg")
    return folder


def commit_with(hub, name: str, files: int) -> str:
    """The number of commits is known: first the empty repository, then each push."""
    return list(hub.repositories[name].commits)[files]


@pytest.fixture(scope="module")
def read(hub, client, published) -> dict[str, dict]:
    """What `READ` says, with the package and without."""
    revision = commit_with(hub, MODEL, 2)  # the model and its processor
    said = {}
    for package in ("with", "without"):
        printed = client.run(
            READ, package, published, revision, package=package == "with", token="hf_alice", cwd=published
        )
        said[package] = json.loads(printed.strip().splitlines()[-1])
    return said


# --- what is pushed ---------------------------------------------------------------------------------------------------


def import_closure() -> set[str]:
    """The flat files that the modelling file imports, directly or not."""
    found, waiting = set(), ["modeling_bpgcn"]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            tree = ast.parse((ROOT / "modeling_bpgcn" / f"{name}.py").read_text(encoding="utf-8"))
            waiting += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    return {f"{name}.py" for name in found}


@pytest.mark.parametrize("name", [RUN, MODEL])
def test_all_the_code_that_the_model_imports_is_pushed_and_no_other(hub, published, name):
    files = hub.files(name)
    code = {path for path in files if path.endswith(".py")}
    assert code == import_closure()
    assert len(code) > 10
    for path in code:
        assert files[path] == (ROOT / "modeling_bpgcn" / path).read_bytes()


def test_a_run_is_pushed_once_with_all_that_others_need_and_nothing_else(hub, published):
    assert len(hub.repositories[RUN].commits) == 2  # its checkpoints were not pushed
    files = hub.files(RUN)
    assert {path for path in files if not path.endswith(".py")} == {
        ".gitattributes",
        "README.md",
        "config.json",
        "example.png",
        "model.safetensors",
        "neighbors.png",
        "preprocessor_config.json",
        "results.json",
        "training_curves.png",
    }
    local = {path.name for path in (published / "run").iterdir()}
    assert {"training_args.bin", "trainer_state.json", "checkpoint-1"} <= local
    for path, data in files.items():
        assert str(published).encode() not in data, path


def test_pictures_of_the_support_images_come_with_a_run_that_asks_for_it(read):
    assert read["with"]["pictures"] == [True, [8, 8], 0]


def test_the_card_links_pictures_that_are_beside_it(hub, published):
    card = hub.files(RUN)["README.md"].decode()
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", card)
    assert pictures == ["training_curves.png", "neighbors.png"]
    for picture in pictures:
        with Image.open(BytesIO(hub.files(RUN)[picture])) as image:
            assert min(image.size) > 100


def test_the_card_tells_data_results_protocol_limits_and_how_to_cite(hub, published):
    card = hub.files(RUN)["README.md"].decode()
    for words in (
        "| of these labelled | 40 (62.5 %) |",
        "64 test images, never seen in training",
        "**BPGCN, from the support bank**",
        "## Intended use and limits",
        "@misc{",
        f'name = "{RUN}"',
    ):
        assert words in card


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["with", "without"])
def test_a_pushed_model_answers_the_same_over_http(read, published, package):
    expected = torch.load(published / "answers.pt")
    answers = torch.load(published / f"read-{package}.pt")
    for key, pushed in {"run": "old", "new": "new", "old": "old"}.items():
        assert_close(answers[key], expected[pushed], atol=1e-6, rtol=0)
    # revisions differ, so that one taken for the other would show
    assert (expected["old"] - expected["new"]).abs().max() > 1e-3


@pytest.mark.parametrize("package", ["with", "without"])
def test_a_pipeline_answers_a_jpeg_by_the_name_of_the_repository(read, package):
    answers = read[package]["pipeline"]
    assert {answer["label"] for answer in answers} <= {f"LABEL_{digit}" for digit in range(10)}
    assert 0 < sum(answer["score"] for answer in answers) <= 1 + 1e-6
    assert answers == read["without"]["inferred"]  # the task too comes from the card
    for one, other in zip(answers, read["with"]["pipeline"], strict=True):
        assert one["label"] == other["label"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-6)


def test_the_snippets_of_the_card_run_where_the_package_is_not_installed(read):
    answer, pipe = read["without"]["snippets"]
    best = read["without"]["pipeline"][0]
    label, score = answer.splitlines()[0].split()
    assert (label, float(score)) == (best["label"], pytest.approx(best["score"], abs=1e-5))
    assert len(answer.splitlines()) == 1 + 4  # and the neighbours
    assert ast.literal_eval(pipe)[0]["label"] == best["label"]


def test_the_hub_takes_the_card_and_reads_the_results_of_the_run(read, published):
    own = json.loads((published / "run" / "results.json").read_text())[0]
    for said in read.values():
        assert said["results"] == [
            ["digits", "accuracy", own["accuracy"]],
            ["digits", "f1", own["macro_f1"]],
            ["digits", "expected_calibration_error", own["ece"]],
            ["digits", "neighbor_homophily", own["neighbor_homophily"]],
        ]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def refused(hub, client, published) -> dict:
    hub.repositories["alice/gated"] = gated = type(hub.repositories[MODEL])("alice", gated=True)
    gated.commit(hub.files(MODEL))
    return json.loads(client.run(REFUSE, package=True).strip().splitlines()[-1])


@pytest.mark.parametrize(
    ("case", "error"),
    [
        ("alice/missing None", "RepositoryNotFoundError"),
        ("alice/secret False", "RepositoryNotFoundError"),
        ("alice/secret hf_bob", "RepositoryNotFoundError"),
        ("alice/gated hf_bob", "GatedRepoError"),
    ],
)
def test_missing_private_and_gated_repositories_give_the_errors_of_the_client(refused, case, error):
    said = refused[case]
    assert said["client"][1][0] == error
    for loader in ("transformers", "BPGCN", "Auto"):
        message, chain = said[loader]
        assert error in chain, (loader, message)
        assert case.split()[0] in message
    assert said["BPGCN"] == said["transformers"]


def test_the_owner_reads_a_private_repository(refused):
    said = refused["alice/secret hf_alice"]
    assert said["client"] is said["BPGCN"] is said["Auto"] is None


def test_a_backbone_that_is_not_there_gives_the_error_of_its_own_loader(refused):
    own, through_bpgcn = refused["backbone"]
    assert "RepositoryNotFoundError" in own[1]
    assert through_bpgcn == own


def test_a_push_without_the_right_gives_the_error_of_the_client(refused):
    for token, status in {"hf_bob": "403", "wrong": "401"}.items():
        message, chain = refused["push"][token]
        assert "HfHubHTTPError" in chain[0]
        assert status in message


def test_a_revision_that_is_not_there_is_named(refused):
    message, chain = refused["revision"]
    assert "RevisionNotFoundError" in chain
    assert "v9" in message


# --- the stand-in -----------------------------------------------------------------------------------------------------

GOOD = front_matter(
    "---\nlibrary_name: transformers\nmodel-index:\n- name: m\n  results:\n  - task: {type: image-classification}\n"
    "    dataset: {type: digits, name: Digits}\n    metrics: [{type: accuracy, value: 0.5}]\n---\n"
)


def card_of(**changes) -> str:
    return f"---\n{json.dumps(GOOD | changes)}\n---\n# Title\n"


def result_of(**changes) -> list[dict]:
    (model,) = GOOD["model-index"]
    return [model | {"results": [model["results"][0] | changes]}]


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"license": 3}, "license"),
        ({"tags": "one"}, "tags"),
        ({"datasets": [""]}, "datasets"),
        ({"model-index": [{"results": []}]}, r"model-index\[0\].name"),
        ({"model-index": result_of(task={})}, r"task.type"),
        ({"model-index": result_of(dataset={"type": "my flowers", "name": "x"})}, r"dataset.type.*my flowers"),
        ({"model-index": result_of(metrics=[{"type": "accuracy"}])}, r"metrics\[0\].value"),
        ({"model-index": result_of(metrics=[])}, "metrics"),
    ],
)
def test_the_stand_in_refuses_bad_metadata(changes, place):
    assert metadata_errors(card_of()) == []
    assert any(re.search(place, error) for error in metadata_errors(card_of(**changes)))


def test_the_stand_in_is_gone_when_it_is_closed():
    with FakeHub() as other:
        address = other.server_address
        socket.create_connection(address, timeout=5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=5)


def test_a_data_set_with_any_name_makes_a_card_that_the_hub_takes(tmp_path):
    from modeling_bpgcn.training.model_card import write_model_card

    card = write_model_card(
        tmp_path / "README.md",
        model_name="alice/x",
        label_names=["a"],
        data={"name": "my flowers (2024)/é"},
        results=[{"method": "BPGCN", "accuracy": 0.5}],
        settings={},
    )
    assert metadata_errors(str(card)) == []
    (result,) = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert result.dataset_name == "my flowers (2024)/é"
