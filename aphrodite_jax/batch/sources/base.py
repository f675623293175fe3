"""What a batch job reads rows from: the interface that each form of input has.

A source divides its input into *units*, runs of consecutive rows that make one part of the output each, and reads the
rows of one unit at a time. Units hold plain values, so that they can be written down when a job is made and given to
any worker.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, ClassVar

from aphrodite_jax.batch.body import derive_seed
from aphrodite_jax.batch.refusal import Refusal
from aphrodite_jax.batch.requests import BatchRequest, Defaults
from aphrodite_jax.errors import BatchError, ConfigError
from aphrodite_jax.outputs import RequestOutput
from aphrodite_jax.sampling_params import SamplingParams

__all__ = ["RemoteFile", "Row", "RowOptions", "Source", "Unit"]

DEFAULT_MAX_TOKENS = 256
"""Generated tokens of a row that is no OpenAI request, where nothing is said."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """A run of consecutive rows, which makes one part of the output.

    Attributes:
      index: from 0; names the part.
      first_row: its first row's number in the whole input, from 0.
      num_rows: 0 where the shard can't be read.
      where: what the source needs to find the rows again; JSON values alone.
      error: why the shard, or the rest of it, can't be read; it goes to the errors file as one failure.
    """

    index: int
    first_row: int
    num_rows: int
    where: Mapping[str, Any]
    error: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One row: its number in the whole input, from 0, its name, and what it asks or why it can't be asked."""

    number: int
    custom_id: str | None
    request: BatchRequest | Refusal


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """An image by any address that `fsspec` opens: the ``image`` of a message's part ``{"type": "image", ...}``.

    It is fetched in a preparing thread, once where several rows of a window name it.
    """

    url: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowOptions:
    """What a row that is no OpenAI request needs.

    Attributes:
      defaults: names of the model, the base of seeds, ``max_tokens`` (256 if None).
      prompt: asked of every row; where ``columns`` names one for prompts, of rows that have none there.
      system: a system message for all rows.
      columns: names of columns, or extensions of tar members, under "image", "prompt" and "id".
      sampling: fields of `SamplingParams` for those rows; greedy by default.

    Raises:
      BatchError: ``sampling`` is not what `SamplingParams` takes, or asks for several answers.
    """

    defaults: Defaults
    prompt: str | None = None
    system: str | None = None
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if unknown := sorted(set(self.columns) - {"image", "prompt", "id"}):
            raise BatchError(f"columns has {', '.join(map(repr, unknown))}; there are 'image', 'prompt' and 'id'")
        if params := {"n", "logprobs", "prompt_logprobs"} & set(self.sampling):
            raise BatchError(f"{', '.join(sorted(params))}: a row has one answer and its text alone")
        self.sampling_params("")

    def sampling_params(self, custom_id: str) -> SamplingParams:
        """Of the row of this name: its seed comes from the name."""
        given = {
            "temperature": 0.0,
            "max_tokens": self.defaults.max_tokens or DEFAULT_MAX_TOKENS,
            "seed": derive_seed(self.defaults.seed, custom_id),
            **self.sampling,
        }
        try:
            return SamplingParams(**given)
        except (ConfigError, TypeError) as error:
            raise BatchError(f"sampling options of the rows: {error}") from error

    def messages(self, images: Sequence[Any], prompt: str | None = None) -> list[dict[str, Any]]:
        """A conversation that shows images and asks ``prompt``, or the prompt of all rows.

        Args:
          images: anything that opens as an image (a path, bytes, a Pillow image), or a `RemoteFile`.

        Raises:
          Refusal: neither the row nor the options have a prompt.
        """
        prompt = self.prompt if prompt is None else prompt
        if prompt is None:
            raise Refusal("the row has no prompt, and the job gives none (--prompt)", code="missing_prompt")
        content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
        content.append({"type": "text", "text": prompt})
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return [*system, {"role": "user", "content": content}]

    def request(self, custom_id: str, source: Sequence[Any] | Callable[[], Sequence[Any]]) -> BatchRequest:
        """A chat request.

        Args:
          source: its messages, or a function that gives them; that is called in a preparing thread, and what it raises
            is the row's error.
        """
        return BatchRequest(
            custom_id=custom_id,
            model=self.defaults.model_names[0],
            kind="chat",
            source=source,
            sampling_params=self.sampling_params(custom_id),
        )


class Source(abc.ABC):
    """Rows of one form of input, and parts of the matching form.

    A class is made with the input's path, local or any that `fsspec` opens, and with the `RowOptions`; it raises
    `BatchError` for an input that it can't read at all, and for options that don't fit it.

    ``rows`` may raise: `BatchError` stops the job; with any other error the rows that it did not give yet become
    failures, after it was tried again.
    """

    form: ClassVar[str]
    part_suffix: ClassVar[str]

    def __init__(self, path: str, options: RowOptions):
        self.path, self.options = path, options

    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """Plain values that make it this input: a digest of the names and sizes of its files, say."""

    @abc.abstractmethod
    def units(self, rows_per_unit: int) -> Iterator[Unit]:
        """The whole input in units of at most that many rows."""

    @abc.abstractmethod
    def rows(self, unit: Unit) -> Iterator[Row]:
        """The ``num_rows`` rows of a unit, one after the other: they are never all in memory."""

    def record(self, row: Row, output: RequestOutput) -> dict[str, Any]:
        """An answered row as JSON values, as the journal and the part keep it."""
        (answer,) = output.outputs
        return {
            "id": row.custom_id,
            "row": row.number,
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": len(output.prompt_token_ids),
            "completion_tokens": len(answer.token_ids),
        }

    def write_part(self, unit: Unit, records: Iterable[bytes], file: BinaryIO) -> None:
        """Write the records of a unit's answered rows to an open file: as they come, lines of JSON, by default.

        Args:
          records: lines of JSON, in the order of the rows.
        """
        file.writelines(records)
