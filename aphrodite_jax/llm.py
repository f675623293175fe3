"""What a user touches: a model to load, prompts in, answers out."""

import collections
import contextlib
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
from tqdm import tqdm

from aphrodite_jax.config import EngineConfig, default_compilation_cache_dir, split_options
from aphrodite_jax.engine import AphroditeEngine
from aphrodite_jax.engine.admission import Prompt
from aphrodite_jax.engine.sequence import PreparedPrompt
from aphrodite_jax.errors import ConfigError, RequestError
from aphrodite_jax.executor.model_runner import MAX_DECODE_STEPS
from aphrodite_jax.inputs import render_chat
from aphrodite_jax.inspection import Capture, Explanation, capture, explain
from aphrodite_jax.outputs import RequestOutput
from aphrodite_jax.sampling_params import SamplingParams

__all__ = ["LLM"]

Messages = Sequence[Mapping[str, Any]]
OnError = Literal["return", "raise"]
DEFAULT_PARAMS = SamplingParams(temperature=0.0)


class LLM:
    """A model and its engine, for work on lists of prompts.

    Args:
      model: a directory in Hugging Face format or a hub id; None takes the small LLaVA that ships.
      **options: any field of `aphrodite_jax.ModelConfig` (tokenizer, dtype, seed, max_model_len,
        limit_mm_per_prompt, mm_processor_kwargs, hf_overrides, ...) and of `aphrodite_jax.EngineConfig`
        (max_num_seqs, max_num_batched_tokens, kv_cache_memory, ...); both document each one.

    Raises:
      ConfigError: an option that is unknown or out of range, or a model that can't be run.
      CheckpointError: files that are missing or damaged.
    """

    def __init__(self, model: str | os.PathLike | None = None, **options: Any):
        model_config, engine_config = split_options({"model": model, **options})
        _use_compilation_cache(engine_config)
        self.model_config = model_config
        self.engine = AphroditeEngine(model_config, engine_config)
        self._request_numbers = itertools.count()
        self._news: dict[str, RequestOutput] = {}  # latest outputs that nobody has taken yet
        self._pool = ThreadPoolExecutor(engine_config.preprocess_workers, "prepare")
        if engine_config.show_progress and engine_config.warm_up:
            print(self._summary(), file=sys.stderr)

    @property
    def tokenizer(self):
        """The model's tokenizer (transformers)."""
        return self.engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_error: OnError = "return",
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers to prompts, in their order.

        Args:
          prompts: one or a list of: text; a dict with ``prompt`` or ``prompt_token_ids`` and, for media,
            ``multi_modal_data``, such as ``{"image": pil_image}``.
          sampling_params: for all, or one for each prompt; the default is greedy to 16 tokens' length.
          on_error: "return" puts a bad request's error into ``.error`` of its output; "raise" raises the first.
          use_tqdm: draw a progress bar on stderr.

        Raises:
          RequestError: a bad request, with ``on_error="raise"``; requests that run are aborted.
        """
        prompts = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        params = _params_per_prompt(sampling_params, len(prompts))
        _check_on_error(on_error)
        outputs: list[Any] = [None] * len(prompts)
        numbers: dict[str, int] = {}  # of the requests that run
        upcoming = iter(enumerate(prompts))
        ahead: collections.deque[tuple[int, Future]] = collections.deque()  # prompts that are being prepared
        window = 2 * self.engine.max_running  # more would only hold their pixels in memory
        try:
            with self._tracing(), tqdm(total=len(prompts), desc="requests", disable=not use_tqdm) as bar:
                while True:
                    for number, prompt in itertools.islice(upcoming, max(0, window - len(numbers) - len(ahead))):
                        ahead.append((number, self._pool.submit(self.engine.prepare, prompt)))
                    # In order; nobody waits while others run, but for processes that must all do the same.
                    while ahead and (self.engine.lockstep or ahead[0][1].done() or not numbers):
                        number, future = ahead.popleft()
                        request_id = self._next_request_id()
                        try:
                            prepared = future.result()
                            self.engine.add_prepared(request_id, prepared, params[number], incremental=False)
                        except RequestError as error:
                            if on_error == "raise":
                                raise
                            outputs[number] = _failed(request_id, prompts[number], error)
                            bar.update()
                        else:
                            numbers[request_id] = number
                    if not numbers:
                        if None not in outputs:
                            break
                        continue  # all of this window failed
                    # Nobody can join a step: all who wait are in the engine, or it has no room for more.
                    full = len(numbers) >= self.engine.max_running
                    self._step(1 if ahead and not full else MAX_DECODE_STEPS)
                    for request_id in list(numbers):
                        output = self._news.pop(request_id, None)
                        if output is not None and output.finished:
                            outputs[numbers.pop(request_id)] = output
                            bar.update()
        finally:
            for _, future in ahead:
                future.cancel()
            for request_id in numbers:
                self._abort(request_id)
        return outputs

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_error: OnError = "return",
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers to conversations in the form of OpenAI's chat messages.

        ``content`` is text or a list of parts: ``{"type": "text", "text": ...}``, ``{"type": "image_url",
        "image_url": {"url": "data:..." or "file:..."}}``, ``{"type": "image", "image": pil_image}``. The model's chat
        template renders them; each image stands where its part stands.

        Args and Raises: as `generate`.
        """
        conversations: list[Any] = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        _check_on_error(on_error)
        prompts = []
        for conversation in conversations:
            try:
                prompts.append(self.render_chat(conversation))
            except RequestError as error:
                if on_error == "raise":
                    raise
                prompts.append(error)
        return self._generate_rendered(prompts, sampling_params, on_error=on_error, use_tqdm=use_tqdm)

    def render_chat(self, messages: Messages) -> Prompt:
        """The prompt that the model's chat template makes of a conversation.

        Raises:
          RequestError: messages of the wrong form, or media that can't be opened.
        """
        return render_chat(messages, self.tokenizer, self.model_config)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """The answer to one prompt as it grows; the last output is finished.

        It ends without such an output where its request was aborted from outside (`AphroditeEngine.abort_request` gives
        what was there), or where another's call of `AphroditeEngine.step` took its last one.

        Args:
          prompt: as for `generate`.
          sampling_params: the default is greedy to 16 tokens' length.

        Raises:
          RequestError: the prompt can't be served.
        """
        request_id = self._next_request_id()
        self.engine.add_request(request_id, prompt, sampling_params or DEFAULT_PARAMS)
        try:
            while True:
                output = self._news.pop(request_id, None)
                if output is None:
                    if not self.engine.has_request(request_id):
                        return
                    self._step()
                    continue
                yield output
                if output.finished:
                    return
        finally:
            self._abort(request_id)

    def prepare_later(self, make_prompt: Callable[[], Prompt]) -> Future[PreparedPrompt]:
        """Begin to prepare a prompt for `AphroditeEngine.add_prepared` in one of ``preprocess_workers`` threads.

        Args:
          make_prompt: gives the prompt, in that thread: opening its media may take a while.
        """
        return self._pool.submit(lambda: self.engine.prepare(make_prompt()))

    def explain(self, prompt: Prompt) -> Explanation:
        """What becomes of a prompt as things stand, without running it.

        Its tokens, where its media stand, what each row sees, the steps in which it would be computed, and what of it
        the caches hold already. Printed it is text; a notebook shows it in colours.

        Raises:
          RequestError: the prompt can't be served.
        """
        return explain(self.engine, prompt)

    def capture(
        self,
        prompt: Prompt,
        continuation: Sequence[int] = (),
        *,
        hidden_states: Sequence[int] = (),
        attention: Sequence[int] = (),
        attention_rows: Sequence[int] | None = None,
        logit_lens: Sequence[int] = (),
        top_k: int = 5,
    ) -> Capture:
        """What the model computes for a prompt, and for tokens behind it, in chosen layers.

        It runs apart from the engine, whole and without caches; programs are compiled as they are needed.

        Args:
          prompt: as for `generate`.
          continuation: token ids that follow it: ``output.outputs[0].token_ids``, say.
          hidden_states: 0 for what goes into the first decoder layer, ``n`` for what comes out of layer ``n - 1``, -1
            for what comes out of the last, before the last norm.
          attention: decoder layers, from 0 or, backwards, from -1.
          attention_rows: tokens, from 0 or backwards, of which attention is kept; None is the last one.
          logit_lens: as ``hidden_states``: what the model would say next if its layers ended there
            (nostalgebraist, "interpreting GPT: the logit lens", 2020).
          top_k: tokens of each row that the lens names.

        Raises:
          RequestError: the prompt can't be served, or a layer or row is not there.
        """
        return capture(
            self.engine,
            prompt,
            continuation,
            hidden_states=hidden_states,
            attention=attention,
            attention_rows=attention_rows,
            logit_lens=logit_lens,
            top_k=top_k,
        )

    def describe(self) -> str:
        """The model, which attention runs, where the device's memory goes, and the programs that were compiled."""
        return f"{self._summary()}\n\n{self.engine.runner.programs.describe()}"

    def stats(self) -> dict[str, Any]:
        """Counts, times and the state of the caches since the start, as plain values.

        `aphrodite_jax.engine.stats.EngineStats` tells what each is; times in seconds, each with its number, mean,
        median, 99th percentile and maximum. ``prompt_tokens_cached`` stood in pages already.
        """
        return self.engine.describe_stats()

    def _summary(self) -> str:
        runner = self.engine.runner
        return (
            f"{self.model_config.model} on {jax.devices()[0].device_kind} ({jax.default_backend()}), "
            f"{runner.num_pages} KV pages of {runner.page_size} tokens\n"
            f"attention: {runner.attention_implementation}\n{runner.memory_budget()}"
        )

    def _generate_rendered(self, prompts, sampling_params, *, on_error, use_tqdm) -> list[RequestOutput]:
        """`generate` for a list in which errors stand in the places of prompts that could not be rendered."""
        params = _params_per_prompt(sampling_params, len(prompts))
        good = [i for i, prompt in enumerate(prompts) if not isinstance(prompt, Exception)]
        answered = self.generate(
            [prompts[i] for i in good], [params[i] for i in good], on_error=on_error, use_tqdm=use_tqdm
        )
        outputs: list[Any] = [
            _failed(self._next_request_id(), None, prompt) if isinstance(prompt, Exception) else None
            for prompt in prompts
        ]
        for i, output in zip(good, answered, strict=True):
            outputs[i] = output
        return outputs

    def _tracing(self) -> contextlib.AbstractContextManager:
        directory = self.engine.engine_config.trace_dir
        return contextlib.nullcontext() if directory is None else jax.profiler.trace(directory)

    def _step(self, max_decode_steps: int = 1) -> None:
        """Run the engine one step; calls of `generate` and `stream` that are nested keep each other's outputs."""
        for output in self.engine.step(max_decode_steps):
            self._news[output.request_id] = output

    def _abort(self, request_id: str) -> None:
        self.engine.abort_request(request_id)
        self._news.pop(request_id, None)

    def _next_request_id(self) -> str:
        return f"request-{next(self._request_numbers)}"


