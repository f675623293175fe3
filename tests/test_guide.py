"""The Python of README and guide runs as it stands there."""

import functools
import re
import warnings
from pathlib import Path

import pytest

import aphrodite_jax

ROOT = Path(__file__).parent.parent


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)


def run(page: str) -> dict:
    """Run a page's blocks one after the other, as a reader would; the names that they leave."""
    blocks = python_blocks(page)
    assert blocks
    names = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    return names


@pytest.fixture(autouse=True)
def as_a_reader(monkeypatch):
    """From the root of the repository; programs are compiled when they are needed, which takes less time."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(aphrodite_jax, "LLM", functools.partial(aphrodite_jax.LLM, warm_up=False))


@pytest.mark.once
def test_the_readme(capsys):
    run("README.md")
    assert capsys.readouterr().out.splitlines() == ["rectangle", "a blue rectangle"]


def test_the_guide_to_adding_a_model():
    names = run("docs/adding_a_multimodal_model.md")
    output, llm = names["output"], names["llm"]
    assert output.error is None
    assert len(output.outputs[0].token_ids) == 8 or output.outputs[0].finish_reason == "stop"
    picture = names["picture"]
    tiles = names["TILES"]
    assert sum(token == names["config"].image_token_index for token in output.prompt_token_ids) == 2 * tiles
    # Its pixels reach the answer: another picture leads to other log-probabilities.
    prompts = [
        {"prompt": "One picture: <image>.", "multi_modal_data": {"image": image}}
        for image in (picture, picture.point(lambda value: 255 - value))
    ]
    params = names["SamplingParams"](temperature=0.0, max_tokens=1, logprobs=1)
    first, second = llm.generate(prompts, params, on_error="raise", use_tqdm=False)
    assert first.outputs[0].cumulative_logprob != second.outputs[0].cumulative_logprob
    assert picture.getpixel((0, 0)) == (0, 128, 128)
    # A cell that is run again replaces what it registered, and says so.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(python_blocks("docs/adding_a_multimodal_model.md")[-2], names)
    assert "replaces it" in str(caught[0].message)
