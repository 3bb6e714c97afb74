"""`carla-digr explain` of pictures that are no recording: a folder of PNG and JPEG files, an .npz, a video.

Each frame's overlay is written when it is made, so the command goes on where it was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from carla_digr import __version__
from carla_digr.errors import UserError
from carla_digr.explainer import Explainer
from carla_digr.files import atomic_write, exclusive, read_regular
from carla_digr.images import MAX_PIXELS, Crop, decompressed
from carla_digr.saliency.overlay import overlay

PICTURES = (".png", ".jpg", ".jpeg")
VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".ogv", ".mpg", ".mpeg", ".wmv", ".gif")
MAX_FRAMES = 100_000
LINES_BYTES = 1 << 30  # of what was decided in MAX_FRAMES frames
MAX_FILE_BYTES = 1 << 28  # of one picture's file
MAPS, LINES = "maps.raw", "frames.jsonl"  # while they are being made


class Source(NamedTuple):
    """Frames to explain.

    ``total`` is how many there are, None if the file does not say. ``frames`` iterates over names and functions that
    load the frame, uint8 (H, W, C), or raise ValueError if it is damaged; each is to be called, if at all, before the
    next one is taken. ``state`` changes when the files do.
    """

    total: int | None
    frames: Callable[[], Iterator[tuple[str, Callable[[], NDArray[np.uint8]]]]]
    state: str


class Explained(NamedTuple):
    """What `explain_frames` has done.

    ``frames`` with a map, ``resumed`` of them from an interrupted command; frames that were ``refused``, by reason.
    """

    frames: int
    resumed: int
    refused: Counter[str]


def is_frames(path: Path) -> bool:
    """Whether `source` reads it, by its name; otherwise it may be a recording."""
    if path.is_dir():
        names = [entry.name for entry in path.iterdir()]
        return "metadata.yaml" not in names and any(Path(name).suffix.lower() in PICTURES for name in names)
    return path.suffix.lower() in (".npz", *VIDEOS)


def explain_frames(path: Path, out: Path, explainer: Explainer, crop: Crop | None = None) -> Explained:
    """Explain consecutive frames: one overlay a frame, all maps in one file, and what was decided.

    ``out`` gets for each frame ``NAME.png``; ``maps.npz`` with ``maps`` float16 (N, H, W) in [0, 1] and ``names`` (N,);
    and ``explained.json`` with policy, method, target and each frame's action, probabilities and value. A frame that
    cannot be read, or is not of the policy's size, is left out and counted. The maps are the live drive's.

    Args:
        path: a folder of PNG and JPEG files, in the order of their names (2 before 10); an .npz with ``frames`` uint8
            (N, H, W, C); or a video.
        out: a directory, which appears once it is complete.
        explainer: the policy and the method.
        crop: the part of each frame that is explained; None: all of it.

    Raises:
        UserError: there is nothing to explain, or ``out`` exists or cannot be written.
    """
    if out.exists():
        raise UserError(f"{out} exists already: choose another name for the maps.")
    frames = source(path)
    hidden, keep = out.with_name(f".{out.name}.tmp"), True
    with ExitStack() as held:
        try:
            taken = f"Another command is making {out}: wait for it or choose another name."
            held.enter_context(exclusive(hidden, taken))
        except OSError as error:
            raise UserError(f"Cannot make {out}: {error.strerror or error}.") from error
        try:
            done = _Work(path, frames, hidden / "maps", explainer, crop).run()
            (hidden / "maps").rename(out)
            keep = False
        except OSError as error:
            raise UserError(f"Cannot write {out}: {error.strerror or error}.") from error
        except UserError:
            keep = False
            raise
        finally:
            if not keep:
                shutil.rmtree(hidden, ignore_errors=True)
    return done


class _Work:
    """Writes the new directory."""

    def __init__(self, path: Path, frames: Source, directory: Path, explainer: Explainer, crop: Crop | None):
        self._crop = crop
        self._path, self._source, self._directory, self._explainer = path, frames, directory, explainer
        self._header = {
            "input": path.name,
            "policy": explainer.policy_hash,
            "method": explainer.method,
            "target": explainer.target_name or None,
            "action_names": list(explainer.action_names),
            "resized": explainer.resize,
            **({"crop": str(crop)} if crop else {}),
            "version": __version__,
        }
        self._bytes = 2 * math.prod(explainer.image_shape[:2])  # of one map, float16

    def run(self) -> Explained:
        first = json.dumps({**self._header, "state": self._source.state})
        self._directory.mkdir(exist_ok=True)
        lines = self._earlier(first)
        resumed = sum("refused" not in line for line in lines)
        reason = next((line["refused"] for line in lines if "refused" in line), "it has none")
        with (
            (self._directory / LINES).open("a") as table,
            (self._directory / MAPS).open("ab") as maps,
            tqdm(
                total=self._source.total, initial=len(lines), unit="frame", desc=self._explainer.method, mininterval=1
            ) as progress,
        ):
            if not table.tell():
                table.write(first + "\n")
            for number, (name, load) in enumerate(self._source.frames()):
                if max(number + 1, self._source.total or 0) > MAX_FRAMES:
                    raise UserError(f"{self._path} has more than {MAX_FRAMES} frames: explain it in parts.")
                if number < len(lines):
                    self._pass_by(lines[number], load)
                    continue
                line = self._explain(name, load, maps)
                reason = line.get("refused", reason)
                maps.flush()
                table.write(json.dumps(line) + "\n")  # last: what it names is there
                table.flush()
                lines.append(line)
                progress.update()
        explained = [line for line in lines if "refused" not in line]
        if not explained:
            raise UserError(f"No frame of {self._path} could be explained: {reason.rstrip('.')}.")
        self._finish(lines, [line["name"] for line in explained])
        return Explained(len(explained), resumed, Counter(line["refused"] for line in lines if "refused" in line))

    def _earlier(self, first: str) -> list[dict[str, Any]]:
        """The lines of an interrupted command for the same frames, policy and method; else none, and no old files."""
        table, maps = self._directory / LINES, self._directory / MAPS
        whole = read_regular(table, LINES_BYTES).split(b"\n")[:-1] if table.exists() and maps.exists() else []
        try:
            lines = [json.loads(line) for line in whole[1:]]
        except (ValueError, RecursionError):
            whole = []
        size = self._bytes * sum("refused" not in line for line in lines) if whole else 0
        if not whole or whole[0].decode() != first or maps.stat().st_size < size:
            shutil.rmtree(self._directory)
            self._directory.mkdir()
            return []
        with table.open("r+b") as file:  # what was being written when it was killed is written again
            file.truncate(sum(len(line) + 1 for line in whole))
        with maps.open("r+b") as file:
            file.truncate(size)
        return lines

    def _pass_by(self, line: dict[str, Any], load: Callable[[], NDArray[np.uint8]]) -> None:
        """A frame that is done already; a policy that decides on several frames sees it all the same."""
        if "refused" not in line and not self._explainer.single:
            self._explainer.decide(self._cropped(load()))

    def _cropped(self, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return self._crop.of(frame) if self._crop else frame

    def _explain(self, name: str, load: Callable[[], NDArray[np.uint8]], maps: IO[bytes]) -> dict[str, Any]:
        """One frame's line; its overlay and its map are written."""
        try:
            frame = self._cropped(load())
            decision = self._explainer.decide(frame)
        except (ValueError, UserError) as error:
            return {"name": name, "refused": str(error)}
        saliency = self._explainer.explain(decision).map
        mixed = overlay(self._explainer.fitted(frame), saliency)
        with atomic_write(self._directory / f"{name}.png") as file:
            file.write(cv2.imencode(".png", mixed[..., ::-1])[1].tobytes())
        maps.write(saliency.astype(np.float16).tobytes())
        line: dict[str, Any] = {"name": name}
        if self._explainer.discrete:
            line["action"] = self._explainer.action_names[decision.action]
            line["probabilities"] = numbers(decision.probabilities)
        else:
            line["outputs"] = numbers(decision.outputs)
        [line["value"]] = numbers(np.array([decision.value], np.float32))
        return line

    def _finish(self, lines: list[dict[str, Any]], names: list[str]) -> None:
        """`maps.npz` and `explained.json` in place of what they were collected in."""
        height, width, _ = self._explainer.image_shape
        header = {"descr": "<f2", "fortran_order": False, "shape": (len(names), height, width)}
        raw = self._directory / MAPS
        with atomic_write(self._directory / "maps.npz") as file, zipfile.ZipFile(file, "w") as archive:
            with archive.open("maps.npy", "w", force_zip64=True) as array, raw.open("rb") as maps:
                np.lib.format.write_array_header_1_0(array, header)
                shutil.copyfileobj(maps, array, 1 << 20)
            with archive.open("names.npy", "w") as array:
                np.lib.format.write_array(array, np.array(names))
        with atomic_write(self._directory / "explained.json") as file:
            file.write((json.dumps({**self._header, "frames": lines}, indent=1) + "\n").encode())
        raw.unlink()
        (self._directory / LINES).unlink()


