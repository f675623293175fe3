"""Opening images: every mode and source to upright RGB; what is damaged, too large or not allowed is refused."""

import base64
import io
import struct
import threading
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llava_files
import numpy as np
import pytest
from PIL import Image, ImageOps

from aphrodite_jax.config import ModelConfig
from aphrodite_jax.errors import MediaError
from aphrodite_jax.multimodal import open_image


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return llava_files.write_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def model_config(directory):
    return ModelConfig(model=directory)


def noise(height=4, width=6, channels=3, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def opened(source, model_config) -> np.ndarray:
    image = open_image(source, model_config)
    assert image.mode == "RGB"
    assert type(image) is Image.Image
    return np.asarray(image)


def over_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., 3:].astype(np.float64) / 255
    return np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.int64)


# Modes.


def test_rgb_is_taken_as_it_is_and_copied(model_config):
    array = noise()
    image = Image.fromarray(array)
    result = open_image(image, model_config)
    np.testing.assert_array_equal(np.asarray(result), array)
    result.putpixel((0, 0), (1, 2, 3))
    np.testing.assert_array_equal(np.asarray(image), array)


def test_opening_again_changes_nothing(model_config):
    once = open_image(Image.fromarray(noise(channels=4)), model_config)
    np.testing.assert_array_equal(opened(once, model_config), np.asarray(once))


@pytest.mark.parametrize("source", ["image", "png", "array"])
def test_grey(model_config, source):
    grey = noise(channels=1)[..., 0]
    given = {"image": Image.fromarray(grey), "png": encoded(Image.fromarray(grey)), "array": grey}[source]
    np.testing.assert_array_equal(opened(given, model_config), np.stack([grey] * 3, axis=-1))


@pytest.mark.parametrize("source", ["image", "png", "array"])
def test_rgba_lies_over_white(model_config, source):
    rgba = noise(16, 16, 4)
    rgba[0, :, 3], rgba[1, :, 3] = 0, 255
    given = {"image": Image.fromarray(rgba), "png": encoded(Image.fromarray(rgba)), "array": rgba}[source]
    result = opened(given, model_config)
    assert (result[0] == 255).all()
    np.testing.assert_array_equal(result[1], rgba[1, :, :3])
    np.testing.assert_allclose(result.astype(np.int64), over_white(rgba), atol=1)


def test_grey_with_alpha_lies_over_white(model_config):
    image = Image.merge("LA", [Image.fromarray(noise(8, 8, 1, seed=s)[..., 0]) for s in (1, 2)])
    expected = over_white(np.asarray(image.convert("RGBA")))
    np.testing.assert_allclose(opened(image, model_config).astype(np.int64), expected, atol=1)
    premultiplied = image.convert("La")
    np.testing.assert_allclose(opened(premultiplied, model_config).astype(np.int64), expected, atol=2)


@pytest.mark.parametrize("as_file", [False, True])
def test_palette_with_a_transparent_entry(model_config, as_file):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    given = encoded(image, transparency=1) if as_file else image
    if not as_file:
        image.info["transparency"] = 1
    assert opened(given, model_config).tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_palette_with_an_alpha_for_each_entry(model_config):
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 0, 255, 0, 0, 0])
    image.putpixel((1, 0), 1)
    image.putpixel((2, 0), 2)
    content = encoded(image, transparency=bytes([255, 0, 128]))
    result = opened(content, model_config).astype(np.int64)
    np.testing.assert_allclose(result, [[[255, 0, 0], [255, 255, 255], [127, 127, 127]]], atol=1)


def test_palette_without_transparency(model_config):
    image = Image.fromarray(noise()).quantize(16)
    np.testing.assert_array_equal(opened(encoded(image), model_config), np.asarray(image.convert("RGB")))


def test_a_transparent_colour_of_rgb_and_of_grey(model_config):
    rgb = Image.new("RGB", (2, 1), (9, 8, 7))
    rgb.putpixel((0, 0), (1, 2, 3))
    content = encoded(rgb, transparency=(1, 2, 3))
    assert opened(content, model_config).tolist() == [[[255, 255, 255], [9, 8, 7]]]
    grey = Image.new("L", (2, 1), 9)
    grey.putpixel((0, 0), 4)
    assert opened(encoded(grey, transparency=4), model_config).tolist() == [[[255] * 3, [9] * 3]]


