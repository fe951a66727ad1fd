"""What a file is, told by its first bytes: a picture of a kind that is read, or something else, with its mend."""

from __future__ import annotations

import codecs
import json
import re
from base64 import b64decode
from binascii import Error as Base64Error
from typing import NamedTuple

LOOKED_AT = 4096
"""Bytes at the beginning that tell what a file is."""

IMAGES = {
    "png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "jpeg": re.compile(rb"\xff\xd8\xff"),
    "gif": re.compile(rb"GIF8[79]a"),
    "webp": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
    "bmp": re.compile(rb"BM.{4}\0{4}", re.DOTALL),
    "tiff": re.compile(rb"(?:II\*\0|MM\0\*)(?!.{4}CR)|II\+\0\x08\0|MM\0\+\0\x08", re.DOTALL),
    "avif": re.compile(rb".{4}ftyp(?:avi[fs]|.{8,40}avi[fs])", re.DOTALL),
    "jp2": re.compile(rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51\0"),
    "vnd.adobe.photoshop": re.compile(rb"8BPS"),
}
"""How files of pictures begin, by the second half of their media type."""

_AGAIN = "download the picture again"
_CONVERT = "convert it to PNG or JPEG"
_DEVELOP = "develop it to PNG or JPEG"
FRAMES = "write the frames you mean as pictures"
_NAME_IT = "name the file of the picture"
_UNPACK = "unpack it and name the picture in it"


class Other(NamedTuple):
    """Something that is no picture, with its article, and what to do about it."""

    what: str
    mend: str


_OTHERS = tuple(
    (re.compile(signature, re.DOTALL), Other(what, mend))
    for signature, what, mend in (
        (rb"version https://git-lfs\.github\.com/", "a Git LFS pointer", "fetch the file itself: git lfs pull"),
        (rb"(?:\.\./)*(?:\.git)?/?annex/objects/", "a git-annex pointer", "fetch the file itself: git annex get"),
        (rb".{4}ftyp(?:he[iv][cxms]|.{8,40}he[iv][cxms])", "a HEIC picture", _CONVERT),
        (rb".{4}ftyp(?:mif1|msf1)", "a HEIF picture", _CONVERT),
        (rb"(?:II\*\0|MM\0\*).{4}CR|.{4}ftypcrx |FUJIFILMCCD-RAW|II(?:RO|RS|U\0)|MMOR|FOVb|\0MRM",
         "a camera's raw file", _DEVELOP),
        (rb".{4}ftypqt|.{4}(?:moov|mdat|wide)", "a QuickTime video", FRAMES),
        (rb".{4}ftypM4A", "a sound", _NAME_IT),
        (rb".{4}ftyp", "an MP4 video", FRAMES),
        (rb"\x1aE\xdf\xa3", "a Matroska or WebM video", FRAMES),
        (rb"RIFF.{4}AVI ", "an AVI video", FRAMES),
        (rb"\0\0\x01[\xba\xb3]|G.{187}G.{187}G", "an MPEG video", FRAMES),
        (rb"FLV\x01|\x30\x26\xb2\x75\x8e\x66\xcf\x11", "a video", FRAMES),
        (rb"OggS", "an Ogg video or sound", FRAMES),
        (rb"RIFF.{4}WAVE|ID3|fLaC|\xff[\xfb\xf3\xf2]", "a sound", _NAME_IT),
        (rb".{0,1000}?%PDF-", "a PDF document", "write the page you mean as PNG"),
        (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript file", _CONVERT),
        (rb"AT&TFORM", "a DjVu document", "write the page you mean as PNG"),
        (rb"\xd7\xcd\xc6\x9a|\x01\0\0\0.{36} EMF", "a Windows metafile", _CONVERT),
        (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL picture", _CONVERT),
        (rb"II\xbc[\0\x01]", "a JPEG XR picture", _CONVERT),
        (rb"gimp xcf", "a GIMP picture", _CONVERT),
        (rb"\x76\x2f\x31\x01|#\?RADIANCE|#\?RGBE", "a high dynamic range picture", _CONVERT),
        (rb".{128}DICM", "a DICOM picture", _CONVERT),
        (rb"PK(?:\x03\x04|\x05\x06)", "a ZIP archive", _UNPACK),
        (rb"\x1f\x8b", "a gzip archive", _UNPACK),
        (rb"BZh|\xfd7zXZ\0|\x28\xb5\x2f\xfd|7z\xbc\xaf\x27\x1c|Rar!\x1a\x07|.{257}ustar", "an archive", _UNPACK),
        (rb"\x93NUMPY", "a NumPy array", "write it as PNG"),
        (rb"PAR1|ARROW1|\x89HDF|SQLite format 3|CDF\x01|GRIB|BUFR", "a file of data", _NAME_IT),
        (rb"\x7fELF|MZ\x90", "a program", _NAME_IT),
        (rb"\x80[\x02-\x05][\x95}\](cK]", "a Python pickle", "write the picture in it as PNG"),
        (rb"\0{16}", "zeros where a picture begins", "copy or download it again"),
    )
)  # fmt: skip
_PROLOGUE = r"<\?xml(?:(?!\?>).)*+\?>\s*+|<!--(?:(?!-->).)*+-->\s*+"
"""What may stand before the first tag; possessive, since many comments could else be split in endless ways."""
_TEXTS = tuple(
    (re.compile(beginning, re.DOTALL | re.IGNORECASE), Other(what, mend))
    for beginning, what, mend in (
        (rf"(?:{_PROLOGUE}|<!doctype svg[^>]*+>\s*+)*+<(?:\w+:)?svg[\s>]", "an SVG drawing", _CONVERT),
        (rf"(?:{_PROLOGUE})*+<(?:!doctype html|html|head|body|script|meta|title|center|h1|p)\b",
         "an HTML page", _AGAIN),
        (r"<\?xml|<\w+[\s>/]", "an XML text, perhaps the error of a server", _AGAIN),
        (r"data:image/", "a text that holds a picture as a data: URL", "write the address itself, or decode it"),
    )
)  # fmt: skip


def image_kind(head: bytes) -> str:
    """The kind of picture that begins so, a key of IMAGES; "" for none of them."""
    return next((kind for kind, signature in IMAGES.items() if signature.match(head)), "")


def other_kind(head: bytes) -> Other | None:
    """What a file is that no decoder takes for a picture, by its first LOOKED_AT bytes; None where it cannot be told.

    A picture of a kind that is read is damaged, and nothing else.
    """
    if image_kind(head):
        return None
    found = next((other for signature, other in _OTHERS if signature.match(head)), None)
    return found or _text_kind(head)


def _text_kind(head: bytes) -> Other | None:
    text = _text_of(head).lstrip("\ufeff \t\r\n")
    if not text:
        return None
    for beginning, other in _TEXTS:
        if beginning.match(text):
            return other
    if is_base64_image(text):
        return Other("a text that holds a picture in base64", "decode it, or write the text itself into the row")
    if text[0] in "{[" and _is_json(text, is_whole=len(head) < LOOKED_AT):
        return Other("a JSON text", _NAME_IT)
    lines = text.splitlines()[:20]
    whole = lines[:-1] if len(head) >= LOOKED_AT else lines
    for separator in ",\t;":
        counts = {line.count(separator) for line in whole}
        if len(whole) > 1 and len(counts) == 1 and min(counts):
            return Other("a table (CSV)", _NAME_IT)
    return Other("a text", _NAME_IT)


def _text_of(head: bytes) -> str:
    """The text that a file begins with; "" where it begins with something else."""
    encodings = ("utf-16",) if head[:2] in (b"\xff\xfe", b"\xfe\xff") else ("utf-8", "latin-1")
    for encoding in encodings:
        try:  # the last character may be cut
            text = codecs.getincrementaldecoder(encoding)().decode(head, final=len(head) < LOOKED_AT)
        except UnicodeDecodeError:
            continue
        return text if all(char.isprintable() or char in "\t\r\n\f\ufeff" for char in text) else ""
    return ""


def _is_json(text: str, *, is_whole: bool) -> bool:
    try:
        json.JSONDecoder().raw_decode(text)
    except RecursionError:
        return True
    except ValueError:
        return not is_whole and bool(re.match(r'\{\s*"|\[\s*[\[{"\d-]', text))
    return True


def is_base64_image(text: str) -> bool:
    """Whether a text begins as the base64 of a picture."""
    start = re.match(r"[A-Za-z0-9+/_\s-]+", text[:96])
    letters = "".join(start[0].split()).translate(URL_SAFE) if start else ""
    try:
        return len(letters) >= 32 and bool(image_kind(b64decode(letters[: len(letters) // 4 * 4])))
    except Base64Error:
        return False


URL_SAFE = str.maketrans("-_", "+/")
"""The two letters of base64's alphabet for addresses, as those of the usual one."""
