"""Pictures, documents, videos and archives as benchmarks ship them."""

from __future__ import annotations

import io
import math
import os
import re
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image

from ..tagging import upright
from .rows import Box

DPI = 144  # of rendered pages, as MMLongBench-Doc has it
MAX_PIXELS = 10**8  # of one rendered page: a page that claims more is broken
LONGEST = 768  # pixels of a frame's longer side: hundreds of frames are in memory at once
GROWTH = 100  # times its own size that an archive may unpack to; pictures hardly shrink, text about tenfold
ENDINGS = re.compile(r"\.(tar|tar\.gz|tgz|zip)$")


def image(data: bytes | os.PathLike) -> Image.Image:
    """An RGB picture from a file or its bytes, upright and on white, as samples are read."""
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as picture:
        return upright(picture)


def pdf_pages(path: Path, most: int) -> list[Image.Image]:
    """At most so many first pages of a PDF, rendered at 144 dpi; ImportError where pypdfium2 is not installed."""
    # here, as one benchmark alone needs it
    try:
        from pypdfium2 import PdfDocument
    except ImportError as error:
        raise ImportError(
            'documents are rendered by pypdfium2: pip install "corehead[benchmarks]"'
        ) from error
    pages = []
    with PdfDocument(path) as document:
        for i in range(min(most, len(document))):
            page = document[i]
            scale = DPI / 72  # a PDF's unit is 1/72 inch
            if page.get_width() * page.get_height() * scale**2 > MAX_PIXELS:
                raise ValueError(f"page {i + 1} is larger than {MAX_PIXELS} pixels")
            pages.append(page.render(scale=scale).to_pil().convert("RGB"))
            page.close()  # or memory grows with the document
    if not pages:
        raise ValueError("it has no pages")
    return pages


@dataclass(frozen=True)
class Video:
    """Frames of a video.

    Attributes
    ----------
    frames : ndarray of uint8, (T, H, W, 3)
        Sampled, and perhaps shrunk.
    indices : tuple of int
        The source's frames that they are, from 0.
    fps : float
        Of the source.
    size : (width, height)
        Of the source.
    total : int
        Frames of the whole source.
    """

    frames: np.ndarray
    indices: tuple[int, ...]
    fps: float
    size: tuple[int, int]
    total: int

    @property
    def part(self) -> dict:
        """The part of a message, its time counted from the first frame."""
        shifted = [i - self.indices[0] for i in self.indices]
        return dict(type="video", video=self.frames, fps=self.fps, frames_indices=shifted)

    @property
    def seconds(self) -> list[float]:
        """When each frame is shown, counted from the first."""
        return [i / self.fps for i in self.part["frames_indices"]]

    def scaled(self, box: Box) -> Box:
        """A box in the source's pixels, in those of `frames`."""
        x, y = self.frames.shape[2] / self.size[0], self.frames.shape[1] / self.size[1]
        return box[0] * x, box[1] * y, box[2] * x, box[3] * y


def sampled(begin: int, end: int, source_fps: float, fps: float, most: int) -> list[int]:
    """Source frames in [begin, end) at `fps`, or evenly spread over it where those are more than `most`."""
    step = max(source_fps / fps, 1.0)  # no frame is taken twice
    count = math.ceil((end - begin) / step)
    if count > most:
        return np.linspace(begin, end - 1, most).round().astype(int).tolist()
    return [begin + int(i * step) for i in range(count)]


