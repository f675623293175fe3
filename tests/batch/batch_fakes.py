"""An LLM without a model. Answers come out of order, and their last digits, as those of real programs, depend
on how many requests run in the same steps and on what the encoder cache holds."""

import collections
import dataclasses
import json
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from aphrodite_jax.config import EngineConfig, ModelConfig
from aphrodite_jax.errors import MediaError, PromptTooLongError
from aphrodite_jax.outputs import CompletionOutput, Logprob, RequestOutput

CONTEXT_LENGTH = 64


@dataclasses.dataclass
class FakePrompt:
    """As much of a `PreparedPrompt` as jobs look at: each image of a prompt is an item of its pixels' checksum."""

    text: str
    token_ids: np.ndarray
    media: tuple = ()


class FakeEngine:
    """Runs ``max_num_seqs`` requests at a time; one takes 1 to 9 steps, as its prompt's checksum says."""

    def __init__(self, max_num_seqs: int, step_seconds: float):
        self.engine_config = EngineConfig(max_num_seqs=max_num_seqs)
        self.max_running, self.lockstep = max_num_seqs, None
        self.step_seconds = step_seconds
        self.waiting, self.running = collections.deque(), {}
        self.num_encoded = 0
        self.most_at_once = 0
        self.num_steps = 0
        self.seen = collections.deque(maxlen=0)  # forgets what it gets; put a list for prompts in their order

    def reset_caches(self):
        self.num_encoded = 0

    def prepare(self, prompt):
        prompt = prompt if isinstance(prompt, dict) else {"prompt": prompt}
        text = prompt.get("prompt") or str(prompt["prompt_token_ids"])
        if "broken image" in text:
            raise MediaError(f"the image can't be opened: {object()}")
        if "bug" in text:
            raise KeyError("a mapper of a model author")
        images = [np.asarray(image) for image in prompt.get("multi_modal_data", {}).get("image", ())]
        hashes = [f"{zlib.crc32(pixels.tobytes()):08x}" for pixels in images]
        text = " ".join([text, *hashes])
        media = tuple(
            SimpleNamespace(modality="image", content_hash=name, mm_kwargs={"pixel_values": pixels}, embeds=None)
            for name, pixels in zip(hashes, images, strict=True)
        )
        return FakePrompt(text, np.arange(1 + len(text) % 50), media)

    def add_prepared(self, request_id, prompt, sampling_params, *, incremental):
        text = prompt.text
        self.seen.append(prompt)
        assert not incremental, "nobody reads a batch's answers before they are finished"
        self.waiting.append((request_id, text, sampling_params))
        self.most_at_once = max(self.most_at_once, len(self.waiting) + len(self.running))

    def step(self, max_decode_steps):
        time.sleep(self.step_seconds)
        self.num_steps += 1
        while self.waiting and len(self.running) < self.engine_config.max_num_seqs:
            request_id, text, params = self.waiting.popleft()
            self.num_encoded += 1
            self.running[request_id] = [zlib.crc32(text.encode()) % 9 + 1, text, params, [self.num_encoded]]
        outputs, batch_size = [], len(self.running)
        for request_id, state in list(self.running.items()):
            state[0] -= 1
            state[3].append(batch_size)
            if state[0] == 0:
                del self.running[request_id]
            outputs.append(_output(request_id, *state[1:], finished=state[0] == 0))
        return outputs

    def abort_request(self, request_id):
        self.running.pop(request_id, None)
        self.waiting = collections.deque(entry for entry in self.waiting if entry[0] != request_id)

    def has_unfinished_requests(self):
        return bool(self.waiting or self.running)


class FakeLLM:
    def __init__(self, directory: Path, *, max_num_seqs: int = 4, step_seconds: float = 0.0, seed: int = 0):
        directory.mkdir(exist_ok=True)
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        config["max_position_embeddings"] = CONTEXT_LENGTH
        (directory / "config.json").write_text(json.dumps(config))
        self.model_config = ModelConfig(model=str(directory), seed=seed)
        self.engine = FakeEngine(max_num_seqs, step_seconds)
        self.pool = ThreadPoolExecutor(2)
        self.num_rendered = 0

    def prepare_later(self, make_prompt):
        return self.pool.submit(lambda: self.engine.prepare(make_prompt()))

    def render_chat(self, messages):
        """Texts as they are, ``<image>`` for images."""
        self.num_rendered += 1
        images = []

        def text_of(content):
            if isinstance(content, str) or not all(isinstance(part, dict) for part in content):
                return content
            images.extend(np.asarray(part["image"]) for part in content if part["type"] == "image")
            return " ".join("<image>" if part["type"] == "image" else part["text"] for part in content)

        text = "\n".join(f"{message['role']}: {text_of(message['content'])}" for message in messages)
        return {"prompt": text, "multi_modal_data": {"image": images}}


def _output(request_id, text, params, history, *, finished):
    if finished and "too long" in text:
        error = PromptTooLongError("the prompt has 99 tokens")
        return RequestOutput(request_id=request_id, prompt=text, finished=True, error=error)
    answer = f"{zlib.crc32(f'{text}{params.seed}{history}'.encode()):08x}{'é' * (params.max_tokens == 7)}"
    if not finished:
        half = CompletionOutput(index=0, text=answer[:4], token_ids=(1,))
        return RequestOutput(request_id=request_id, prompt=text, prompt_token_ids=(1, 2), outputs=(half,))
    logprobs = None
    if params.logprobs is not None:
        token = {
            1: Logprob(logprob=-0.5, rank=2, decoded_token="é"),
            2: Logprob(logprob=-0.25, rank=1, decoded_token="b"),
        }
        logprobs = (token, {2: Logprob(logprob=float("-inf"), rank=9, decoded_token="\ufffd"), **{}})
    answers = tuple(
        CompletionOutput(index=index, text=answer, token_ids=(1, 2), finish_reason="stop", logprobs=logprobs)
        for index in range(params.n)
    )
    return RequestOutput(request_id=request_id, prompt=text, prompt_token_ids=(1, 2, 3), outputs=answers, finished=True)


def chat_line(custom_id, text="hello", **options):
    body = {"messages": [{"role": "user", "content": text}], **options}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def completion_line(custom_id, prompt="hello", **options):
    body = {"prompt": prompt, **options}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def write_requests(path: Path, lines) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read_answers(path: Path):
    return [json.loads(line) for line in path.read_text().splitlines()]
