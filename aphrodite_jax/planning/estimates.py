"""Floors of a plan's programs, and what follows from them for its work."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.executor.model_programs import DeviceArrays, ModelPrograms, device_bytes
from aphrodite_jax.executor.programs import CompiledProgram, CompileJob, Programs
from aphrodite_jax.modeling.sharding import MODEL
from aphrodite_jax.planning.floors import Floor, all_gather_bytes, all_reduce_bytes, all_to_all_bytes, floor_of
from aphrodite_jax.planning.kernel_estimates import TILE, KernelEstimate, estimate_attention
from aphrodite_jax.planning.report import Estimates, Throughput
from aphrodite_jax.planning.targets import Target
from aphrodite_jax.planning.workload import UsualImage, Workload, prompt_length
from kernels_pallas import costs

__all__ = ["Estimator"]

NO_PREFETCH = {"xla_msa_max_outstanding_prefetches": "0"}
"""With it XLA copies no weight to VMEM ahead of its use, which its count of bytes would have twice."""


class Estimator:
    """Estimates for one copy of a model.

    Args:
      made: the model's programs.
      workload: with all its fields filled in.
      image: what becomes of an image of the workload; None for a model that takes none.
      arrays: shapes of what stays on the devices, as the programs are compiled for.
    """

    def __init__(
        self,
        made: ModelPrograms,
        target: Target,
        model_config: ModelConfig,
        workload: Workload,
        image: UsualImage | None,
        arrays: DeviceArrays,
    ):
        assert made.mesh is not None, "a plan is for devices of a mesh"
        self._made, self._target, self._arrays = made, target, arrays
        self._workload, self._image = workload, image
        self._devices = made.mesh.shape[MODEL]
        self._text_config = model_config.hf_text_config
        self._length = prompt_length(workload, image)
        self._requests, self._images = workload.requests or 1, workload.images_per_prompt or 0
        self._rows = made.num_greedy_rows(self._requests)

    # The programs of the work.

    @functools.cached_property
    def decode_job(self) -> CompileJob:
        """A step of all requests."""
        return self._made.decode_job_of(self._arrays, self._rows)

    @functools.cached_property
    def forward_job(self) -> CompileJob:
        """The largest step of prompts."""
        return self._made.forward_job_of(self._arrays, self._made.largest_forward)

    @functools.cached_property
    def encode_job(self) -> CompileJob | None:
        """As many images as are encoded together."""
        if self._image is None:
            return None
        return self._made.encode_job_of(self._arrays, self._image.shapes, self._encoded)

    @property
    def jobs(self) -> list[CompileJob]:
        """All of them; the one for images is often the largest, which is there already."""
        return [job for job in (self.decode_job, self.forward_job, self.encode_job) if job is not None]

    @property
    def _encoded(self) -> int:
        assert self._image is not None
        return self._made.encode_part(self._image.shapes, self._requests * max(1, self._images))

    def decode_count(self) -> Callable[[], Mapping[str, float]]:
        """Asks the compiler for its count of a decode step, in which each byte is there once."""
        lowered = Programs("raise", self._made.mesh).lower(self.decode_job)
        return lambda: lowered.compile(compiler_options=NO_PREFETCH).cost_analysis()

    # What they take.

    def estimates(
        self,
        *,
        decode: CompiledProgram,
        decode_count: Mapping[str, float],
        forward: CompiledProgram,
        encode: CompiledProgram | None,
        kernels: tuple[KernelEstimate, ...],
    ) -> Estimates:
        """Of the compiled programs."""
        keys = self._length + self._workload.output_tokens / 2
        filled = [costs.paged_decode(*x, self._made.max_pages) for x in self._attention(self._rows)]
        usual = [costs.paged_decode(*x, self._made.max_pages, keys) for x in self._attention(self._rows)]
        counted, filled_bytes = decode_count["bytes accessed"], sum(x.bytes_accessed for x in filled)
        return Estimates(
            decode=floor_of(
                self._target,
                bytes=counted + sum(x.bytes_accessed for x in usual) - filled_bytes,
                flops=decode_count["flops"] + sum(x.flops for x in usual) - sum(x.flops for x in filled),
                sent=self._sent(self._rows, self._rows),
            ),
            decode_rows=self._rows,
            decode_keys=keys,
            decode_bytes_counted=counted,
            decode_weights_read=_argument_bytes(decode) - device_bytes(self._arrays.kv_caches),
            decode_kv_read_counted=filled_bytes,
            prefill=self._prefill(forward),
            prefill_tokens=self._made.largest_forward[1],
            encode=None if encode is None else self._encode(encode),
            encode_images=0 if encode is None else self._encoded,
            kernels=kernels,
        )

    def _prefill(self, program: CompiledProgram) -> Floor:
        """Of the largest forward program, filled with prompts of the work."""
        num_decode, tokens, requests = self._made.largest_forward
        prompts = max(1, tokens // self._length)
        bytes_ = _argument_bytes(program) - device_bytes(self._arrays.kv_caches)
        flops = program.call.cost_analysis()["flops"]
        for q, pages in self._attention(tokens):
            usual = costs.paged_prefill(q, pages, prompts, self._made.max_pages, self._length / 2)
            flops += usual.flops - costs.paged_prefill(q, pages, requests, self._made.max_pages).flops
            bytes_ += usual.bytes_accessed
        for q, pages in self._attention(num_decode):
            flops -= costs.paged_decode(q, pages, self._made.max_pages).flops
        sent = self._sent(num_decode + tokens, requests)
        if self._image is not None:
            sent += all_gather_bytes(self._rows_bytes(num_decode + tokens), self._devices)
        return floor_of(self._target, bytes=bytes_, flops=flops, sent=sent)

    def _encode(self, program: CompiledProgram) -> Floor:
        """Of the program for images; what its layers exchange, where they are divided, is not counted."""
        assert self.encode_job is not None
        rows = len(self.encode_job.args[3])  # of the encoder cache, which they go to
        return floor_of(
            self._target,
            bytes=_argument_bytes(program),
            flops=program.call.cost_analysis()["flops"],
            sent=all_to_all_bytes(self._rows_bytes(rows), self._devices) if self._made.by_items else 0.0,
        )

    def _attention(self, rows: int) -> list[tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]]:
        """Queries and pages of each layer on one device."""
        heads = self._text_config.num_attention_heads // self._devices
        found = []
        for pages, (_, head_dim) in zip(self._arrays.kv_caches, self._made.kv_shapes, strict=True):
            local = jax.ShapeDtypeStruct(pages.sharding.shard_shape(pages.shape), pages.dtype)
            found.append((jax.ShapeDtypeStruct((rows, heads, head_dim), self._made.dtype), local))
        return found

    def _rows_bytes(self, rows: int) -> int:
        """Of rows of the encoder cache, all columns."""
        return rows * self._made.width * self._made.dtype.itemsize

    def _sent(self, rows: int, logits: int) -> float:
        """What a run of the decoder sends: two sums a layer and one behind the embedding, and parts of the logits."""
        width = self._text_config.hidden_size * self._made.dtype.itemsize
        sums = (2 * self._made.num_layers + 1) * all_reduce_bytes(rows * width, self._devices)
        return sums + all_gather_bytes(logits * self._made.vocab_size * 4, self._devices)

    def kernels(self) -> tuple[KernelEstimate, ...]:
        """The compiler's own, of attention in one layer: for a step of decode, and for one of prompts."""
        kv_heads, head_dim = self._made.kv_shapes[0]
        sizes: dict[str, Any] = dict(
            page_size=self._made.page_size,
            heads=self._text_config.num_attention_heads // self._devices,
            kv_heads=kv_heads // self._devices,
            head_dim=head_dim,
        )
        tokens = self._made.largest_forward[1]
        rows = min(-(-self._length // TILE) * TILE, tokens // TILE * TILE)
        decode = [(self._length + self._workload.output_tokens // 2, 1)] * self._rows
        prefill = [(rows, rows)] * max(1, tokens // rows)
        return tuple(estimate_attention(self._target, requests=x, **sizes) for x in (decode, prefill))

    def throughput(self, estimates: Estimates, copies: int, price_per_hour: float | None) -> Throughput:
        """At the floors: the images of a round of requests are encoded, prompts computed, answers made."""
        encode = 0.0
        if estimates.encode is not None and self._images:
            runs = math.ceil(self._requests * self._images / estimates.encode_images)
            encode = runs * estimates.encode.seconds
        prefill = self._requests * self._length / estimates.prefill_tokens * estimates.prefill.seconds
        decode = self._workload.output_tokens * estimates.decode.seconds
        seconds = encode + prefill + decode
        images_per_second = copies * self._requests * self._images / seconds
        cost = None
        if price_per_hour is not None and images_per_second:
            cost = 1e6 / images_per_second / 3600 * price_per_hour
        return Throughput(
            encode_seconds=encode,
            prefill_seconds=prefill,
            decode_seconds=decode,
            images_per_second=images_per_second,
            output_tokens_per_second=copies * self._requests * self._workload.output_tokens / seconds,
            price_per_hour=price_per_hour,
            cost_per_million_images=cost,
        )


def _argument_bytes(program: CompiledProgram) -> int:
    analysis: Any = program.call
    return analysis.memory_analysis().argument_size_in_bytes
