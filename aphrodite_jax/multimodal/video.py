"""Videos: which frames are taken of a file, and what is known of frames that are given.

Frames that a user gives are all taken, in their order. Of a file as many are taken as the checkpoint's video processor
names (``num_frames``, or ``fps`` between ``min_frames`` and ``max_frames``), spread evenly, and never sampled again.
"""

import dataclasses
import io
import json
import numbers
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils.hub import cached_file

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import ConfigError, MediaError
from aphrodite_jax.multimodal.context import model_class
from aphrodite_jax.multimodal.inputs import as_array
from aphrodite_jax.multimodal.media import open_image, read_media

__all__ = ["FrameSampling", "Video", "frame_sampling", "open_video", "video_processor_options"]

PROCESSOR_FILES = {
    "video_preprocessor_config.json": None,
    "processor_config.json": "video_processor",
    "preprocessor_config.json": None,
}
"""Where a checkpoint keeps the options of its video processor, the first that is there; None: the file itself."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Video:
    """An opened video.

    Attributes:
      frames: uint8 ``[frames, height, width, 3]``, upright RGB.
      timestamps: seconds from the video's start, of each frame; None where nobody told.
      frame_indices: which frames of a file these are; None where frames were given.
    """

    frames: np.ndarray
    timestamps: tuple[float, ...] | None = None
    frame_indices: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def fps(self) -> float | None:
        """Frames that were taken of each second, on the average; None where nobody knows."""
        if self.timestamps is None or len(self) < 2 or self.timestamps[-1] <= self.timestamps[0]:
            return None
        return (len(self) - 1) / (self.timestamps[-1] - self.timestamps[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameSampling:
    """How many frames are taken of a file: ``num_frames``; without, ``fps`` of each second, within bounds."""

    num_frames: int | None = None
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768

    def indices(self, total: int, seconds: float) -> np.ndarray:
        """The frames, int64, ascending, of ``total`` frames that last ``seconds``."""
        count = self.num_frames
        if count is None:
            count = int(np.clip(int(seconds * self.fps), self.min_frames, self.max_frames))
        count = min(count, total)
        return np.arange(count) * total // count


def frame_sampling(model_config: ModelConfig) -> FrameSampling:
    """That of the checkpoint's video processor, else of its model class, with ``video_sampling`` of the config set.

    Raises:
      ConfigError: an option that is unknown or out of range.
    """
    names = [field.name for field in dataclasses.fields(FrameSampling)]
    options = dict(getattr(model_class(model_config), "video_sampling", {}))
    options |= {name: value for name, value in video_processor_options(model_config).items() if name in names and value}
    asked = dict(model_config.video_sampling)
    if unknown := sorted(set(asked) - set(names)):
        raise ConfigError(f"video_sampling has no option {', '.join(map(repr, unknown))}; there are {', '.join(names)}")
    rates = set(asked) - {"num_frames"}
    if rates and "num_frames" in asked:
        raise ConfigError(f"video_sampling has num_frames, beside which {', '.join(sorted(rates))} would mean nothing")
    if rates:
        options.pop("num_frames", None)
    sampling = FrameSampling(**options | asked)
    for name in names:
        value = getattr(sampling, name)
        kinds = int | float if name == "fps" else int
        if value is None and name == "num_frames":
            continue
        if isinstance(value, bool) or not isinstance(value, kinds) or value <= 0:
            raise ConfigError(f"video_sampling: {name} must be a number above 0, got {value!r}")
    return sampling


def open_video(source: Any, model_config: ModelConfig) -> Video:
    """A video from frames, from frames with their times, or from a file.

    Args:
      source: a list of images of one size; a uint8 array ``[frames, height, width, 3]``; a mapping of ``frames`` to one
        of these, and ``fps`` or ``timestamps`` in seconds; a path, ``file:`` or ``data:`` URL or the bytes of a file,
        which PyAV decodes (``pip install aphrodite-jax[video]``); or a `Video`.

    Raises:
      MediaError: no video, one without frames, frames of mixed sizes or too many pixels, or times that don't fit them.
    """
    if isinstance(source, Video):
        return source
    if isinstance(source, Mapping):
        return _with_times(source, model_config)
    if isinstance(source, str | Path | bytes | bytearray | memoryview):
        return _decode(*read_media(source, model_config, "video"), model_config)
    return Video(frames=_frames(source, model_config))


def _with_times(source: Mapping[str, Any], model_config: ModelConfig) -> Video:
    if "frames" not in source or set(source) - {"frames", "fps", "timestamps"} or {"fps", "timestamps"} <= set(source):
        raise MediaError(
            f"a video as a mapping has 'frames' and one of 'fps' and 'timestamps', got {', '.join(map(repr, source))}"
        )
    frames = _frames(source["frames"], model_config)
    fps, timestamps = source.get("fps"), source.get("timestamps")
    if fps is not None:
        rate = float(fps) if isinstance(fps, numbers.Real) and not isinstance(fps, bool) else 0.0
        if not 0 < rate < float("inf"):
            raise MediaError(f"fps of a video is a number above 0, got {fps!r}")
        timestamps = np.arange(len(frames)) / rate
    if timestamps is None:
        return Video(frames=frames)
    times = np.asarray(timestamps)
    if times.dtype.kind not in "iuf" or times.shape != (len(frames),) or not np.isfinite(times).all():
        raise MediaError(f"timestamps of a video are one number of seconds a frame: {len(frames)}, got {timestamps!r}")
    if (np.diff(times) < 0).any() or times[0] < 0:
        raise MediaError(f"timestamps of a video start at 0 or later and never fall, got {timestamps!r}")
    return Video(frames=frames, timestamps=tuple(times.astype(float).tolist()))


def _frames(source: Any, model_config: ModelConfig) -> np.ndarray:
    array = as_array(source)
    if array is not None:
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or not array.size:
            raise MediaError(
                "an array of a video's frames is uint8 [frames, height, width, 3], one frame at least, got "
                f"{array.dtype}{list(array.shape)}"
            )
        open_image(array[0], model_config)  # the frames' size is checked as an image's
        return array
    if not isinstance(source, list | tuple) or not source:
        what = "an empty one" if isinstance(source, list | tuple) else type(source).__name__
        raise MediaError(
            "a video is a list of images, a uint8 array [frames, height, width, 3], a mapping of 'frames' to one of "
            f"these, or a file; got {what}"
        )
    opened = [np.asarray(open_image(frame, model_config)) for frame in source]
    if len({frame.shape for frame in opened}) > 1:
        sizes = sorted({f"{frame.shape[1]}x{frame.shape[0]}" for frame in opened})
        raise MediaError(f"the frames of a video have one size, got {', '.join(sizes)}")
    return np.stack(opened)


def _decode(content: bytes, name: str, model_config: ModelConfig) -> Video:
    try:
        import av
    except ImportError as error:
        raise MediaError(
            f"{name}: video files are decoded by PyAV, which is not installed: pip install 'aphrodite-jax[video]', or "
            "give the frames"
        ) from error
    try:
        with av.open(io.BytesIO(content), "r") as container:
            stream = container.streams.video[0]
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > model_config.max_image_pixels:
                raise MediaError(
                    f"{name} has frames of {width} x {height} pixels, more than {model_config.max_image_pixels}: scale "
                    "it down or raise max_image_pixels"
                )
            total = sum(packet.size > 0 for packet in container.demux(stream))
            rate = float(stream.average_rate or 0)
            if not total or not rate:
                raise MediaError(f"{name} has no frames")
            chosen = frame_sampling(model_config).indices(total, total / rate)
            container.seek(0)
            frames, times = _take(container, stream, set(chosen.tolist()), rate)
    except (MediaError, ConfigError):
        raise
    except Exception as error:  # PyAV's decoders answer damaged files with errors of many types
        raise MediaError(f"{name} is no video file that can be read: {type(error).__name__}: {error}") from error
    if not frames:
        raise MediaError(f"{name} has no frames that can be decoded")
    indices = tuple(sorted(frames))
    return Video(
        frames=np.stack([frames[index] for index in indices]),
        timestamps=tuple(times[index] for index in indices),
        frame_indices=indices,
    )


def _take(container: Any, stream: Any, wanted: set[int], rate: float) -> tuple[dict[int, np.ndarray], dict[int, float]]:
    """The wanted frames and their times, by index, in the order in which they are shown."""
    frames, times, start = {}, {}, None
    for index, frame in enumerate(container.decode(stream)):
        time = index / rate if frame.time is None else float(frame.time)
        start = time if start is None else start
        if index in wanted:
            pixels = frame.to_ndarray(format="rgb24")
            turns = round((getattr(frame, "rotation", 0) or 0) / 90) % 4  # as phones store it, counter-clockwise
            frames[index] = np.ascontiguousarray(np.rot90(pixels, turns))
            times[index] = max(time - start, 0.0)
        if len(frames) == len(wanted):
            break
    return frames, times


def video_processor_options(model_config: ModelConfig) -> dict[str, Any]:
    """What the checkpoint's files say of its video processor; empty where they say nothing.

    Raises:
      ConfigError: a file that is no JSON.
    """
    for file, key in PROCESSOR_FILES.items():
        path = cached_file(
            model_config.model, file, revision=model_config.revision, _raise_exceptions_for_missing_entries=False
        )
        if path is None:
            continue
        try:
            options = json.loads(Path(path).read_text("utf-8"))
        except ValueError as error:
            raise ConfigError(f"{file} of {model_config.model!r} is no JSON: {error}") from error
        options = options.get(key) if key else options
        if isinstance(options, dict):
            return options
    return {}
