"""The Python of README and pages runs as it stands there, and prints what they say that it prints."""

import contextlib
import dataclasses
import doctest
import io
import re
import warnings
from pathlib import Path

import pytest

import aphrodite_jax

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```$(?:\n\n```text\n(?P<shown>.*?)^```$)?", flags=re.MULTILINE | re.DOTALL
)
SHOWN_IN_LINE = re.compile(r"^print\(.*\)  # (.*\n)", flags=re.MULTILINE)
FLAGS = doctest.ELLIPSIS


@dataclasses.dataclass(frozen=True)
class Block:
    """Code of a page, where it stands, and what it prints: what the ``text`` behind it or its comments say."""

    page: str
    line: int
    code: str
    shown: str

    def run(self, names: dict) -> None:
        """Run it among ``names``, as in one notebook, and compare."""
        if self.code.startswith(">>>"):
            self._run_as_doctest(names)
            return
        code = compile("\n" * self.line + self.code, self.page, "exec")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, names)
        if not doctest.OutputChecker().check_output(self.shown, printed.getvalue(), FLAGS):
            raise AssertionError(f"{self.page}:{self.line} shows\n{self.shown}\nbut prints\n{printed.getvalue()}")

    def _run_as_doctest(self, names: dict) -> None:
        test = doctest.DocTestParser().get_doctest(self.code, names, self.page, self.page, self.line)
        with contextlib.redirect_stdout(io.StringIO()) as report:
            result = doctest.DocTestRunner(optionflags=FLAGS).run(test, clear_globs=False)
        assert result.attempted
        assert not result.failed, report.getvalue()
        names.update(test.globs)


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text("utf-8")
    return [
        Block(
            page=page,
            line=text[: match.start()].count("\n") + 1,
            code=match["code"],
            shown=match["shown"] or "".join(SHOWN_IN_LINE.findall(match["code"])),
        )
        for match in BLOCK.finditer(text)
    ]


def run(page: str) -> dict:
    """Run a page's blocks one after the other, as a reader would; the names that they leave."""
    names = {"__name__": "__main__"}
    for block in blocks(page):
        block.run(names)
    return names


PAGES = [
    page
    for page in ("README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")))
    if blocks(page)
]
GUIDE = "docs/adding_a_multimodal_model.md"


@pytest.fixture(scope="session")
def shared():
    """Options to the `LLM` of the model that ships: pages that ask for the same one get the same one."""
    return {}


@pytest.fixture(autouse=True)
def as_a_reader(monkeypatch, shared):
    """From the root of the repository; programs are compiled when they are needed, which takes less time."""
    original = aphrodite_jax.LLM

    def make(model=None, **options):
        options = {"warm_up": False, "show_progress": False, **options}
        if model is not None:
            return original(model, **options)
        key = repr(sorted(options.items()))
        if key not in shared:
            shared[key] = original(**options)
        shared[key].engine.reset_caches()
        return shared[key]

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(aphrodite_jax, "LLM", make)


@pytest.mark.once
@pytest.mark.parametrize("page", [page for page in PAGES if page != GUIDE])
def test_the_python_of_a_page(page):
    run(page)


@pytest.mark.once
def test_the_guide_to_adding_a_model():
    names = run(GUIDE)
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
    (registering,) = (block for block in blocks(GUIDE) if "register_image_input_mapper" in block.code)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(registering.code, names)
    assert "replaces it" in str(caught[0].message)


def test_a_page_that_tells_something_else_is_caught(tmp_path):
    for code, shown in (("print(1 + 1)", "3"), ("print(1 + 1)", None), ("pass", "2"), ("print(2)  # 3", None)):
        text = f"```python\n{code}\n```\n" + (f"\n```text\n{shown}\n```\n" if shown else "")
        page = tmp_path / "page.md"
        page.write_text(text)
        with pytest.raises(AssertionError, match="but prints"):
            run(str(page))
