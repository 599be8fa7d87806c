"""The controls of the page: native HTML elements with labels where Gradio's own say less to a screen reader.

They are functions, as Gradio writes a stub file beside every class that inherits from one of its components.
"""

from collections.abc import Sequence

import gradio as gr
import PIL.Image

from . import markup

STEPS_SCRIPT = """
const input = element.querySelector('input'), output = element.querySelector('output');
let timer;
function show() {
    output.textContent = props.labels[input.value];
    input.setAttribute('aria-valuetext', props.labels[input.value]);
}
input.addEventListener('input', () => {
    show();
    clearTimeout(timer);
    timer = setTimeout(() => { props.value = Number(input.value); }, 60);
});
show();
"""
CHOICE_SCRIPT = """
const select = element.querySelector('select');
select.addEventListener('change', () => { props.value = select.value === '' ? null : Number(select.value); });
"""
EXAMPLES_SCRIPT = """
element.addEventListener('click', (event) => {
    const button = event.target.closest('button');
    if (button) trigger('click', {place: Number(button.dataset.place)});
});
"""


def upload() -> gr.Image:
    """An image, which handlers get as the path of a file that nothing has opened, or None."""
    image = gr.Image(
        label="Your image",
        type="filepath",
        format="png",  # of examples, which must not lose a pixel
        sources=["upload", "clipboard"],
        buttons=[],
        alt_text="The image that you chose",
        height=260,
        elem_id="upload",
    )
    image.preprocess = lambda payload: payload.path if payload else None
    return image


def steps(name: str, label: str, labels: Sequence[str], start: int) -> gr.HTML:
    """A slider of named steps, whose names are also what a screen reader says; handlers get the number of a step.

    Args:
        name: of the element, and `label`, what stands above it.
        labels: of the steps.
        start: the step at first.
    """
    return gr.HTML(
        start,
        html_template=(
            '<div class="steps"><label for="${name}">${label}</label><output for="${name}"></output>'
            '<input type="range" id="${name}" min="0" max="${last}" step="1" value="${start}"></div>'
        ),
        js_on_load=STEPS_SCRIPT,
        apply_default_css=False,
        label=label,
        name=name,
        labels=list(labels),
        last=len(labels) - 1,
        start=start,
    )


def choice(name: str, label: str, names: list[str]) -> gr.HTML:
    """A menu; handlers get the place of a name, or None before one is chosen."""
    return gr.HTML(
        html_template=(
            '<div class="choice"><label for="${name}">${label}</label>'
            '<select id="${name}"><option value="">Choose a class</option>${options}</select></div>'
        ),
        js_on_load=CHOICE_SCRIPT,
        apply_default_css=False,
        label=label,
        name=name,
        options=markup.options(names),
    )


def examples(images: list[tuple[PIL.Image.Image, str]]) -> gr.HTML:
    """A row of images to press; `click` carries the `place` of one."""
    return gr.HTML(markup.examples(images), js_on_load=EXAMPLES_SCRIPT, apply_default_css=False)


def live(role: str, **options) -> gr.HTML:
    """Text that a screen reader says when it changes: a `status` after what it is saying, an `alert` at once."""
    return gr.HTML("", js_on_load=f"element.setAttribute('role', '{role}')", apply_default_css=False, **options)


def fragment(value: str = "", **options) -> gr.HTML:
    """A part of the page without anything to press."""
    return gr.HTML(value, js_on_load=None, apply_default_css=False, **options)
