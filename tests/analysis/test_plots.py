"""Pictures of a run: every panel and frame shows what the numbers say, and a file comes out."""

import math

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image
from sklearn.datasets import load_digits

from modeling_bpgcn.analysis.plots import (
    RIGHT,
    UNKNOWN,
    WRONG,
    QueryNeighbors,
    plot_neighbors,
    plot_training_curves,
)
from modeling_bpgcn.configuration_bpgcn import LOSS_WEIGHTS


def _pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("L"))


def _titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


# --- training curves --------------------------------------------------------------------------------------------------

HISTORY = [
    {
        "step": step,
        "loss": 2 / step,
        "head_loss": 1 / step,
        "propagation_loss": 1 / step,
        "grad_norm": 0.1 * step,
        "ranking_gradient_norm": 0.01 * step,
        "temperature": 0.1 - 0.01 * step,
        "homophily": 0.5 + 0.1 * step,
        "effective_neighbors": 5.0,
        "learning_rate": 1e-4 * (5 - step),
        "backbone_learning_rate": 1e-4 * (5 - step),
        "head_learning_rate": 1e-2 * (5 - step),
    }
    for step in range(1, 6)
] + [
    {"step": 5, "eval_loss": 0.3, "eval_accuracy": 0.9, "eval_neighbor_homophily": 0.8},
    {"step": 5, "train_loss": 1.0},
]


def test_each_group_of_numbers_has_its_panel(tmp_path):
    figure = plot_training_curves(HISTORY, tmp_path / "new" / "curves.png")
    assert _titles(figure) == [
        "Loss",
        "Accuracy",
        "Homophily",
        "Temperature",
        "Effective number of neighbors",
        "Gradient norm",
        "Learning rate",
    ]
    pixels = _pixels(tmp_path / "new" / "curves.png")
    assert pixels.shape[1] > pixels.shape[0] > 500
    assert pixels.std() > 5


def test_curves_hold_the_logged_values(tmp_path):
    figure = plot_training_curves(HISTORY, tmp_path / "curves.png")
    loss = {line.get_label(): line for line in figure.axes[0].lines}
    assert set(loss) == {"training", "evaluation", "head loss", "propagation loss"}
    assert loss["training"].get_xdata().tolist() == [1, 2, 3, 4, 5]
    assert loss["training"].get_ydata().tolist() == pytest.approx([2, 1, 2 / 3, 1 / 2, 2 / 5])
    assert loss["evaluation"].get_ydata().tolist() == [0.3]


def test_every_part_of_the_objective_has_a_thin_curve_in_a_color_of_its_own(tmp_path):
    parts = [name.removesuffix("_weight") for name in LOSS_WEIGHTS]
    history = [{"step": 1, "loss": 2.0} | dict.fromkeys(parts, 0.5), {"step": 1, "eval_loss": 0.3}]
    lines = {line.get_label(): line for line in plot_training_curves(history, tmp_path / "curves.png").axes[0].lines}
    assert set(lines) == {"training", "evaluation"} | {part.replace("_", " ") for part in parts}
    assert len({line.get_color() for line in lines.values()}) == len(lines)
    assert max(lines[part.replace("_", " ")].get_linewidth() for part in parts) < lines["training"].get_linewidth()


def test_penalty_and_perturbed_loss_are_drawn_where_they_are_logged(tmp_path):
    history = [{"step": step, "loss": 2.0, "gradient_penalty": 0.3, "sam_loss": 2.2} for step in (1, 2)]
    lines = {line.get_label(): line for line in plot_training_curves(history, tmp_path / "curves.png").axes[0].lines}
    assert lines["gradient penalty"].get_ydata().tolist() == [0.3, 0.3]
    assert lines["training, perturbed by SAM"].get_ydata().tolist() == [2.2, 2.2]
    assert lines["gradient penalty"].get_linewidth() < lines["training"].get_linewidth()  # a part of it
    assert len({line.get_color() for line in lines.values()}) == 3


def test_panels_without_data_are_left_out(tmp_path):
    history = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 2, "eval_accuracy": 0.5}]
    assert _titles(plot_training_curves(history, tmp_path / "curves.png")) == ["Loss", "Accuracy"]


def test_learning_rates_by_group_hide_trainers_own(tmp_path):
    figure = plot_training_curves(HISTORY, tmp_path / "curves.png")
    assert [line.get_label() for line in figure.axes[-1].lines] == ["backbone", "head"]
    plain = plot_training_curves([{"step": 1, "learning_rate": 0.1}], tmp_path / "curves.png")
    assert len(plain.axes[0].lines) == 1


def test_missing_and_infinite_values_leave_a_gap(tmp_path):
    history = [
        {"step": step, "loss": value} for step, value in enumerate((1.0, math.nan, None, math.inf, 0.5), start=1)
    ]
    figure = plot_training_curves(history, tmp_path / "curves.png")
    assert figure.axes[0].lines[0].get_xdata().tolist() == [1, 5]


