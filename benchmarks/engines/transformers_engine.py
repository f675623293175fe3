"""Serves transformers' ``generate`` by `protocol`, in static batches."""

import time

import torch
import transformers
from protocol import picture, serve, token_times

model: transformers.PreTrainedModel
processor: transformers.ProcessorMixin


def start(checkpoint: str):
    """Load the model and its processor."""
    global model, processor
    model = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    processor = transformers.AutoProcessor.from_pretrained(checkpoint, backend="pil")
    processor.tokenizer.padding_side = "left"
    model.generation_config.eos_token_id = None  # every answer runs to its full length
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    return versions, {"generate": generate, "latency": latency}


def generate(requests: list[dict], batch_size: int | None = None) -> dict:
    """Answer all, greedily; a batch goes on until its longest answer is done, the others' surplus is cut."""
    pictures = [[picture(seed) for seed in request["images"]] for request in requests]
    batch_size = batch_size or len(requests)
    tokens = []
    begin = time.perf_counter()
    for at in range(0, len(requests), batch_size):
        batch = requests[at : at + batch_size]
        answers = _generate(batch, pictures[at : at + batch_size])
        tokens += [answer[: request["max_tokens"]].tolist() for answer, request in zip(answers, batch, strict=True)]
    return {"seconds": time.perf_counter() - begin, "tokens": tokens}


def latency(requests: list[dict], in_flight: int) -> dict:
    """When tokens come with one request in flight: a batch that runs takes in no other."""
    if in_flight != 1:
        raise ValueError(f"transformers' generate streams one request at a time, not {in_flight}")
    pictures = [[picture(seed) for seed in request["images"]] for request in requests]
    begin = time.perf_counter()
    arrivals = []
    for request, images in zip(requests, pictures, strict=True):
        streamer = Clock()
        _generate([request], [images], streamer=streamer)
        arrivals.append(streamer.arrivals)
    return {"seconds": time.perf_counter() - begin} | token_times(arrivals)


class Clock(transformers.generation.streamers.BaseStreamer):
    """Notes when tokens come."""

    def __init__(self):
        self.arrivals = [(time.perf_counter(), 0)]
        self.seen_prompt = False

    def put(self, value):
        """The prompt first, then each new token."""
        if self.seen_prompt:
            self.arrivals.append((time.perf_counter(), self.arrivals[-1][1] + 1))
        self.seen_prompt = True

    def end(self):
        """Nothing is left to note."""


def _generate(batch: list[dict], pictures: list[list], **options) -> torch.Tensor:
    """Tokens of the answers, ``[request, token]``."""
    texts = [request["text"] for request in batch]
    inputs = processor(images=pictures if any(pictures) else None, text=texts, padding=True, return_tensors="pt")
    longest = max(request["max_tokens"] for request in batch)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=longest, **options)
    return ids[:, inputs["input_ids"].shape[1] :]


if __name__ == "__main__":
    serve(start)
