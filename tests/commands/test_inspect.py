"""`inspect`: a table, a picture and a verdict for a model and images, and errors that say what to do."""

import pytest
from transformers import AutoModel, set_seed

from modeling_bpgcn.commands.inspect import FLOW_PICTURE, SWEEP_PICTURE, main
from tests.model_factory import tiny_backbone
from tests.training_factory import PROCESSOR, tiny_digit_model

DATA = ("digits", "--max_images", "60", "--labels_per_class", "3", "--batch_size", "48")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("digit-model")
    tiny_digit_model().save_pretrained(path)
    PROCESSOR.save_pretrained(path)
    return path


def refused(capsys, *given) -> str:
    with pytest.raises(SystemExit) as exit_info:
        main([str(argument) for argument in given])
    assert exit_info.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def run(capsys, folder, output_dir, *options) -> str:
    main([str(folder), *DATA, "--output_dir", str(output_dir), *options])
    return capsys.readouterr().out


def test_it_prints_the_stages_and_the_verdict_and_saves_the_picture(folder, tmp_path, capsys):
    printed = run(capsys, folder, tmp_path / "new")
    lines = printed.splitlines()
    assert lines[0].startswith(f"{folder} on 48 images of digits, ")
    assert [line.split()[-1] for line in lines if line.startswith("messages")] == ["-"]
    assert {"loss", "features", "embeddings"} <= {line.split()[0] for line in lines if line}
    assert any(line.startswith("The ranking") for line in lines)
    assert lines[-1] == f"saved {tmp_path / 'new' / FLOW_PICTURE}"
    assert [path.name for path in (tmp_path / "new").iterdir()] == [FLOW_PICTURE]
    assert (tmp_path / "new" / FLOW_PICTURE).read_bytes().startswith(b"\x89PNG")


def test_the_sweep_is_a_second_picture(folder, tmp_path, capsys):
    printed = run(capsys, folder, tmp_path, "--temperature_sweep")
    assert f"saved {tmp_path / SWEEP_PICTURE}" in printed
    assert (tmp_path / SWEEP_PICTURE).read_bytes().startswith(b"\x89PNG")


def test_options_win_over_the_models_config(folder, tmp_path, capsys):
    assert "tau 0.1: " in run(capsys, folder, tmp_path)
    flat = run(capsys, folder, tmp_path, "--ranking_temperature", "50", "--ranking_exclude_self", "false")
    assert "tau 50: 4.0 effective neighbors of 4, self takes" in flat
    assert "The ranking is flat: tau = 50 leaves the weights within" in flat
    # read when the model is made
    one_step = run(capsys, folder, tmp_path, "--propagation_steps", "1")
    assert one_step != run(capsys, folder, tmp_path, "--propagation_steps", "4")


def test_the_seed_draws_and_repeats(folder, tmp_path, capsys):
    first, again, other = (run(capsys, folder, tmp_path, "--seed", seed) for seed in "001")
    assert first == again != other


def test_the_share_of_labeled_images_can_be_set(folder, tmp_path, capsys):
    half = run(capsys, folder, tmp_path, "--labeled_batch_fraction", "0.5")
    assert "48 images of digits, 24 labeled" in half.splitlines()[0]


def test_a_backbone_is_no_model_of_ours(tmp_path, capsys):
    set_seed(0)
    AutoModel.from_config(tiny_backbone()).save_pretrained(tmp_path)
    message = refused(capsys, tmp_path, *DATA)
    assert f"MODEL {tmp_path} is of type dinov2, not bpgcn" in message
    assert "from_backbone_pretrained" in message


def test_other_classes_are_refused(tmp_path, capsys):
    tiny_digit_model(num_labels=7).save_pretrained(tmp_path)
    PROCESSOR.save_pretrained(tmp_path)
    assert "knows 7 classes, but DATA digits has 10" in refused(capsys, tmp_path, *DATA)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranking_temperature", "0"], "ranking_temperature=0.0 must be a number above 0"),
        (["--head_hidden_size", "3"], "unrecognized arguments: --head_hidden_size 3"),
        (["--batch_size", "1"], "batch_size=1: the batch is the graph"),
        (["--labeled_fraction", "0.5"], "two ways to say the same"),
    ],
)
def test_options_that_cannot_be_are_named(folder, capsys, options, message):
    assert message in refused(capsys, folder, *DATA, *options)


def test_missing_models_and_data_are_named(folder, tmp_path, capsys):
    assert str(tmp_path / "missing") in refused(capsys, folder, tmp_path / "missing")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "no-model"), *DATA])
    assert "no-model" in capsys.readouterr().err
