"""Videos: frames as they are given, files that PyAV decodes, which frames are taken, and what is none."""

import io
import json
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aphrodite_jax import ModelConfig
from aphrodite_jax.errors import ConfigError, MediaError
from aphrodite_jax.multimodal import MULTIMODAL_REGISTRY, Video, content_hash
from aphrodite_jax.multimodal.video import FrameSampling, frame_sampling, open_video

av = pytest.importorskip("av", reason="video files need PyAV, the extra `video`")

HEIGHT, WIDTH = 32, 48


@pytest.fixture
def model_config(llava):
    return ModelConfig(model=llava)


def frames(count):
    """Frame i is of one grey, 8 * i."""
    greys = 8 * np.arange(count, dtype=np.uint8)
    return np.tile(greys[:, None, None, None], (1, HEIGHT, WIDTH, 3))


def encoded(count, rate=4):
    """The bytes of a video file of `frames`."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=rate, width=WIDTH, height=HEIGHT)
        for pixels in frames(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def test_frames_that_are_given_are_all_taken(model_config):
    given = frames(3)
    for source in (given, list(given), tuple(map(Image.fromarray, given)), {"frames": given}):
        video = open_video(source, model_config)
        np.testing.assert_array_equal(video.frames, given)
        assert (video.timestamps, video.frame_indices, video.fps) == (None, None, None)
        assert open_video(video, model_config) is video
    grey = open_video([frame[..., 0] for frame in given], model_config)
    np.testing.assert_array_equal(grey.frames, given)


def test_times_of_frames(model_config):
    video = open_video({"frames": frames(3), "fps": 4}, model_config)
    assert video.timestamps == (0.0, 0.25, 0.5)
    assert video.fps == 4
    for fps in (np.float32(4), np.int64(4), Fraction(4)):
        assert open_video({"frames": frames(3), "fps": fps}, model_config).timestamps == (0.0, 0.25, 0.5)
    video = open_video({"frames": frames(3), "timestamps": [0, 1, 4]}, model_config)
    assert video.timestamps == (0.0, 1.0, 4.0)
    assert video.fps == 0.5


@pytest.mark.parametrize("form", ["path", "url", "bytes"])
def test_a_file_is_decoded_at_the_frames_that_are_asked_for(llava, tmp_path, form):
    content = encoded(20, rate=4)
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    source = {"path": path, "url": path.as_uri(), "bytes": content}[form]
    video = open_video(source, ModelConfig(model=llava, video_sampling={"fps": 1, "min_frames": 2}))
    assert video.frame_indices == (0, 4, 8, 12, 16)
    assert video.timestamps == pytest.approx((0, 1, 2, 3, 4))
    assert video.frames.shape == (5, HEIGHT, WIDTH, 3)
    means = video.frames.reshape(5, -1).mean(axis=1)
    np.testing.assert_allclose(means, [0, 32, 64, 96, 128], atol=3.9)


def test_frames_are_spread_evenly_within_bounds():
    sampling = FrameSampling(fps=2, min_frames=4, max_frames=6)
    assert sampling.indices(100, 2.5).tolist() == [0, 20, 40, 60, 80]
    assert sampling.indices(100, 0.1).tolist() == [0, 25, 50, 75]
    assert len(sampling.indices(100, 1000)) == 6
    assert sampling.indices(3, 1000).tolist() == [0, 1, 2]
    assert FrameSampling(num_frames=2).indices(9, 3).tolist() == [0, 4]


def test_the_checkpoint_says_which_frames_are_taken(llava, tmp_path):
    shutil.copy(Path(llava) / "config.json", tmp_path)
    model_config = ModelConfig(model=tmp_path)
    assert frame_sampling(model_config) == FrameSampling()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"num_frames": 7, "size": {"height": 3}}))
    assert frame_sampling(model_config).num_frames == 7
    (tmp_path / "processor_config.json").write_text(json.dumps({"video_processor": {"fps": 3, "max_frames": 9}}))
    assert frame_sampling(model_config) == FrameSampling(fps=3, max_frames=9)
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps({"num_frames": 5}))
    assert frame_sampling(model_config).num_frames == 5
    asked = ModelConfig(model=tmp_path, video_sampling={"fps": 1})
    assert frame_sampling(asked) == FrameSampling(fps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fpss": 1}, "no option 'fpss'; there are num_frames, fps"),
        ({"num_frames": 0}, "num_frames must be a number"),
        ({"num_frames": 8, "max_frames": 9}, "num_frames, beside which max_frames would mean nothing"),
    ],
)
def test_sampling_that_means_nothing(llava, options, message):
    with pytest.raises(ConfigError, match=message):
        frame_sampling(ModelConfig(model=llava, video_sampling=options))


def test_sampling_for_a_model_without_videos_is_refused(model_config):
    config = ModelConfig(model=model_config.model, video_sampling={"fps": 1})
    with pytest.raises(ConfigError, match="video_sampling is set, but LlavaForConditionalGeneration takes no videos"):
        MULTIMODAL_REGISTRY.get_mm_limits(config)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("clip.mp4", "is not a file here"),
        (b"no video", "is no video file that can be read"),
        ([], "got an empty one"),
        (None, "got NoneType"),
        (3, "got int"),
        (Image.new("RGB", (4, 4)), "or a file; got Image"),
        (np.zeros((4, 4, 3), np.uint8), "one frame at least, got uint8.4, 4, 3."),
        (np.zeros((0, 4, 4, 3), np.uint8), "one frame at least, got uint8.0, 4, 4, 3."),
        ({"frames": []}, "got an empty one"),
        ({"fps": 2}, "a video as a mapping has 'frames'"),
        ({"frames": frames(2), "fps": 2, "timestamps": [0, 1]}, "one of 'fps' and 'timestamps'"),
        ({"frames": frames(2), "fps": 0}, "fps of a video is a number above 0"),
        ({"frames": frames(2), "fps": np.float32("nan")}, "fps of a video is a number above 0"),
        ({"frames": frames(2), "fps": np.True_}, "fps of a video is a number above 0"),
        ({"frames": frames(2), "fps": "2"}, "fps of a video is a number above 0"),
        ({"frames": frames(2), "timestamps": [0]}, "one number of seconds a frame: 2"),
        ({"frames": frames(2), "timestamps": [1, 0]}, "never fall"),
        ([Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))], "frames of a video have one size, got 4x4, 5x4"),
    ],
)
def test_videos_that_are_none(model_config, source, message):
    with pytest.raises(MediaError, match=message):
        open_video(source, model_config)


def test_the_pixel_limit_holds_for_frames_and_files(llava):
    small = ModelConfig(model=llava, max_image_pixels=HEIGHT * WIDTH - 1)
    for given in (frames(1), list(frames(1)), encoded(2)):
        with pytest.raises(MediaError, match="48 x 32 pixels, more than 1535"):
            open_video(given, small)


def test_a_video_s_content_is_its_frames_and_their_times():
    pixels = frames(2)
    hashes = {content_hash(Video(frames=pixels, timestamps=times)) for times in (None, (0.0, 1.0), (0.0, 2.0))}
    hashes.add(content_hash(Video(frames=pixels[::-1])))
    assert len(hashes) == 4
    assert content_hash(Video(frames=pixels.copy())) in hashes
