"""A job of parts with the model that ships: killed, taken up by two workers, it answers as `LLM.chat` does."""

import multiprocessing
import time

import pytest
from batch_fakes import read_answers
from parts_processes import MODEL_OPTIONS, run_shipped_model
from PIL import Image, ImageDraw

from aphrodite_jax import LLM, SamplingParams
from aphrodite_jax.batch import open_parts, run_parts

pytestmark = pytest.mark.once

PROMPT = "What is this?"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Shapes in colors; some are of one picture under two names, one is damaged."""
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(40):
        picture = Image.new("RGB", (32 + index % 2, 32), "white")
        draw = ImageDraw.Draw(picture)
        shape = (draw.ellipse, draw.rectangle)[index % 2]
        shape((4 + index % 5, 6, 22 + index % 5, 24), fill=("red", "blue", "green", "black")[index // 2 % 4])
        picture.save(folder / f"{index:02}.png")
    (folder / "13.png").write_bytes(b"damaged")
    return folder


def test_killed_and_taken_up_by_two_workers(pictures, tmp_path):
    context = multiprocessing.get_context("spawn")
    worker = context.Process(target=run_shipped_model, args=(pictures, tmp_path / "out", PROMPT))
    worker.start()
    journals = tmp_path / "out" / "journal"
    while not any(path.stat().st_size for path in journals.glob("*")):
        assert worker.is_alive()
        time.sleep(0.005)
    worker.kill()
    worker.join()
    llm = LLM(**MODEL_OPTIONS)
    resumed = []
    for share in range(2):
        job = open_parts(pictures, tmp_path / "out", model_config=llm.model_config, prompt=PROMPT, max_tokens=6)
        report = run_parts(llm, job, range(share, job.num_units, 2), show_progress=False)
        resumed.append(report.resumed)
    assert job.finish()
    assert 0 < sum(resumed) < 40
    records = [value for path in sorted((tmp_path / "out" / "parts").iterdir()) for value in read_answers(path)]
    names = sorted(path.name for path in pictures.iterdir() if path.name != "13.png")
    assert [record["id"] for record in records] == names
    (failure,) = [value for path in (tmp_path / "out" / "errors").iterdir() for value in read_answers(path)]
    assert (failure["custom_id"], failure["code"]) == ("13.png", "invalid_media")
    content = [[{"type": "image", "image": pictures / name}, {"type": "text", "text": PROMPT}] for name in names]
    outputs = llm.chat(
        [[{"role": "user", "content": parts}] for parts in content],
        SamplingParams(temperature=0.0, max_tokens=6),
        on_error="raise",
        use_tqdm=False,
    )
    assert [record["text"] for record in records] == [output.outputs[0].text for output in outputs]
    assert len({record["text"] for record in records}) > 3
