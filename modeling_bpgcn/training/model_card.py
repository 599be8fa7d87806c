"""The model card: `model_card.md` filled in from the run that it describes."""

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

# What the card's tables call a metric, its name in the Hub's model index, and whether it reads as a percentage.
METRICS = {
    "accuracy": ("accuracy", "accuracy", True),
    "macro_f1": ("macro-F1", "f1", True),
    "ece": ("ECE", "expected_calibration_error", False),
    "neighbor_homophily": ("neighbor homophily", "neighbor_homophily", True),
}
TAGS = ["bpgcn", "graph-neural-network", "semi-supervised", "differentiable-ranking"]
FRAMEWORKS = ("torch", "transformers", "accelerate", "datasets", "evaluate", "peft", "huggingface_hub")
MAX_CLASS_NAMES = 20


def _template() -> str:
    """A wheel carries the template beside this file; in a checkout it is at the root, where readers look for it."""
    beside = Path(__file__).with_name("model_card.md")
    path = beside if beside.is_file() else Path(__file__).parents[2] / "model_card.md"
    return path.read_text(encoding="utf-8")


def _cell(value: Any) -> str:
    """A value as it reads in a Markdown table; the card is public, so of a local folder it gives the name alone."""
    if isinstance(value, PathLike | str) and Path(value).is_absolute():
        value = Path(value).name
    if isinstance(value, float):
        value = f"{value:.6g}"
    elif isinstance(value, list | tuple):
        value = ", ".join(_cell(item) for item in value)
    return " ".join(str(value).split()).replace("|", "\\|")


def _rows(values: Mapping[str, Any]) -> str:
    return "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in values.items() if value is not None)


def _score(metric: str, value: Any) -> str:
    if not isinstance(value, int | float):
        return "–" if value is None else _cell(value)
    _, _, percent = METRICS.get(metric, (metric, metric, False))
    return f"{100 * value:.1f}" if percent else f"{value:.3f}"


def results_table(results: Sequence[Mapping[str, Any]]) -> str:
    """
    Results as a Markdown table: a row per method, the model's own in bold, a column per metric.

    Args:
        results (`Sequence[Mapping]`): `method`, its metrics, and `baseline=True` where it is not the model itself.
    """
    metrics = list(dict.fromkeys(key for row in results for key in row if key not in ("method", "baseline")))
    lines = ["| method | " + " | ".join(METRICS.get(metric, (metric,))[0] for metric in metrics) + " |"]
    lines.append("| --- |" + " ---: |" * len(metrics))
    for row in results:
        method = _cell(row["method"]) if row.get("baseline") else f"**{_cell(row['method'])}**"
        lines.append(f"| {method} | " + " | ".join(_score(metric, row.get(metric)) for metric in metrics) + " |")
    return "\n".join(lines)


def _dataset_type(data: Mapping[str, Any]) -> str:
    """The data set's Hub name, or its own as the Hub takes it: the index refuses other characters."""
    return data.get("id") or re.sub(r"[^\w.-]+", "-", _cell(data["name"])).strip("-") or "local"


def _eval_results(data: Mapping[str, Any], own: Mapping[str, Any]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="image-classification",
            task_name="Image classification",
            dataset_type=_dataset_type(data),
            dataset_name=data["name"],
            dataset_split=data.get("split"),
            metric_type=hub_name,
            metric_name=title,
            metric_value=float(own[metric]),
            metric_args={"average": "macro"} if metric == "macro_f1" else None,
        )
        for metric, (title, hub_name, _) in METRICS.items()
        if own.get(metric) is not None
    ]


def _pictures(folder: Path, pictures: Mapping[str, str | PathLike]) -> dict[str, str]:
    """Paths relative to the card: only what lies in its folder goes to the Hub with it."""
    relative = {}
    for caption, picture in pictures.items():
        picture = Path(picture) if Path(picture).is_absolute() else folder / picture
        if not picture.is_file() or not picture.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"The picture {picture} is not a file below {folder}: save it beside the model card.")
        relative[caption] = picture.resolve().relative_to(folder.resolve()).as_posix()
    return relative


def write_model_card(
    path: str | PathLike,
    *,
    model_name: str,
    label_names: Sequence[str],
    data: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    versions: Mapping[str, str] | None = None,
    pictures: Mapping[str, str | PathLike] | None = None,
    base_model: str | None = None,
    license: str | None = None,
) -> ModelCard:
    """
    Fill the model card template from a run, offline, and write it.

    Args:
        path (`str` or `PathLike`): file to write, `README.md` in the model's folder.
        model_name (`str`): what the card's snippets load: a Hub name, or the model's folder.
        label_names (`Sequence[str]`): names of the classes.
        data (`Mapping`):
            `name` of the data set; optionally `id` (its Hub name), `split` (of the test images) and `protocol` (a
            sentence on how the results were made); everything else becomes a row of the data table, such as
            `{"training images": 1437, "of these labeled": 144, "test images": 360}`.
        results (`Sequence[Mapping]`):
            One row a method: `method`, its metrics as `classification_metrics` returns them, and `baseline=True` unless
            it is the model itself. The first row of the model goes into the Hub's model index.
        settings (`Mapping`): settings of the run; those that are None are left out, of local paths the name is kept.
        versions (`Mapping`, *optional*): framework -> version; read off the installation by default.
        pictures (`Mapping`, *optional*): caption -> image file in the card's folder or below.
        base_model (`str`, *optional*): Hub name of the pretrained backbone.
        license (`str`, *optional*): license of the weights, which backbone and data decide.

    Returns:
        `huggingface_hub.ModelCard`: the card as written.

    Raises:
        ValueError: if `data` has no name, no result is the model's own, or a picture lies elsewhere.
    """
    path = Path(path)
    if not data.get("name"):
        raise ValueError("data has no 'name': say which data set the model was trained on.")
    own = [row for row in results if not row.get("baseline")]
    if not own:
        raise ValueError(f"None of the {len(results)} results is the model's own: leave out baseline=True in its row.")

    hub_dataset = data.get("id")
    card_data = ModelCardData(
        model_name=Path(model_name).name,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=TAGS,
        datasets=[hub_dataset] if hub_dataset else None,
        base_model=base_model,
        license=license,
        eval_results=_eval_results(data, own[0]),
    )
    if versions is None:
        versions = {name: version(name) for name in FRAMEWORKS}
    shown = ", ".join(label_names[:MAX_CLASS_NAMES])
    more = len(label_names) - MAX_CLASS_NAMES
    card = ModelCard.from_template(
        card_data,
        template_str=_template(),
        title=Path(model_name).name,
        model_name=Path(model_name).as_posix(),
        num_classes=f"{len(label_names)} classes",
        class_list=f"{shown} and {more} more" if more > 0 else shown,
        pictures=_pictures(path.parent, pictures or {}),
        data_rows=_rows(
            {
                "data set": data["name"],
                **{key: value for key, value in data.items() if key not in ("name", "id", "split", "protocol")},
            }
        ),
        protocol=data.get("protocol", "One run with one seed; all rows answer the same test images."),
        results_table=results_table(results),
        settings_rows=_rows(settings),
        version_list="\n".join(f"- {name} {number}" for name, number in versions.items()),
    )
    card.content = card.content.rstrip() + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    card.save(path)
    return card
