"""A whole job with a real, tiny LLaVA: its answers are those of `LLM.chat`, to the last bit wherever a run began."""

import base64
import io
import shutil

import checkpoints
import golden_files
import pytest
from batch_fakes import chat_line, read_answers, write_requests
from PIL import Image

from aphrodite_jax import LLM, SamplingParams
from aphrodite_jax.batch import run_batch

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    directory = golden_files.write_chat_model(tmp_path_factory.mktemp("tiny"))
    return LLM(directory, max_num_seqs=2, max_model_len=64, warm_up=False, show_progress=False)


@pytest.fixture(scope="module")
def urls(tmp_path_factory):
    """Two pictures, as a file: and as a data: URL."""
    pictures = [Image.fromarray(array) for array in checkpoints.images(2, seed=5)]
    path, content = tmp_path_factory.mktemp("pictures") / "a.png", io.BytesIO()
    pictures[0].save(path)
    pictures[1].save(content, "PNG")
    return path.as_uri(), f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def messages(index, urls):
    """Prompts of different lengths; two of three have a picture."""
    content = [{"type": "text", "text": " ".join(f"w{5 + (7 * index + i) % 150}" for i in range(1 + index % 9))}]
    if index % 3:
        content.insert(0, {"type": "image_url", "image_url": {"url": urls[index % 3 - 1]}})
    return [{"role": "user", "content": content}]


def line(index, urls, **options):
    value = chat_line(f"r{index}", **{"max_tokens": 3 + index % 5, **options})
    value["body"]["messages"] = messages(index, urls)
    return value


def test_answers_are_those_of_chat(llm, urls, tmp_path):
    requests = write_requests(tmp_path / "requests.jsonl", [line(i, urls, temperature=0) for i in range(6)])
    report = run_batch(llm, requests, tmp_path / "answers.jsonl", show_progress=False)
    assert (report.num_answered, report.num_failed) == (6, 0)
    params = [SamplingParams(temperature=0, max_tokens=3 + i % 5) for i in range(6)]
    expected = llm.chat([messages(i, urls) for i in range(6)], params, use_tqdm=False)
    for answer, output in zip(read_answers(tmp_path / "answers.jsonl"), expected, strict=True):
        body, (completion,) = answer["response"]["body"], output.outputs
        assert completion.text
        assert body["choices"][0]["message"]["content"] == completion.text
        assert body["choices"][0]["finish_reason"] == completion.finish_reason
        num_prompt, num_completion = len(output.prompt_token_ids), len(completion.token_ids)
        assert body["usage"] == {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_completion,
            "total_tokens": num_prompt + num_completion,
        }


def test_every_bit_is_the_same_wherever_a_run_began(llm, urls, tmp_path):
    lines = [line(i, urls, temperature=i % 2, logprobs=True, top_logprobs=2) for i in range(24)]
    lines[3]["body"]["messages"][0]["content"] = [{"type": "image_url", "image_url": {"url": "file:///none.png"}}]
    lines[4]["body"]["messages"][0]["content"] = "w5 " * 70
    lines[5]["body"]["n"] = 2
    requests = write_requests(tmp_path / "requests.jsonl", lines)
    report = run_batch(llm, requests, tmp_path / "whole", show_progress=False)
    assert (report.num_answered, report.num_failed) == (22, 2)
    whole = (tmp_path / "whole").read_bytes()
    for count in (1, 9, 16, 21):
        shutil.copy(tmp_path / "whole.job.json", tmp_path / f"{count}.job.json")
        (tmp_path / f"{count}").write_bytes(b"".join(whole.splitlines(keepends=True)[:count]) + b'{"id":')
        run_batch(llm, requests, tmp_path / f"{count}", show_progress=False)
        assert (tmp_path / f"{count}").read_bytes() == whole