def numbers(values: NDArray[np.float32]) -> list[float | None]:
    """Values for JSON, which knows no NaN."""
    return [value if math.isfinite(value) else None for value in values.tolist()]


# --- where frames come from ---


def source(path: Path) -> Source:
    """The frames at a path.

    Raises:
        UserError: there are none, or the file is damaged or not of its kind.
    """
    if not path.exists():
        raise UserError(f"Cannot read {path}: No such file or directory.")
    if path.is_dir():
        return _folder(path)
    return _array(path) if path.suffix.lower() == ".npz" else _video(path)


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts frame2 before frame10."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts]


def _folder(path: Path) -> Source:
    pictures = [file for file in path.iterdir() if file.suffix.lower() in PICTURES and file.is_file()]
    files = sorted(pictures, key=lambda file: natural(file.name))
    if not files:
        raise UserError(f"{path} has no PNG or JPEG files.")
    stems = Counter(file.stem for file in files)

    def load(file: Path) -> NDArray[np.uint8]:
        try:
            with file.open("rb") as opened:
                data = opened.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise ValueError(f"Cannot read {file}: {error.strerror}.") from error
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"{file.name} is larger than {MAX_FILE_BYTES >> 20} MiB.")
        try:
            return decompressed(data)
        except (ValueError, cv2.error) as error:
            raise ValueError(f"{file.name} is no picture that can be read ({error}).") from error

    def frames() -> Iterator[tuple[str, Callable[[], NDArray[np.uint8]]]]:
        for file in files:
            yield file.stem if stems[file.stem] == 1 else file.name, lambda file=file: load(file)  # type: ignore[misc]

    return Source(len(files), frames, _state(*files))


