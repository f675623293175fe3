"""The command: answers to stdout, all else to stderr, an honest exit status."""

import json
import os
import subprocess
import sys
from pathlib import Path

import checkpoints
import golden_files
import pytest
from PIL import Image

from aphrodite_jax import LLM, SamplingParams
from aphrodite_jax.cli import main
from aphrodite_jax.errors import BatchError

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(golden_files.write_chat_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pictures")
    for name, array in zip("ab", checkpoints.images(2, seed=3), strict=True):
        Image.fromarray(array).save(directory / f"{name}.png")
    return [str(directory / "a.png"), str(directory / "b.png")]


def status(*argv):
    """The exit status, wherever it comes from."""
    try:
        return main(argv)
    except SystemExit as exit:
        return exit.code


def complaint(capsys, *argv):
    """The one line of a failed command, which says nothing to stdout."""
    assert status(*argv) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line.removeprefix("aphrodite-jax: error: ")


def test_generate_streams_the_answer_of_chat(model, pictures, capsys):
    options = ["--max-tokens", "6", "--temperature", "0.7", "--seed", "11", "--top-k", "20", "--max-model-len", "64"]
    images = ["--image", pictures[0], "--image", pictures[1]]
    assert status("generate", "--model", model, *images, *options, "w5 w6 <image>") == 0
    captured = capsys.readouterr()
    llm = LLM(
        model, max_num_seqs=1, max_model_len=64, limit_mm_per_prompt={"image": 2}, warm_up=False, show_progress=False
    )
    content = [{"type": "image", "image": path} for path in pictures] + [{"type": "text", "text": "w5 w6 <image>"}]
    params = SamplingParams(max_tokens=6, temperature=0.7, seed=11, top_k=20)
    (output,) = llm.chat([{"role": "user", "content": content}], params, use_tqdm=False)
    assert output.outputs[0].text
    assert captured.out == output.outputs[0].text + "\n"
    assert captured.err == ""


def test_stats_go_to_stderr_as_json(model, capsys):
    assert (
        status("generate", "--model", model, "--max-tokens", "2", "--stats", "--max-model-len", "64", "--raw", "w5")
        == 0
    )
    stats = json.loads(capsys.readouterr().err)
    assert stats["output_tokens"] == 2
    assert stats["time_to_first_token"]["count"] == 1


def test_batch_writes_answers_and_errors(model, pictures, tmp_path, capsys):
    def line(custom_id, **body):
        return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}

    url = Path(pictures[0]).as_uri()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "w7"}]
    good = line("good", messages=[{"role": "user", "content": content}], max_tokens=3, temperature=0)
    bad = line("bad", messages=[{"role": "user", "content": "w7"}], temprature=0)
    (tmp_path / "requests.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n")
    command = ["batch", str(tmp_path / "requests.jsonl"), "-o", str(tmp_path / "answers.jsonl")]
    command += ["--model", model, "--max-num-seqs", "1", "--max-model-len", "64"]
    assert status(*command) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "1 answered, 1 with an error" in captured.err.splitlines()[-1]
    answered, refused = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    assert answered["response"]["body"]["choices"][0]["message"]["content"]
    assert refused["error"]["code"] == "unknown_option"
    # Again: nothing is left to do, and no model is loaded for it.
    (Path(model) / "model.safetensors").rename(Path(model) / "moved")
    try:
        assert "differs in model.checkpoint" in complaint(capsys, *command)
    finally:
        (Path(model) / "moved").rename(Path(model) / "model.safetensors")
    assert status(*command) == 3
    assert capsys.readouterr().err.endswith("1 answered, 1 with an error, 2 of them by an earlier run\n")


def test_options_of_a_batch_reach_the_job(tmp_path, monkeypatch, capsys):
    def opened(*args, **options):
        raise BatchError(json.dumps([args, {name: v for name, v in options.items() if name != "model_config"}]))

    monkeypatch.setattr("aphrodite_jax.batch.open_parts", opened)
    options = ["--format", "parquet", "--prompt", "what?", "--system", "be short", "--image-column", "picture"]
    options += ["--id-column", "name", "--top-p", "0.5", "--stop", "a", "--stop", "b", "--max-tokens", "9"]
    options += ["--rows-per-part", "7", "--served-model-name", "m"]
    assert json.loads(complaint(capsys, "batch", "table", "-o", "out", *options)) == [
        [],
        {
            "input_path": "table",
            "output_path": "out",
            "form": "parquet",
            "prompt": "what?",
            "system": "be short",
            "columns": {"image": "picture", "id": "name"},
            "sampling": {"stop": ["a", "b"], "top_p": 0.5},
            "max_tokens": 9,
            "served_model_names": ["m"],
            "rows_per_part": 7,
        },
    ]


