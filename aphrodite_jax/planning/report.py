"""What a plan found, and how it is told."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from aphrodite_jax.planning.floors import Floor
from aphrodite_jax.planning.kernel_estimates import KernelEstimate
from aphrodite_jax.planning.workload import Workload

__all__ = ["Estimates", "Memory", "Plan", "ProgramFigures", "Throughput", "as_json", "as_text"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramFigures:
    """What the compiler says of one program, on one device.

    Attributes:
      bucket: its shapes, as `executor.programs` has them.
      pages: of the KV cache that it was compiled for, about as many as there will be.
      seconds: to compile.
      temp_bytes, code_bytes, argument_bytes, output_bytes: ``memory_analysis`` of the compiled program.
    """

    name: str
    bucket: str
    pages: int
    seconds: float
    temp_bytes: int
    code_bytes: int
    argument_bytes: int
    output_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device.

    Attributes:
      device, usable: all, and what ``memory_fraction`` leaves.
      code: machine code of all programs that the engine would compile, at most.
      temporary: what the hungriest program takes while it runs.
      kv_tokens: that all pages hold.
      full_requests: of ``max_model_len`` tokens that they hold.
    """

    device: int
    usable: int
    weights: int
    encoder_cache: int
    code: int
    temporary: int
    kv_pages: int
    kv_bytes_per_token: float
    kv_tokens: int
    full_requests: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimates:
    """Floors of one run of each program, on one copy of the model, and the compiler's estimates of kernels.

    Attributes:
      decode_rows, decode_keys: requests of the step, and keys that each sees on average.
      decode_bytes_counted: the compiler's count for a step, where requests fill their block tables.
      decode_weights_read: bytes of the parameters that the step takes.
      decode_kv_read_counted: bytes of keys and values within ``decode_bytes_counted``.
      prefill_tokens: of one forward program.
      encode_images: of one encode program.
    """

    decode: Floor
    decode_rows: int
    decode_keys: float
    decode_bytes_counted: float
    decode_weights_read: int
    decode_kv_read_counted: float
    prefill: Floor
    prefill_tokens: int
    encode: Floor | None
    encode_images: int
    kernels: tuple[KernelEstimate, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Throughput:
    """Of all devices, if every program took its floor: no machine will be as fast."""

    encode_seconds: float
    prefill_seconds: float
    decode_seconds: float
    images_per_second: float
    output_tokens_per_second: float
    price_per_hour: float | None
    cost_per_million_images: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """All of it.

    Attributes:
      workload: with no more requests at a time than the pages hold, of ``requests_asked``.
      reason, remedies: of a plan that does not fit.
      estimates, throughput: of one that does; ``missing`` says why there are none.
    """

    model: str
    topology: str
    device_kind: str
    num_devices: int
    tensor_parallel_size: int
    data_parallel_size: int
    dtype: str
    max_model_len: int
    max_num_seqs: int
    workload: Workload
    requests_asked: int
    image_tokens: int | None
    fits: bool
    memory: Memory
    programs: tuple[ProgramFigures, ...]
    seconds: float
    reason: str | None = None
    remedies: tuple[str, ...] = ()
    estimates: Estimates | None = None
    throughput: Throughput | None = None
    missing: str | None = None


def as_json(plan: Plan) -> dict[str, Any]:
    """Plain values; a `Floor` has its ``seconds`` too, and all that is no measured byte stands under "estimates" and
    "throughput"."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
            return fields | {"seconds": value.seconds} if isinstance(value, Floor) else fields
        if isinstance(value, Mapping):
            return {key: plain(x) for key, x in value.items()}
        return [plain(x) for x in value] if isinstance(value, list | tuple) else value

    found = plain(plan)
    json.dumps(found)  # which it must allow
    return found


def as_text(plan: Plan) -> str:
    """For people."""
    return "\n".join(_lines(plan))


def _lines(plan: Plan) -> Iterator[str]:
    copies = f", {plan.data_parallel_size} copies" if plan.data_parallel_size > 1 else ""
    yield f"{plan.model} in {plan.dtype} on {plan.topology}: {plan.num_devices} x {plan.device_kind}"
    yield f"  one copy on {plan.tensor_parallel_size} devices{copies}; max_model_len {plan.max_model_len}, " + (
        f"max_num_seqs {plan.max_num_seqs}"
    )
    yield ""
    yield "fits" if plan.fits else f"DOES NOT FIT: {plan.reason}"
    if plan.remedies:
        yield "  what would, by arithmetic:"
        yield from (f"    {remedy}" for remedy in plan.remedies)
    yield ""
    yield "bytes of a device"
    memory = plan.memory
    rows = [
        ("weights", memory.weights),
        ("encoder cache", memory.encoder_cache),
        ("code of all programs, at most", memory.code),
        ("hungriest program while it runs", memory.temporary),
        ("KV pages", memory.kv_pages),
        ("may be used", memory.usable),
        ("in all", memory.device),
    ]
    yield from (f"  {name:<34}{_gib(size):>12}" for name, size in rows)
    if plan.fits:
        yield (
            f"KV: {memory.kv_tokens:,} tokens of {memory.kv_bytes_per_token:,.0f} bytes, {memory.full_requests} "
            f"requests of {plan.max_model_len}"
        )
    yield ""
    yield "programs, as compiled (for a cache of one page: those by which the engine plans its memory)"
    yield f"  {'name':<14}{'bucket':<28}{'pages':>9}{'seconds':>9}{'temporary':>14}{'code':>14}"
    for x in plan.programs:
        bucket = x.bucket if len(x.bucket) <= 26 else f"{x.bucket[:23]}..."
        yield (
            f"  {x.name:<14}{bucket:<28}{x.pages:>9,}{x.seconds:>9.1f}{_mib(x.temp_bytes):>14}{_mib(x.code_bytes):>14}"
        )
    if plan.estimates is not None:
        yield from _estimate_lines(plan, plan.estimates)
    if plan.throughput is not None:
        yield from _throughput_lines(plan, plan.throughput)
    if plan.missing is not None:
        yield ""
        yield f"missing: {plan.missing}"
    yield ""
    yield f"planned in {plan.seconds:.0f} seconds"


def _estimate_lines(plan: Plan, estimates: Estimates) -> Iterator[str]:
    yield ""
    yield "ESTIMATES: floors, from bytes and operations; nothing ran"
    yield f"  {'':<38}{'memory':>10}{'operations':>12}{'exchange':>10}{'floor':>10}   ms"
    named: list[tuple[str, Floor]] = [
        (f"decode, {estimates.decode_rows} requests of {estimates.decode_keys:.0f} keys", estimates.decode),
        (f"prefill, {estimates.prefill_tokens} tokens", estimates.prefill),
    ]
    if estimates.encode is not None:
        named.append((f"encode, {estimates.encode_images} images", estimates.encode))
    for name, floor in named:
        parts = (floor.memory_seconds, floor.flops_seconds, floor.exchange_seconds, floor.seconds)
        widths = (10, 12, 10, 10)
        yield f"  {name:<38}" + "".join(f"{1e3 * x:>{width}.3f}" for x, width in zip(parts, widths, strict=True))
    for kernel in estimates.kernels:
        if kernel.cycles is None or kernel.seconds is None:
            yield f"  compiler's estimate of {kernel.name}: none ({kernel.error})"
        else:
            yield (
                f"  compiler's estimate of {kernel.name}, one layer, {kernel.requests}: {kernel.cycles:,} cycles, "
                f"{1e6 * kernel.seconds:,.0f} us; memory alone {1e6 * kernel.memory_seconds:,.0f} us"
            )


def _throughput_lines(plan: Plan, throughput: Throughput) -> Iterator[str]:
    work = plan.workload
    image = (
        ""
        if not work.images_per_prompt
        else (f"{work.images_per_prompt} image{'s' * (work.images_per_prompt > 1)} of {plan.image_tokens} tokens and ")
    )
    fewer = f" (of {plan.requests_asked}: the pages hold no more)" if work.requests != plan.requests_asked else ""
    yield ""
    yield "ESTIMATES: at these floors, so at most"
    yield (
        f"  {work.requests} requests at a time on each copy{fewer}, each with {image}{work.prompt_tokens} tokens of "
        f"text, {work.output_tokens} tokens of answer"
    )
    yield (
        f"  a round takes {1e3 * throughput.encode_seconds:,.1f} ms to encode, {1e3 * throughput.prefill_seconds:,.1f} "
        f"ms of prefill and {1e3 * throughput.decode_seconds:,.1f} ms of decode"
    )
    if throughput.images_per_second:
        yield f"  {throughput.images_per_second:,.1f} images a second"
    yield f"  {throughput.output_tokens_per_second:,.0f} tokens a second"
    if throughput.cost_per_million_images is not None:
        yield (
            f"  {throughput.cost_per_million_images:,.2f} for a million images, at {throughput.price_per_hour:,.2f} an "
            "hour for all devices"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