@pytest.mark.parametrize("mode", ["1", "CMYK", "YCbCr", "LAB", "HSV", "RGBX"])
def test_other_modes_are_what_pillow_makes_of_them(model_config, mode):
    rgb = Image.fromarray(noise(8, 8))
    if mode == "LAB":
        image = Image.merge("LAB", [Image.fromarray(noise(8, 8, 1, seed=s)[..., 0]) for s in range(3)])
    else:
        image = rgb.convert(mode)
    np.testing.assert_array_equal(opened(image, model_config), np.asarray(image.convert("RGB")))


def test_a_cmyk_jpeg(model_config):
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    result = opened(encoded(image, "JPEG", quality=95), model_config).astype(np.int64)
    np.testing.assert_allclose(result, np.broadcast_to([255, 0, 0], (16, 16, 3)), atol=6)


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_sixteen_bit_grey_keeps_its_range(model_config, mode):
    values = np.array([[0, 128, 257, 32768, 65535]], np.uint16)
    image = Image.frombytes(mode, (5, 1), values.astype("<u2" if mode == "I;16" else ">u2").tobytes())
    assert opened(image, model_config)[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    if mode == "I;16":
        assert opened(encoded(image), model_config)[0, :, 1].tolist() == [0, 0, 1, 128, 255]


def test_sixteen_bit_colour_files(model_config):
    """Pillow reads these as 8 bits itself."""
    row = b"\0" + struct.pack(">3H", 65535, 32768, 0)
    assert opened(png(1, 1, row, depth=16, colour=2), model_config).tolist() == [[[255, 128, 0]]]


def test_wide_pixels_with_a_known_range(model_config):
    for values, expected in [
        (np.array([[0, 255]], np.int32), [0, 255]),
        (np.array([[0, 65535]], np.int32), [0, 255]),
        (np.array([[0.0, 1.0]], np.float32), [0, 255]),
        (np.array([[0.0, 100.0]], np.float32), [0, 100]),
    ]:
        assert opened(Image.fromarray(values), model_config)[0, :, 2].tolist() == expected


@pytest.mark.parametrize("value", [-1, 65536, -0.5, 256.5, float("nan"), float("inf")])
def test_wide_pixels_without_one(model_config, value):
    dtype = np.int32 if isinstance(value, int) else np.float32
    with pytest.raises(MediaError, match="have no known range; convert them to 8 bits"):
        open_image(Image.fromarray(np.array([[value, 3]], dtype)), model_config)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(model_config, orientation):
    image = Image.fromarray(noise(4, 6))
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(image, exif=exif.tobytes())
    upright = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, -1),
        7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
        8: lambda x: np.rot90(x, 1),
    }[orientation](np.asarray(image))
    np.testing.assert_array_equal(opened(content, model_config), upright)
    with Image.open(io.BytesIO(content)) as given:
        np.testing.assert_array_equal(opened(given, model_config), upright)
        assert given.size == (6, 4)  # the caller's is as it was
    np.testing.assert_array_equal(opened(open_image(content, model_config), model_config), upright)  # not twice


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2, 3)])
def test_any_size_and_aspect(model_config, size):
    image = Image.new("RGB", size, (1, 2, 3))
    assert open_image(encoded(image), model_config).size == size


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_several_is_taken(model_config, kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    content = encoded(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    assert (opened(content, model_config) == [255, 0, 0]).all()


# Sources.


def test_every_source_of_one_image(tmp_path, model_config):
    array = noise()
    content = encoded(Image.fromarray(array))
    path = tmp_path / "a picture, 100%.png"
    path.write_bytes(content)
    data = base64.b64encode(content).decode()
    for source in (
        path,
        str(path),
        path.as_uri(),
        f"file:{path}".replace("%", "%25").replace(" ", "%20"),
        f"file://localhost{path}".replace("%", "%25"),
        f"data:image/png;base64,{data}",
        f"data:;base64,{data}",
        f"DATA:image/png;charset=x;BASE64,{data[:10]}\n {data[10:]}",
        "data:image/png," + "".join(f"%{byte:02x}" for byte in content),
        content,
        bytearray(content),
        memoryview(content),
        array,
        Image.fromarray(array),
    ):
        np.testing.assert_array_equal(opened(source, model_config), array)


def test_an_array_of_another_library(model_config):
    import jax.numpy as jnp

    array = noise()
    np.testing.assert_array_equal(opened(jnp.asarray(array), model_config), array)
    np.testing.assert_array_equal(opened(array[:, ::2], model_config), array[:, ::2])
    np.testing.assert_array_equal(opened(array[..., :1], model_config), array[..., :1].repeat(3, axis=-1))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 3), np.int32),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4), bool),
    ],
)
def test_arrays_that_are_no_image(model_config, array):
    with pytest.raises(MediaError, match=r"an image array is uint8 \[height, width\].*got " + str(array.dtype)):
        open_image(array, model_config)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("http://example.com/cat.png", "nothing is fetched from the network"),
        ("HTTPS://example.com/cat.png", "nothing is fetched from the network"),
        ("ftp://example.com/cat.png", "scheme 'ftp' is not known"),
        ("data:image/png;base64", "has a comma before its content"),
        ("data:image/png;base64,@@@", "the content is no base64"),
        ("data:image/png;base64,AAAA", "is no image file that can be read"),
        ("data:text/plain,hello", "is no image file that can be read"),
        ("file:cat.png", "names a file of this machine, as in file:///pictures/cat.png"),
        ("file://host/cat.png", "names a file of this machine"),
        ("file:///no/such/cat.png", "'/no/such/cat.png' is not a file here"),
        ("no/such/cat.png", "'no/such/cat.png' is not a file here"),
        (Path("no/such/cat.png"), "is not a file here"),
        ("a\0b", "can't read"),
        ("x" * 5000, "can't read|is not a file"),
        ("", "is not a file here"),
        (b"", "is no image file that can be read"),
        (b"GIF89a", "is no image file that can be read"),
        (None, "an image is a Pillow image, a path, a file: or data: URL, bytes or a uint8 array, got NoneType"),
        (3, "got int"),
        ({"url": "x"}, "got dict"),
        ([1, 2], "got list"),
    ],
)
def test_sources_that_are_none(model_config, source, message):
    with pytest.raises(MediaError, match=message) as info:
        open_image(source, model_config)
    assert len(str(info.value)) < 400