def _params_per_prompt(params, count: int) -> list[SamplingParams]:
    if params is None:
        params = DEFAULT_PARAMS
    if isinstance(params, SamplingParams):
        return [params] * count
    params = list(params)
    if len(params) != count:
        raise ConfigError(f"{count} prompts came with {len(params)} sampling_params: give one, or one for each")
    return params


def _check_on_error(on_error: str) -> None:
    if on_error not in ("return", "raise"):
        raise ConfigError(f"on_error must be 'return' or 'raise', got {on_error!r}")


def _failed(request_id: str, prompt, error: Exception) -> RequestOutput:
    text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
    return RequestOutput(
        request_id=request_id, prompt=text if isinstance(text, str) else None, finished=True, error=error
    )


def _use_compilation_cache(engine_config: EngineConfig) -> None:
    """Keep compiled programs on disk, unless JAX was told where to already.

    Raises:
      ConfigError: the directory that was asked for can't be written; for the default one this is a warning.
    """
    asked = engine_config.compilation_cache_dir
    if asked is None or jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        return
    path = default_compilation_cache_dir() if asked == "auto" else Path(asked).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(f"no right to write in {path}")
    except OSError as error:
        message = f"compiled programs can't be kept in {path}: {error}; set compilation_cache_dir"
        if asked != "auto":
            raise ConfigError(message) from error
        warnings.warn(message, stacklevel=3)
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
