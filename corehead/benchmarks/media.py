"""Pictures, documents, videos and archives as benchmarks ship them. Every error names the sample that needed them."""

from __future__ import annotations

import io
import os
import re
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import av
import numpy as np
from PIL import Image

from ..samples import SampleError

DPI = 144  # of rendered pages, as MMLongBench-Doc has it
MOST_PIXELS = 10**8  # of one rendered page: a page that claims more is broken
LONGEST = 768  # pixels of a frame's longer side: hundreds of frames are in memory at once
ENDINGS = re.compile(r"\.(tar|tar\.gz|tgz|zip)$")
GROWTH = 100  # times its own size that an archive may unpack to; pictures hardly shrink, text about tenfold


def image(data: bytes | dict | str | os.PathLike, id: str, where: str) -> Image.Image:
    """An RGB picture from the bytes of a file, a parquet cell ``{"bytes": ..., "path": ...}`` or a path.

    Raises
    ------
    SampleError : it is missing or broken.
    """
    try:
        if isinstance(data, dict):
            data = data["bytes"]
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as picture:
            return picture.convert("RGB")
    except Exception as error:  # decoders raise many kinds; the sample's name must not be lost
        problem = f"the picture cannot be read ({type(error).__name__}: {error})"
        raise SampleError(id, where, problem, "Download it again") from error


def pdf_pages(path: Path, most: int, id: str, where: str) -> list[Image.Image]:
    """The first pages of a PDF, rendered at 144 dpi.

    Parameters
    ----------
    path : the file.
    most : pages to render.
    id, where : sample and field that errors name.

    Raises
    ------
    ImportError : pypdfium2 is not installed.
    SampleError : the file is missing or broken.
    """
    try:
        import pypdfium2
    except ImportError as error:
        raise ImportError('documents are rendered by pypdfium2: pip install "corehead[benchmarks]"') from error
    try:
        document = pypdfium2.PdfDocument(path)
        try:
            pages = []
            for i in range(min(most, len(document))):
                page, scale = document[i], DPI / 72
                if page.get_width() * page.get_height() * scale**2 > MOST_PIXELS:
                    raise ValueError(f"page {i + 1} is larger than {MOST_PIXELS} pixels")
                pages.append(page.render(scale=scale).to_pil().convert("RGB"))
                page.close()
        finally:
            document.close()
    except Exception as error:
        problem = f"{path.name} cannot be rendered ({type(error).__name__}: {error})"
        raise SampleError(id, where, problem, "Download the document again") from error
    if not pages:
        raise SampleError(id, where, f"{path.name} has no pages", "Download the document again")
    return pages


