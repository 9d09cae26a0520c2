"""Files that are broken, made to do harm, or no pictures: each is drawn, or refused in one clear line, and says nothing
else to anybody."""

from __future__ import annotations

import gzip
import struct
import warnings
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from picture_files import chunk, noise, png, saved
from PIL import Image, ImageFile

from zimage_lite.errors import UserError
from zimage_lite.pictures.canvas import Layout, lay_out
from zimage_lite.pictures.reading import MAX_PIXELS, read

IMAGE = Image.fromarray(noise(64, 48))
KINDS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP")
PNG = saved(IMAGE, "PNG")


def zipped() -> bytes:
    raw = BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        archive.writestr("a.png", PNG)
    return raw.getvalue()


def jpeg_of(width: int, height: int) -> bytes:
    """One that says that it is so large."""
    raw = bytearray(saved(IMAGE, "JPEG"))
    at = raw.index(b"\xff\xc0") + 5
    raw[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(raw)


def gif_of(width: int, height: int) -> bytes:
    raw = saved(IMAGE, "GIF")
    at = raw.index(b",\0\0\0\0") + 5
    return raw[:6] + struct.pack("<HH", width, height) + raw[10:at] + struct.pack("<HH", width, height) + raw[at + 4 :]


def icon_of(picture: bytes) -> bytes:
    """One picture, said to be of 64 x 48."""
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 64, 48, 0, 0, 1, 32, len(picture), 22) + picture


def exif_of(orientation: bytes) -> bytes:
    """The TIFF that EXIF is, with one entry."""
    return b"Exif\0\0MM\0*\0\0\0\x08\0\1" + orientation + bytes(4)