def test_a_directory_is_no_file(tmp_path, model_config):
    with pytest.raises(MediaError, match="is not a file here"):
        open_image(tmp_path, model_config)


def test_files_lie_below_media_roots(tmp_path, directory):
    inside, outside = tmp_path / "in" / "deep" / "a.png", tmp_path / "in_not" / "a.png"
    for path in (inside, outside):
        path.parent.mkdir(parents=True)
        path.write_bytes(encoded(Image.new("RGB", (2, 3))))
    link_out, link_in = tmp_path / "in" / "link.png", tmp_path / "in_not" / "link.png"
    link_out.symlink_to(outside)
    link_in.symlink_to(inside)
    allowed = ModelConfig(model=directory, media_roots=[tmp_path / "in"])
    for path in (inside, link_in, tmp_path / "in_not" / ".." / "in" / "deep" / "a.png"):
        assert open_image(path, allowed).size == (2, 3)
        assert open_image(str(path), allowed).size == (2, 3)
        assert open_image(f"file:{path}", allowed).size == (2, 3)
    for path in (outside, link_out, tmp_path / "in" / ".." / "in_not" / "a.png", tmp_path / "in_not" / "missing.png"):
        for source in (path, str(path), f"file://{path}"):
            with pytest.raises(MediaError, match=r"is outside media_roots \(.*/in\)"):
                open_image(source, allowed)
    nothing = ModelConfig(model=directory, media_roots=())
    with pytest.raises(MediaError, match=r"is outside media_roots \(no file may be read\)"):
        open_image(inside, nothing)
    assert open_image(inside.read_bytes(), nothing).size == (2, 3)
    assert open_image(inside, ModelConfig(model=directory)).size == (2, 3)