@dataclass(frozen=True)
class Video:
    """Frames of a video.

    Attributes
    ----------
    frames : (T, H, W, 3) uint8, sampled and perhaps shrunk.
    indices : (T,) the source's frames that they are, from 0.
    fps : of the source.
    size : (width, height) of the source.
    """

    frames: np.ndarray
    indices: tuple[int, ...]
    fps: float
    size: tuple[int, int]

    @property
    def part(self) -> dict:
        """The part of a message, its time counted from the first frame."""
        first = self.indices[0]
        return dict(type="video", video=self.frames, fps=self.fps, frames_indices=[i - first for i in self.indices])

    @property
    def seconds(self) -> list[float]:
        """When each frame is shown, counted from the first."""
        return [i / self.fps for i in self.part["frames_indices"]]

    def scaled(self, box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        """A box in the source's pixels, in those of `frames`."""
        x, y = self.frames.shape[2] / self.size[0], self.frames.shape[1] / self.size[1]
        return box[0] * x, box[1] * y, box[2] * x, box[3] * y


def sampled(begin: int, end: int, source_fps: float, fps: float, most: int) -> list[int]:
    """Source frames in [begin, end) at `fps`, or evenly spread over it where those are more than `most`."""
    step = max(source_fps / fps, 1.0)
    count = int(np.ceil((end - begin) / step))
    if count > most:
        return np.linspace(begin, end - 1, most).round().astype(int).tolist()
    return (begin + np.floor(np.arange(count) * step).astype(int)).tolist()


def video(
    path: Path, id: str, where: str, *, fps: float, most: int, segment: tuple[int, int] | None = None
) -> tuple[Video, int]:
    """Decode frames of a video.

    Frames are counted as they are decoded from the start, and each must be the one whose packet is due: a decoder that
    drops one would shift all that follow against the annotation.

    Parameters
    ----------
    path : the file.
    id, where : sample and field that errors name.
    fps, most : frames a second, and at most how many.
    segment : source frames [begin, end), cut to the video's end; None takes all.

    Returns
    -------
    Video, and the number of frames of the whole file.

    Raises
    ------
    SampleError : the file is missing, broken or too short.
    """
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            packets = [p for p in container.demux(stream) if p.size and not p.is_discard]
            stamps = sorted(p.pts for p in packets if p.pts is not None)
            timed = len(set(stamps)) == (total := len(packets))
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            rate = float(stream.average_rate or stream.guessed_rate)
            begin, end = segment or (0, total)
            end = min(end, total)  # annotations count a frame or two more than there are
            if not 0 <= begin < end:
                raise ValueError(f"frames {begin} to {end - 1} are asked for, but it has {total}")
            wanted = sampled(begin, end, rate, fps, most)
            kept, due = [], set(wanted)
            for i, frame in enumerate(container.decode(stream)):
                if frame.is_corrupt or i >= total or (timed and frame.pts != stamps[i]):
                    raise ValueError(f"frame {i} is corrupt, or one before it is missing")
                if i in due:
                    shrink = min(1.0, LONGEST / max(frame.width, frame.height))
                    w, h = (max(1, round(side * shrink)) for side in (frame.width, frame.height))
                    kept.append(frame.reformat(w, h, "rgb24").to_ndarray())
                    size = frame.width, frame.height
                if i == wanted[-1]:
                    break
            if len(kept) < len(wanted):
                raise ValueError(f"only {len(kept)} of {len(wanted)} frames can be decoded")
            return Video(np.stack(kept), tuple(wanted), rate, size), total
    except Exception as error:
        problem = f"the video {path.name} cannot be read ({type(error).__name__}: {error})"
        raise SampleError(id, where, problem, "Download it again") from error


def unpack(archive: Path) -> Path:
    """Unpack a tar or zip archive beside itself, once; the folder is the archive's name without endings.

    Nothing is written outside that folder, no links or devices are made, and no more than `GROWTH` times the archive's
    size or the free space of the disk is written. The folder appears when all of it is there.

    Raises
    ------
    ValueError : the archive is broken, or holds what it must not; nothing of it is left.
    """
    folder = archive.with_name(ENDINGS.sub("", archive.name))
    if folder.is_dir():
        return folder
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    left = min(GROWTH * archive.stat().st_size + 2**20, shutil.disk_usage(part).free)
    try:
        with _Zip(archive) if archive.suffix == ".zip" else tarfile.open(archive) as members:
            for member in members:
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts:
                    raise ValueError(f"{member.name!r} lies outside the archive")
                if not (member.isfile() or member.isdir()):
                    raise ValueError(f"{member.name!r} is a link or a device")
                left -= member.size
                if left < 0:
                    raise ValueError(f"it unpacks to more than {GROWTH} times its size, or than the disk has room for")
                members.extract(member, part, filter="data")
    except Exception as error:  # packed streams break in many ways
        shutil.rmtree(part)
        raise ValueError(f"the archive {archive} was not unpacked ({error}): download it again") from error
    part.rename(folder)
    return folder


class _Zip:
    """A zip archive, read as `tarfile` reads the others."""

    def __init__(self, path: Path):
        self.file = zipfile.ZipFile(path)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        for entry in self.file.infolist():
            member = tarfile.TarInfo(entry.filename)
            member.size, kind = entry.file_size, stat.S_IFMT(entry.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                member.type = tarfile.SYMTYPE
            elif entry.is_dir():
                member.type = tarfile.DIRTYPE
            yield member

    def extract(self, member: tarfile.TarInfo, folder: Path, filter: str) -> None:
        self.file.extract(member.name + "/" * (member.isdir() and not member.name.endswith("/")), folder)


def unpack_all(folder: Path) -> None:
    """Unpack every archive right in a folder that is not unpacked yet."""
    for archive in sorted(folder.iterdir()):
        if archive.is_file() and ENDINGS.search(archive.name):
            unpack(archive)