def test_models_lists_architectures_and_what_they_take(capsys):
    assert status("models") == 0
    captured = capsys.readouterr()
    rows = {row.split("  ")[0]: row for row in captured.out.splitlines()[1:]}
    assert "text, image" in rows["LlavaForConditionalGeneration"]
    assert "image" not in rows["MistralForCausalLM"]
    assert "aphrodite_jax.modeling.models.qwen2.Qwen2ForCausalLM" in rows["Qwen2ForCausalLM"]
    assert captured.err == ""


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "COMMAND"),
        (["describe"], "invalid choice"),
        (["generate"], "question"),
        (["generate", "--temprature", "0", "hi"], "--temprature"),
        (["generate", "--temp", "0", "hi"], "--temp"),
        (["generate", "--temperature", "-1", "hi"], "temperature must be at least 0"),
        (["generate", "--max-tokens", "0", "hi"], "max_tokens must be at least 1"),
        (["generate", "--dtype", "int8", "hi"], "int8"),
        (["generate", "--limit-mm-per-prompt", "image", "hi"], "must be like image=2"),
        (["generate", "--hf-overrides", "{", "hi"], "must be a JSON object"),
        (["batch", "requests.jsonl"], "-o/--output"),
        (["batch", "requests.jsonl", "-o", "answers.jsonl", "--max-num-seqs", "0"], "must be at least 1"),
        (["batch", "requests.jsonl", "-o", "answers.jsonl", "--prompt", "hi"], "--prompt is for rows that are no"),
        (["batch", "requests.jsonl", "-o", "answers.jsonl", "--top-k", "3"], "--top-k is for rows that are no"),
        (
            ["batch", "requests.jsonl", "-o", "answers.jsonl", "--worker", "0/2"],
            "--worker needs an OUTPUT that is a dir",
        ),
        (
            ["batch", "requests.jsonl", "-o", "answers.jsonl", "--ray-workers", "4"],
            "--ray-workers needs an OUTPUT that is a dir",
        ),
        (["batch", "requests.jsonl", "-o", "answers", "--engine", "ray", "--stats"], "--stats goes without --engine"),
        (["batch", "table.parquet", "-o", "answers.jsonl"], "give a directory"),
        (["batch", "s3://bucket/requests.jsonl", "-o", "answers.jsonl"], "give a directory"),
        (["batch", "requests.jsonl", "-o", "answers", "--worker", "2/2"], "must be like 0/4"),
        (["batch", "requests.jsonl", "-o", "answers", "--max-failures", "-1"], "must be a number of rows"),
        (["batch", "requests.jsonl", "-o", "answers", "--format", "csv"], "invalid choice"),
    ],
)
def test_a_wrong_command_line_is_status_2(argv, words, capsys):
    assert status(*argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err


def test_bad_input_is_one_line_and_status_1(model, pictures, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(Path(pictures[0]).read_bytes()[:60])
    (tmp_path / "empty").mkdir()
    ask = ["generate", "--model", model, "--max-tokens", "1", "--max-model-len", "64"]
    assert "neither a directory here nor a hub id" in complaint(capsys, "generate", "--model", "/no/model", "w5")
    assert str(tmp_path / "empty") in complaint(capsys, "generate", "--model", str(tmp_path / "empty"), "w5")
    assert "'none.png' is not a file" in complaint(capsys, *ask, "--image", "none.png", "w5")
    assert "broken.png" in complaint(capsys, *ask, "--image", str(tmp_path / "broken.png"), "w5")
    assert "at most 63 fit" in complaint(capsys, *ask, "w5 " * 70)
    assert "at most 1 allowed" in complaint(
        capsys, *ask, "--limit-mm-per-prompt", "image=1", "--image", pictures[0], "--image", pictures[1], "w5"
    )
    batch = ["batch", "--model", model, "-o", str(tmp_path / "answers.jsonl")]
    assert "is not a file" in complaint(capsys, *batch, str(tmp_path / "none.jsonl"))
    (tmp_path / "requests.jsonl").write_text("{}\n")
    (tmp_path / "answers.jsonl").write_text("notes\n")
    assert "not of this job" in complaint(capsys, *batch, str(tmp_path / "requests.jsonl"))
    assert (tmp_path / "answers.jsonl").read_text() == "notes\n"


def test_an_error_of_our_own_is_named_and_debug_shows_where(monkeypatch, capsys):
    def broken():
        raise KeyError("a bug")

    monkeypatch.setattr("aphrodite_jax.architectures.known_architectures", broken)
    assert complaint(capsys, "models") == "KeyError: 'a bug' (run with --debug to see where)"
    with pytest.raises(KeyError, match="a bug"):
        main(["models", "--debug"])


def test_an_interrupt_is_status_130(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("aphrodite_jax.architectures.known_architectures", interrupted)
    assert status("models") == 130
    assert capsys.readouterr().err == "aphrodite-jax: interrupted\n"


def run(*argv, **options):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run([sys.executable, *argv], stderr=subprocess.PIPE, text=True, timeout=300, env=env, **options)


def test_help_imports_neither_jax_nor_transformers():
    code = (
        "import sys; from aphrodite_jax.cli import main\n"
        "try: main(['generate', '--help'])\n"
        "finally: assert not {'jax', 'numpy', 'transformers'} & set(sys.modules)"
    )
    done = run("-c", code, stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--image" in done.stdout


def test_a_reader_that_has_gone_is_status_141():
    reader, writer = os.pipe()
    os.close(reader)
    done = run("-m", "aphrodite_jax", "models", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no device that is always full")
def test_a_full_disk_behind_stdout_is_status_1():
    with open("/dev/full", "w") as full:
        done = run("-m", "aphrodite_jax", "models", stdout=full)
    assert done.returncode == 1
    assert done.stderr == "aphrodite-jax: error: [Errno 28] No space left on device\n"