def test_a_gradient_of_zero_is_no_error_on_the_logarithmic_axis(tmp_path):
    history = [{"step": step, "ranking_gradient_norm": norm} for step, norm in enumerate((0.0, 0.1, 0.0))]
    plot_training_curves(history, tmp_path / "curves.png")
    plot_training_curves([{"step": 1, "ranking_gradient_norm": 0.0}], tmp_path / "curves.png")


@pytest.mark.parametrize("history", [[], [{"step": 3, "train_runtime": 1.0}], [{"step": 1, "loss": math.nan}]])
def test_an_empty_history_says_what_to_do(tmp_path, history):
    with pytest.raises(ValueError, match="nothing to draw: train with logging_steps"):
        plot_training_curves(history, tmp_path / "curves.png")


# --- neighbors --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digit():
    images = load_digits().images
    return QueryNeighbors(
        image=images[0],
        label=0,
        prediction=0,
        probability=0.9,
        neighbor_images=list(images[1:4]),
        neighbor_classes=[0, 7, -100],
        neighbor_weights=[0.5, 0.25, 0.1],
    )


def _frame(axes):
    return to_hex(axes.spines["left"].get_edgecolor())


def test_frames_tell_agreement(tmp_path, digit):
    figure = plot_neighbors([digit], tmp_path / "neighbors.png")
    assert [_frame(axes) for axes in figure.axes] == [RIGHT, RIGHT, WRONG, UNKNOWN]
    assert [axes.get_title() for axes in figure.axes] == ["0", "0", "7", "unknown"]
    assert figure.axes[0].get_xlabel() == "→ 0\np = 0.90"


def test_a_wrong_answer_is_red_and_neighbors_are_judged_by_the_true_class(tmp_path, digit):
    wrong = QueryNeighbors(**{**vars(digit), "prediction": 7})
    figure = plot_neighbors([wrong], tmp_path / "neighbors.png")
    assert [_frame(axes) for axes in figure.axes] == [WRONG, RIGHT, WRONG, UNKNOWN]
    unknown = QueryNeighbors(**{**vars(digit), "label": -100})
    figure = plot_neighbors([unknown], tmp_path / "neighbors.png")
    assert {_frame(axes) for axes in figure.axes} == {UNKNOWN}


def test_weights_are_written_and_drawn_to_one_scale(tmp_path, digit):
    figure = plot_neighbors([digit, digit], tmp_path / "neighbors.png")
    neighbors = [figure.axes[i] for i in (1, 2, 3, 5, 6, 7)]
    assert [axes.texts[0].get_text() for axes in neighbors] == ["0.500", "0.250", "0.100"] * 2
    assert [axes.patches[1].get_width() for axes in neighbors] == pytest.approx([1, 0.5, 0.2] * 2)


def test_every_pixel_of_a_digit_is_a_square(tmp_path, digit):
    figure = plot_neighbors([digit], tmp_path / "neighbors.png")
    assert {axes.images[0].get_interpolation() for axes in figure.axes} == {"nearest"}


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "I;16", "1", "CMYK"])
def test_photos_of_any_mode_and_shape_fill_the_picture(tmp_path, mode):
    generator = np.random.default_rng(0)
    if mode == "I;16":
        photo = Image.fromarray(generator.integers(0, 65535, (80, 120), dtype=np.uint16))
    else:
        photo = Image.fromarray(generator.integers(0, 255, (80, 120, 3), dtype=np.uint8)).convert(mode)
    row = QueryNeighbors(photo, 1, 1, 0.7, [photo] * 12, [1] * 12, [1 / 12] * 12)
    names = ["daisy", "a very long name of a flower"]
    figure = plot_neighbors([row, row], tmp_path / "neighbors.png", label_names=names, max_neighbors=5)
    assert len(figure.axes) == 2 * (1 + 5)
    shown = figure.axes[0].images[0].get_array()
    assert shown.shape[:2] == (80, 80)
    assert shown.std() > 10 or mode == "1"
    assert figure.axes[0].get_title() == "a very long nam…"
    pixels = _pixels(tmp_path / "neighbors.png")
    assert pixels.std() > 20
    assert (pixels[-5:] == 255).all()  # nothing cut off at the lower edge


def test_rows_may_hold_different_numbers_of_neighbors(tmp_path, digit):
    single = QueryNeighbors(digit.image, 0, 0, 1.0, [], [], [])
    assert len(plot_neighbors([digit, single], tmp_path / "neighbors.png").axes) == 5
    assert len(plot_neighbors([single], tmp_path / "neighbors.png").axes) == 1


def test_bad_rows_are_named(tmp_path, digit):
    with pytest.raises(ValueError, match="at least one QueryNeighbors"):
        plot_neighbors([], tmp_path / "neighbors.png")
    with pytest.raises(ValueError, match=r"differ in length: \(1, 2, 1\)"):
        QueryNeighbors(digit.image, 0, 0, 1.0, [digit.image], [0, 1], [0.5])