BROKEN = "the picture is broken or cut short ("
LARGE = f"expected at most {MAX_PIXELS // 10**6} million; make it smaller first"
REFUSED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "the file is empty; download it again"),
    "a text": (b"a red fox in the snow\n", "not a picture of a kind that can be read; save it as PNG or JPEG"),
    "a JSON": (b'{"error": "not found"}', "not a picture of a kind"),
    "a page": (b"<!DOCTYPE html><html><title>Sign in</title>", "a web page (a login, or an error) saved"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git LFS pointer"),
    "zeros": (bytes(4096), "its download was never finished"),
    "ones": (b"\xff" * 4096, "not a picture of a kind"),
    "a zip": (zipped(), "a zip archive, or a project of Krita's; unpack it, or export it as PNG or JPEG"),
    "a gzip": (gzip.compress(PNG), "a gzip archive; unpack it"),
    "a PDF": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a PDF document; export it as PNG or JPEG"),
    "an SVG": (b'<?xml version="1.0"?>\n<svg width="9" height="9"/>', "an SVG drawing"),
    "an EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "an EPS drawing"),
    "a HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "a HEIC, AVIF or raw photo, which this Pillow"),
    "a CR3": (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom" + bytes(99), "a HEIC, AVIF or raw photo"),
    "a JPEG XL": (b"\xff\x0a" + bytes(range(99)), "a JPEG XL picture; export it"),
    "an MP4": (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41", "a video; save one of its frames as PNG"),
    "a Matroska": (b"\x1aE\xdf\xa3\x01\0\0\0\0\0\0\x1f", "a video"),
    "a GIMP": (b"gimp xcf v011\0" + bytes(50), "a project of GIMP's"),
    "weights": (struct.pack("<Q", 64) + b'{"a":{"dtype":"F32"}}'.ljust(64), "a file of weights; name a picture"),
    "a GGUF": (b"GGUF\3\0\0\0" + bytes(50), "a file of weights"),
    "an MPEG": (bytes.fromhex("000001b3") + bytes([20, 0, 240]) + bytes(99), BROKEN),
    "a PNG of four billion": (png(65000, 65000, 8, 2, b""), f"too large: got more pixels than Pillow takes, {LARGE}"),
    "a PNG of 101 million": (png(10100, 10000, 8, 2, b""), f"too large: got 10100 x 10000 pixels, {LARGE}"),
    "a JPEG of four billion": (jpeg_of(65000, 65000), LARGE),
    "a JPEG of 110 million": (jpeg_of(11000, 10000), f"got 11000 x 10000 pixels, {LARGE}"),
    "a GIF of four billion": (gif_of(65535, 65535), LARGE),
    "a PPM of a million each way": (b"P6 1000000 1000000 255\n", LARGE),
    "an icon with a bomb": (icon_of(png(20000, 20000, 8, 6, b"")), LARGE),
    "a PNG of no width": (png(0, 8, 8, 2, b""), "not a picture of a kind"),
    "a PNG with nothing in it": (png(64, 48, 8, 2, b""), BROKEN),
    "a text chunk that unpacks to 10 MB": (
        png(8, 8, 8, 0, bytes(72), chunk(b"zTXt", b"a\0\0" + gzip.zlib.compress(bytes(10**7)))), BROKEN,
    ),
    "a PNG with a wrong sum": (PNG[:20] + b"\1" + PNG[21:], ""),
    "a PNG with zeros in its middle": (PNG[:900] + bytes(99) + PNG[999:], BROKEN),
    "a BMP of negative width": (saved(IMAGE, "BMP")[:18] + struct.pack("<i", -64) + saved(IMAGE, "BMP")[22:], ""),
    "a TIFF whose directory is elsewhere": (b"II*\0" + struct.pack("<I", 10**9), ""),
    "a TIFF of 57,347 samples": (
        b"II*\0\x08\0\0\0" + struct.pack("<H", 5) + b"".join(
            struct.pack("<HHII", tag, 4, 1, value)
            for tag, value in ((256, 8), (257, 8), (258, 8), (262, 2), (277, 57347))
        ) + bytes(4),
        "",
    ),
    **{f"half a {kind}": (saved(IMAGE, kind)[: len(saved(IMAGE, kind)) // 2], BROKEN) for kind in KINDS},
    **{f"the first 30 bytes of a {kind}": (saved(IMAGE, kind)[:30], "") for kind in KINDS},
}  # fmt: skip

DRAWN: dict[str, bytes] = {
    "CMYK": saved(IMAGE.convert("CMYK"), "JPEG"),
    "two colours": saved(IMAGE.convert("1"), "TIFF", compression="group4"),
    "a palette": saved(IMAGE.convert("P"), "PNG"),
    "animated": saved(IMAGE, "GIF", save_all=True, append_images=[IMAGE.rotate(90)] * 3),
    "EXIF of nonsense": saved(IMAGE, "JPEG", exif=b"Exif\0\0" + bytes(range(200))),
    "EXIF of nothing": saved(IMAGE, "JPEG", exif=b"Exif\0\0"),
    "an orientation of 77": saved(IMAGE, "JPEG", exif=exif_of(struct.pack(">HHIHH", 0x112, 3, 1, 77, 0))),
    "an orientation in letters": saved(IMAGE, "JPEG", exif=exif_of(struct.pack(">HHI4s", 0x112, 2, 4, b"up!\0"))),
    "two orientations": saved(IMAGE, "JPEG", exif=exif_of(struct.pack(">HHIHH", 0x112, 3, 2, 6, 3))),
    "a profile of nonsense": saved(IMAGE, "JPEG", icc_profile=bytes(range(256)) * 9),
    "something behind it": PNG + b"<html>" * 99,
    "chunks that nobody knows": png(16, 16, 8, 0, bytes(272), chunk(b"abCd", b"x" * 999)),
    "rows without end": png(16, 16, 8, 2, bytes(10**7)),
    "an icon": icon_of(PNG),
}


@pytest.fixture(autouse=True)
def _silent(capfd: pytest.CaptureFixture[str]) -> object:
    """Neither warnings nor lines, and Pillow's own settings as they were."""
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case: str, tmp_path: Path) -> None:
    raw, message = REFUSED[case]
    path = tmp_path / "a.png"
    path.write_bytes(raw)
    for source, name in ((path, str(path)), (raw, "the picture")):
        with pytest.raises(UserError) as raised:
            read(source)
        line = str(raised.value)
        assert line.startswith(f"{name}: ") and message in line and "\n" not in line and len(line) < len(name) + 200


@pytest.mark.parametrize("case", DRAWN)
def test_drawn(case: str) -> None:
    found = read(DRAWN[case])
    canvas = lay_out(found, None, Layout(), (64, 64))
    assert canvas.given().shape == (*canvas.size[::-1], 3) and found.alpha is None


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".gif", ".txt", ".safetensors", ""])
def test_a_wrong_name_is_no_matter(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(PNG)
    assert np.array_equal(read(path).rgb, np.asarray(IMAGE))


@pytest.mark.parametrize("size", [(1, 1), (30000, 1), (1, 30000)])
def test_shapes_that_cannot_be_drawn(size: tuple[int, int]) -> None:
    found = read(saved(Image.new("RGB", size), "PNG"), name="a.png")
    assert found.size == size
    with pytest.raises(UserError, match=r"^a\.png: pixels to draw: got .* expected at least 16 each way; crop it"):
        lay_out(found, None, Layout(), (1024, 1024))


def test_paths(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "link")
    for path, message in (
        (tmp_path, "this is a folder; name a picture in it"),
        (tmp_path / "none.png", "no such file"),
        ("https://example.com/a/cat.png", "this is an address; download the file and name it by its path"),
        ("https://huggingface.co/a/b/resolve/main/cat.png", "the address of a file; download it"),
        (f"{tmp_path}/a\0.png", "cannot be read (embedded null byte)"),
        (tmp_path / ("x" * 300), "cannot be read (File name too long)"),
        (tmp_path / "link", "cannot be read ("),
        (tmp_path / "no\n\x1b[31m.png", "no such file"),
        ("", "a picture without a name"),
    ):
        with pytest.raises(UserError) as raised:
            read(path)
        assert message in str(raised.value) and str(raised.value).isprintable()


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_changed_by_lot(kind: str) -> None:
    """Whatever it is then: a picture, or one line."""
    rng, raw = np.random.default_rng(5), np.frombuffer(saved(Image.fromarray(noise(16, 12)), kind), np.uint8)
    refused = 0
    for _ in range(60):
        changed = raw.copy()
        places = rng.integers(0, (len(raw), 60)[int(rng.integers(2))], 3)
        changed[places] = rng.integers(0, 256, 3)
        try:
            assert read(changed.tobytes()).rgb.ndim == 3
        except UserError as error:
            refused += 1
            assert str(error).startswith("the picture: ")
    assert 0 < refused < 60


def test_a_picture_of_pillows_that_was_closed() -> None:
    image = Image.open(BytesIO(PNG))
    image.close()
    with pytest.raises(UserError, match=r"^the picture: the picture is broken or cut short"):
        read(image)