def video(
    path: Path, *, fps: float, most: int, segment: tuple[int, int] | None = None
) -> Video:
    """Decode frames of a video.

    Frames are counted as they are decoded from the start, and each must be the one whose packet is due: a decoder that
    drops one would shift all that follow against the annotation.

    Parameters
    ----------
    path : Path
    fps, most : float, int
        Frames a second, and at most how many.
    segment : (begin, end), optional
        Source frames [begin, end), cut to the video's end; None takes all.

    Raises
    ------
    ValueError
        The file is broken or too short; PyAV's errors besides.
    """
    # packets first: they are counted without decoding a frame
    with av.open(str(path)) as container:
        packets = [
            p
            for p in container.demux(container.streams.video[0])
            if p.size and not p.is_discard
        ]
    total = len(packets)
    begin, end = segment or (0, total)
    end = min(end, total)  # annotations count a frame or two more than there are
    if not 0 <= begin < end:
        raise ValueError(f"frames {begin} to {end - 1} are asked for, but it has {total}")
    # in the order in which frames are shown; of no use where stamps are missing or repeat
    stamps = {p.pts for p in packets}
    due = sorted(stamps) if len(stamps) == total and None not in stamps else None
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        rate = float(stream.average_rate or stream.guessed_rate)
        size = stream.width, stream.height
        wanted = sampled(begin, end, rate, fps, most)
        frames = _decoded(container.decode(stream), due, wanted)
    return Video(np.stack(frames), tuple(wanted), rate, size, total)


def _decoded(
    stream: Iterator[av.VideoFrame], due: list[int] | None, wanted: list[int]
) -> list[np.ndarray]:
    """The wanted frames of a stream; `due` are the times of its packets, where they tell frames apart."""
    frames: list[np.ndarray] = []
    # from the first frame on, for a seek lands on some key frame and the count would be lost
    for i, frame in enumerate(stream):
        if frame.is_corrupt or (due and frame.pts != due[i]):
            raise ValueError(f"frame {i} is corrupt, or one before it is missing")
        if i == wanted[len(frames)]:
            shrink = min(1.0, LONGEST / max(frame.width, frame.height))
            width, height = (
                max(1, round(side * shrink)) for side in (frame.width, frame.height)
            )
            # shrunk at once: no two frames are ever held in full size
            frames.append(frame.reformat(width, height, "rgb24").to_ndarray())
        if len(frames) == len(wanted):
            return frames
    raise ValueError(f"only {len(frames)} of {len(wanted)} frames can be decoded")


def unpack(archive: Path) -> Path:
    """Unpack a tar or zip archive beside itself, once; the folder is the archive's name without endings.

    Nothing is written outside that folder, no links out of it or devices are made, and no more than `GROWTH` times the
    archive's size or the free space of the disk is written. The folder appears when all of it is there.

    Raises
    ------
    ValueError
        The archive is broken, or holds what it must not; nothing of it is left.
    """
    folder = archive.with_name(ENDINGS.sub("", archive.name))
    if folder.is_dir():
        return folder
    # under another name until it is whole: a run that was killed leaves no half of a benchmark behind
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    room = min(
        GROWTH * archive.stat().st_size + 2**20, shutil.disk_usage(archive.parent).free
    )

    def fits(size: int) -> None:
        nonlocal room
        room -= size
        if room < 0:
            raise ValueError(
                f"it unpacks to more than {GROWTH} times its size, or than the disk has room for"
            )

    def kept(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
        fits(member.size)  # tar tells sizes one by one, zip all at once
        return tarfile.data_filter(member, path)

    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as entries:
                fits(sum(entry.file_size for entry in entries.infolist()))
            shutil.unpack_archive(archive, part)  # leaves out what would lie outside
        elif hasattr(tarfile, "data_filter"):
            shutil.unpack_archive(archive, part, filter=kept)
        else:
            raise ValueError(
                f"Python before 3.10.12 cannot do it safely: unpack it to {folder} yourself"
            )
    except Exception as error:  # packed streams break in many ways
        shutil.rmtree(part, ignore_errors=True)
        raise ValueError(
            f"the archive {archive} was not unpacked ({error}): download it again"
        ) from error
    part.rename(folder)
    return folder


def unpack_all(folder: Path) -> None:
    """Unpack every archive right in a folder that is not unpacked yet."""
    for archive in sorted(folder.iterdir()):
        if archive.is_file() and ENDINGS.search(archive.name):
            unpack(archive)
