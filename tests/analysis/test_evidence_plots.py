"""Pictures of the evidence benchmark show the numbers that they are given."""

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from modeling_bpgcn.analysis.bootstrap import Interval
from modeling_bpgcn.analysis.evidence_contrasts import DETACHED, PRIMARY, SECONDARY, Contrast
from modeling_bpgcn.analysis.evidence_plots import (
    VERDICT_COLORS,
    plot_accuracy,
    plot_confusion,
    plot_contrasts,
    plot_embedding,
    plot_gradient_share,
    plot_ranking_curves,
)

PLACEBO = next(rival for rival in SECONDARY if rival.arm == "random")


def _contrast(rival, measure="transductive", mean=0.02, half=0.01):
    images, folds = (Interval(mean, mean - h, mean + h, 1.0) for h in (half / 2, half))
    return Contrast(rival, measure, 7, images, folds)


def _lines(axes):
    return [line for line in axes.lines if len(line.get_xdata()) and line.get_label()[0] != "_"]


def _titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def test_a_contrast_is_a_point_with_two_intervals_beside_a_zero_line(tmp_path):
    contrasts = [_contrast(DETACHED), _contrast(PRIMARY[1], mean=-0.03), _contrast(DETACHED, "homophily", mean=0.005)]
    figure = plot_contrasts({"digits": contrasts}, tmp_path / "contrasts.png")
    axes, inductive = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        DETACHED.name,
        PRIMARY[1].name,
        f"{DETACHED.name} (homophily)",
    ]
    zero, *drawn = axes.lines
    assert list(zero.get_xdata()) == [0, 0]
    outer, inner, point = drawn[:3]
    assert list(outer.get_xdata()) == pytest.approx([1, 3])
    assert list(inner.get_xdata()) == pytest.approx([1.5, 2.5])
    assert list(point.get_xdata()) == pytest.approx([2])
    colors = [to_hex(line.get_color()) for line in drawn[2::3]]
    assert colors == [VERDICT_COLORS[name] for name in ("above zero", "below zero", "not above zero")]
    assert "+2.0 [+1.0, +3.0]  7" in [text.get_text() for text in axes.texts]
    assert [text.get_text() for text in inductive.texts] == ["no pairs"]
    with Image.open(tmp_path / "contrasts.png") as image:
        assert image.format == "PNG"


def test_the_placebo_does_not_stretch_the_axis(tmp_path):
    figure = plot_contrasts({"digits": [_contrast(DETACHED), _contrast(PLACEBO, mean=0.5)]}, tmp_path / "contrasts.png")
    axes = figure.axes[0]
    assert axes.get_xlim()[1] < 4
    assert axes.lines[-1].get_marker() == ">"
    assert list(axes.lines[-1].get_xdata()) == pytest.approx([3])


def test_accuracy_is_drawn_with_its_spread(tmp_path):
    values = {1.0: [0.5, 0.6], 4.0: [0.8, 0.9]}
    curves = {"digits": {("full", "transductive"): values, ("random", "transductive"): {4.0: [0.3]}}}
    axes = plot_accuracy(curves, "labels per class", tmp_path / "labels.png").axes[0]
    [line] = _lines(axes)
    assert line.get_label() == "full"
    np.testing.assert_allclose(line.get_ydata(), [55, 85])
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    deviation = 100 * np.std([0.5, 0.6], ddof=1)
    assert band.min() == pytest.approx(55 - deviation)
    assert band.max() == pytest.approx(85 + deviation)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "4"]


def test_curves_of_training_are_means_over_cells_and_churn_starts_after_the_first_graph(tmp_path):
    first = [{"step": 0, "homophily": 0.5, "edge_churn": 0.0}, {"step": 5, "homophily": 0.7, "edge_churn": 0.4}]
    second = [{"step": 0, "homophily": 0.7, "edge_churn": 0.0}, {"step": 5, "homophily": None, "edge_churn": 0.2}]
    figure = plot_ranking_curves({"digits": {"full": [first, second]}}, tmp_path / "ranking.png")
    assert _titles(figure) == ["digits: Homophily", "mAP", "Hubness (skewness)", "Edge churn"]
    homophily, churn = figure.axes[0].lines[0], figure.axes[3].lines[0]
    np.testing.assert_allclose(homophily.get_ydata(), [0.6, 0.7])
    np.testing.assert_allclose(churn.get_xdata(), [5])
    np.testing.assert_allclose(churn.get_ydata(), [0.3])
    assert not figure.axes[1].lines


def test_the_share_of_the_ranking_path_has_a_line_per_arm(tmp_path):
    curves = {
        arm: [[{"step": 1, "ranking_gradient_share": share}, {"step": 2, "ranking_gradient_share": share}]]
        for arm, share in (("detached", 0.0), ("full", 0.4))
    }
    axes = plot_gradient_share({"digits": curves}, tmp_path / "gradient.png").axes[0]
    assert {line.get_label(): line.get_ydata()[-1] for line in _lines(axes)} == {"detached": 0.0, "full": 0.4}


def test_confusion_is_in_shares_of_each_class(tmp_path):
    figure = plot_confusion(np.array([[3, 1], [0, 0]]), tmp_path / "confusion.png", ["daisy", "rose"])
    axes = figure.axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), [[75, 25], [0, 0]])
    assert [text.get_text() for text in axes.texts] == ["75", "25"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["daisy", "rose"]


def test_an_embedding_shows_every_image_before_and_after(tmp_path):
    random = np.random.default_rng(0)
    classes = np.arange(40) % 4
    after = np.eye(4)[classes] + random.normal(0, 0.05, (40, 4))
    figure = plot_embedding(random.normal(size=(40, 6)), after, classes, tmp_path / "embedding.png")
    assert _titles(figure) == ["before", "after"]
    before, tuned = (axes.collections[0].get_offsets() for axes in figure.axes)
    assert len(before) == len(tuned) == 40

    def spread_within(places):
        return np.mean([places[classes == c].std(0).mean() for c in range(4)]) / places.std(0).mean()

    assert spread_within(tuned) < 0.6 * spread_within(before)


def test_an_embedding_of_different_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="40 and 39 features and 40 classes"):
        plot_embedding(np.zeros((40, 2)), np.zeros((39, 2)), np.zeros(40), tmp_path / "embedding.png")
