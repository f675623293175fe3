"""What `LLM.explain` tells of a request is what the engine then does."""

import re
import xml.etree.ElementTree

import pytest
from golden_files import media_of, read_golden

from aphrodite_jax import LLM, SamplingParams
from aphrodite_jax.errors import PlaceholderError, RequestError

ONE = SamplingParams(temperature=0.0, max_tokens=1)


def open_llm(name, tmp_path, **options):
    golden = read_golden(name)
    defaults = {"page_size": 8, "max_model_len": 256, "warm_up": False, "show_progress": False}
    directory = golden.write_checkpoint(tmp_path / name)
    llm = LLM(directory, dtype="float32", limit_mm_per_prompt=golden.media_limits, **defaults | options)
    prompt = golden.prompts[-1]
    return llm, {"prompt_token_ids": prompt.prompt.tolist(), "multi_modal_data": media_of(prompt)}


@pytest.fixture(scope="module")
def explained(tmp_path_factory):
    """An LLaVA in chunks of 16 rows, a request, and what is told of it before and after it ran."""
    llm, request = open_llm("llava_clip_llama", tmp_path_factory.mktemp("explain"), max_num_batched_tokens=16)
    before = llm.explain(request)
    steps = llm.engine.stats.steps
    [output] = llm.generate(request, ONE, use_tqdm=False)
    return before, llm.explain(request), output, llm.engine.stats.steps - steps


def test_tokens_and_items_are_those_of_the_output(explained):
    told, _, output, _ = explained
    assert told.token_ids == output.prompt_token_ids
    assert tuple(item.info for item in told.items) == output.media
    assert all(told.tokens[item.info.offset] == "<image>" for item in told.items)
    assert told.items[0].arrays == {"pixel_values": "float32[1, 3, 28, 28]"}


def test_chunks_are_the_steps(explained):
    told, _, _, steps = explained
    assert len(told.chunks) == steps > 1
    assert told.chunks[0][0] == told.num_cached == 0
    assert told.chunks[-1][1] == len(told.token_ids)
    assert all(end == begin for (_, end), (begin, _) in zip(told.chunks, told.chunks[1:], strict=False))


def test_what_ran_once_is_cached(explained):
    before, after, _, _ = explained
    assert not any(item.is_encoded for item in before.items)
    assert all(item.is_encoded for item in after.items)
    assert after.num_cached == (len(after.token_ids) - 1) // 8 * 8
    assert f"behind {after.num_cached // 8} pages of 8 tokens that are there already" in str(after)


def test_asking_changes_nothing(tmp_path):
    llm, request = open_llm("llava_clip_llama", tmp_path)
    stats = llm.stats()
    llm.explain(request)
    assert llm.stats() == stats
    assert not llm.engine.has_unfinished_requests()


def test_the_text_names_every_item_and_mask(tmp_path):
    llm, request = open_llm("gemma3", tmp_path)
    told = llm.explain(request)
    text = str(told)
    for index, item in enumerate(told.items):
        begin, end = item.info.offset, item.info.offset + item.info.num_tokens
        assert f"item {index}: image, tokens [{begin}, {end}), {item.info.num_rows} rows of pixel_values" in text
    assert re.search(r"mask 'full': rows \[\d+, \d+\).* see ahead", text)
    assert re.search(r"mask 'sliding': .*at most \d+ keys a row", text)
    ahead = [place for place, stop in enumerate(told.intervals["full"].stop) if stop > place + 1]
    rows = {token for item in told.items for token in item.row_tokens}
    assert set(ahead) <= rows
    assert len(ahead) >= len(rows) - len(told.items)  # the last of a span sees nothing ahead


def test_the_page_is_well_formed_and_shows_every_token(explained):
    _, told, _, _ = explained
    page = xml.etree.ElementTree.fromstring(told._repr_html_())
    titles = [span.get("title") for span in page.iter("span") if span.get("title")]
    assert len(titles) == len(told.token_ids)
    assert titles[3].startswith(f"token 3, id {told.token_ids[3]}, sees full [0, 4)")
    assert len(list(page.iter("svg"))) == len(told.intervals)


def test_markup_in_a_prompt_stays_text(tmp_path):
    llm, _ = open_llm("llava_clip_llama", tmp_path)
    told = llm.explain({"prompt": "w5 w6"})
    odd = type(told)(**{**vars(told), "tokens": ("<script>", "&\n")})
    page = odd._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_what_can_t_be_served_is_refused(tmp_path):
    llm, _ = open_llm("paligemma", tmp_path, max_num_batched_tokens=16)
    with pytest.raises(RequestError, match="30 rows of the prompt see each other and must be computed in one step"):
        llm.explain({"prompt_token_ids": [5] * 30})
    with pytest.raises(PlaceholderError):
        llm.explain({"prompt_token_ids": [5, 159]})