def _array(path: Path) -> Source:
    """The array is read frame by frame: it may be larger than the memory."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("frames.npy") as file:
            shape, fortran, dtype = _array_header(file)
    except KeyError as error:
        raise UserError(f"{path} has no array 'frames': save it with numpy.savez(path, frames=frames).") from error
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"Cannot read {path} as a NumPy .npz file: {str(error).rstrip('.')}.") from error
    if dtype != np.uint8 or fortran or len(shape) not in (3, 4) or not all(shape):
        order = " in Fortran's order" if fortran else ""
        raise UserError(f"{path}: frames must be uint8 (N, H, W, C) or (N, H, W), not {dtype} {shape}{order}.")
    if math.prod(shape[1:]) > 4 * MAX_PIXELS:
        raise UserError(f"{path}: frames of {' x '.join(map(str, shape[1:]))} are too large.")

    def frames() -> Iterator[tuple[str, Callable[[], NDArray[np.uint8]]]]:
        try:
            with zipfile.ZipFile(path) as archive, archive.open("frames.npy") as file:
                _array_header(file)
                for number in range(shape[0]):
                    data = file.read(math.prod(shape[1:]))
                    if len(data) < math.prod(shape[1:]):
                        raise zipfile.BadZipFile(f"it ends at frame {number}")
                    frame = np.frombuffer(data, np.uint8).reshape(shape[1:])
                    yield f"{number:06}", lambda frame=frame: frame  # type: ignore[misc]
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise UserError(f"{path} is damaged: {str(error).rstrip('.')}.") from error

    return Source(shape[0], frames, _state(path))


def _array_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran's order and type of the array that follows.

    Raises:
        ValueError: it is no such header.
    """
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def _video(path: Path) -> Source:
    def opened() -> cv2.VideoCapture:
        video = cv2.VideoCapture(str(path))
        if not video.isOpened() or not video.grab():
            raise UserError(f"Cannot read {path} as a video: it is damaged or of a kind that OpenCV does not know.")
        return video

    video = opened()
    count, pixels = int(video.get(cv2.CAP_PROP_FRAME_COUNT)), math.prod(video.retrieve()[1].shape[:2])
    video.release()
    if pixels > MAX_PIXELS:
        raise UserError(f"The frames of {path} are too large.")

    def frames() -> Iterator[tuple[str, Callable[[], NDArray[np.uint8]]]]:
        video = opened()  # and at its first frame
        try:
            number = 0
            while not number or video.grab():
                yield f"{number:06}", lambda: _retrieved(video)
                number += 1
        finally:
            video.release()

    return Source(count if 0 < count <= MAX_FRAMES else None, frames, _state(path))


def _retrieved(video: cv2.VideoCapture) -> NDArray[np.uint8]:
    whole, frame = video.retrieve()
    if not whole:
        raise ValueError("the frame is damaged.")
    return np.ascontiguousarray(frame[..., ::-1], np.uint8)


def _state(*files: Path) -> str:
    """A hash of names, sizes and times of change."""
    digest = hashlib.sha256()
    for file in files:
        facts = file.stat()
        digest.update(f"{file.name}/{facts.st_size}/{facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()