# Damage and size.


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_truncated_file(model_config, kind):
    content = encoded(Image.fromarray(noise(64, 64)), kind)
    for length in (len(content) // 2, len(content) - len(content) // 4):
        with pytest.raises(MediaError, match=r"is damaged or truncated|is no image file that can be read"):
            open_image(content[:length], model_config)


def test_a_file_of_which_a_byte_changed(model_config):
    content = bytearray(encoded(Image.fromarray(noise(64, 64))))
    content[len(content) // 2] ^= 0xFF
    with pytest.raises(MediaError, match="is damaged or truncated"):
        open_image(bytes(content), model_config)


def png(width: int, height: int, rows: bytes, *, depth: int = 1, colour: int = 0) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(50_000, 50_000), (2**31 - 1, 1), (20_000, 10_000)])
def test_a_decompression_bomb_is_refused_from_its_header(model_config, width, height):
    content = png(width, height, b"\0")
    tracemalloc.start()
    with pytest.raises(MediaError, match=f"has {width} x {height} pixels, more than 178956970"):
        open_image(content, model_config)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_the_limit_is_checked_before_decoding(directory, model_config, monkeypatch):
    content = encoded(Image.fromarray(noise(100, 101)))
    decoded = []
    load = Image.Image.load
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: decoded.append(self.size) or load(self))
    with pytest.raises(
        MediaError, match="has 101 x 100 pixels, more than 10000; scale it down or raise max_image_pixels"
    ):
        open_image(content, ModelConfig(model=directory, max_image_pixels=10_000))
    assert decoded == []


def test_the_limit_is_inclusive_and_holds_for_every_source(directory, tmp_path):
    exact = ModelConfig(model=directory, max_image_pixels=100 * 101)
    less = ModelConfig(model=directory, max_image_pixels=100 * 101 - 1)
    image = Image.fromarray(noise(100, 101))
    path = tmp_path / "a.png"
    image.save(path)
    for source in (image, np.asarray(image), path, path.read_bytes()):
        assert open_image(source, exact).size == (101, 100)
        with pytest.raises(MediaError, match="more than 10099"):
            open_image(source, less)


def test_the_limit_may_be_above_pillows_own(directory, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    content = encoded(Image.new("1", (50, 50)))
    assert open_image(content, ModelConfig(model=directory)).size == (50, 50)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_a_picture_within_an_icon_is_not_decoded(directory):
    """The icon's own header says 16 x 16; Pillow would decode the PNG in it while opening."""
    inner = png(4000, 4000, b"\0" * 501 * 4000)
    icon = struct.pack("<3H4B2H2I", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inner), 22) + inner
    with Image.open(io.BytesIO(encoded(Image.new("RGB", (16, 16)), "ICO"))) as image:
        assert image.format == "ICO"  # so a real one is refused too
    for content in (icon, encoded(Image.new("RGB", (16, 16)), "ICO"), encoded(Image.new("RGB", (16, 16)), "ICNS")):
        with pytest.raises(MediaError, match="convert BLP, EPS, ICNS, ICO, IPTC to PNG"):
            open_image(content, ModelConfig(model=directory, max_image_pixels=1000))


def test_postscript_is_not_run(model_config):
    content = encoded(Image.new("RGB", (4, 4)), "EPS")
    with pytest.raises(MediaError, match="convert BLP, EPS"):
        open_image(content, model_config)


def test_an_image_of_no_pixels(model_config):
    with pytest.raises(MediaError, match="has no pixels"):
        open_image(Image.new("RGB", (0, 4)), model_config)


def test_a_closed_image_is_an_error_of_the_request(tmp_path, model_config):
    path = tmp_path / "a.png"
    Image.fromarray(noise()).save(path)
    image = Image.open(path)
    image.close()
    with pytest.raises(MediaError, match="is damaged or truncated"):
        open_image(image, model_config)


def test_the_rotation_agrees_with_pillow(model_config):
    image = Image.fromarray(noise(5, 7))
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(image, "JPEG", exif=exif.tobytes())
    with Image.open(io.BytesIO(content)) as given:
        expected = np.asarray(ImageOps.exif_transpose(given))
    np.testing.assert_array_equal(opened(content, model_config), expected)


def test_one_opened_file_in_several_threads(model_config, monkeypatch):
    """Pillow reads its pixels when they are wanted first; here that takes a while, and all want them at once."""
    pixels = noise(64, 64)
    image = Image.open(io.BytesIO(encoded(Image.fromarray(pixels))))
    load_prepare = type(image).load_prepare
    monkeypatch.setattr(type(image), "load_prepare", lambda self: time.sleep(0.05) or load_prepare(self))
    start = threading.Barrier(6)

    def opened_with_the_others(_):
        start.wait()
        return np.asarray(open_image(image, model_config))

    with ThreadPoolExecutor(6) as pool:
        for found in pool.map(opened_with_the_others, range(6)):
            np.testing.assert_array_equal(found, pixels)
