"""Files of other libraries, read without trust: what they are, and tensors and JSON out of them, within limits."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carla_digr.errors import UserError
from carla_digr.files import WEIGHTS_BYTES, read_regular

FILE_BYTES = WEIGHTS_BYTES  # of the largest file, and of what the entries of an archive come to together
JSON_BYTES = 256 << 20  # of stable-baselines3's "data" and of an exported program
ARCHIVE_ENTRIES = 100_000
TENSORS = 10_000
MODEL_NAMES = ("state_dict", "model_state_dict", "model", "policy", "agent", "network", "actor_critic", "q_network")
SAFE = "save model.state_dict() with torch.save, or export the network with torch.export.save or torch.onnx.export"


def read(file: Path) -> bytes:
    """A regular file's content.

    Raises:
        UserError: it cannot be read, is no regular file or is too large.
    """
    try:
        return read_regular(file, FILE_BYTES)
    except OSError as error:
        raise UserError(f"Cannot read {file}: {error.strerror}; give the file of a policy's weights.") from error


def sha256(data: bytes) -> str:
    """64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def load(file: Path, data: bytes) -> Any:
    """What torch.save has written, tensors and plain values alone.

    Raises:
        UserError: it is damaged or holds other Python objects, which would have to be run to be loaded.
    """
    if data[:4] == b"PK\x03\x04":
        Archive(file, data).check()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle's protocol
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" not in str(error):
            raise UserError(
                f"{file} is damaged or no file of torch.save, and other pickles are never loaded: copy it again, or "
                f"{SAFE}."
            ) from error
        raise UserError(
            f"{file} holds Python objects besides tensors, which are never unpickled here: in the program that made "
            f"it, {SAFE}."
        ) from error
    except Exception as error:  # torch raises many kinds on damaged data
        raise UserError(f"{file} is damaged or no file of torch.save; copy or save it again.") from error


def tensors_of(value: Any, file: Path) -> dict[str, Tensor]:
    """The state dict in what torch.save has written: the whole, or the only one in it.

    Raises:
        UserError: there is none, or several.
    """
    found = dict(_state_dicts(value, "", 3))
    if not found:
        raise UserError(f"{file} holds no state dict of tensors; {SAFE}.")
    chosen = found.get("")
    if chosen is None:
        # Of several, one whose name says that it is the model's.
        models = [name for name in found if name.split(".")[-1] in MODEL_NAMES] or list(found)
        if len(models) > 1:
            raise UserError(f"{file} holds several state dicts ({', '.join(models)}); save the policy's alone.")
        chosen = found[models[0]]
    if len(chosen) > TENSORS:
        raise UserError(f"{file} holds {len(chosen)} tensors, more than {TENSORS}; give a policy's weights alone.")
    if sum(tensor.numel() * tensor.element_size() for tensor in chosen.values()) > FILE_BYTES:  # as by strides of 0
        raise UserError(f"{file} unpacks to more than {FILE_BYTES >> 30} GiB; it is not read.")
    return {name: tensor.detach().float() if tensor.is_floating_point() else tensor for name, tensor in chosen.items()}


def _state_dicts(value: Any, name: str, depth: int) -> list[tuple[str, dict[str, Tensor]]]:
    if not isinstance(value, dict) or not depth:
        return []
    tensors = {
        key: item
        for key, item in value.items()
        if isinstance(key, str) and isinstance(item, Tensor) and item.layout == torch.strided and not item.is_quantized
    }
    if tensors:
        return [(name, tensors)]
    inner = [(f"{name}.{key}".lstrip("."), item) for key, item in value.items() if isinstance(key, str)]
    return [pair for path, item in inner for pair in _state_dicts(item, path, depth - 1)]


class Archive:
    """A zip archive in memory.

    Args:
        file: its name in errors.
        data: its content.

    Raises:
        UserError: it is damaged, or its entries come to more than FILE_BYTES.
    """

    def __init__(self, file: Path, data: bytes):
        self.file = file
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
            entries = self._zip.infolist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
            raise UserError(f"{file} is a damaged archive; copy or save it again.") from error
        if len(entries) > ARCHIVE_ENTRIES or sum(entry.file_size for entry in entries) > FILE_BYTES:
            raise UserError(
                f"{file} unpacks to more than {FILE_BYTES >> 30} GiB or {ARCHIVE_ENTRIES} entries; it is not read."
            )
        self.names = [entry.filename for entry in entries]

    def check(self) -> None:
        """Hold every entry against its checksum, which torch's own reader does not.

        Raises:
            UserError: one is damaged.
        """
        for name in self.names:
            self.read(name)

    def read(self, name: str, limit: int = FILE_BYTES) -> bytes:
        """An entry.

        Raises:
            UserError: there is none, or it is damaged or larger than ``limit`` bytes.
        """
        try:
            entry = self._zip.getinfo(name)
        except KeyError as error:
            raise UserError(f"{self.file} lacks the entry {name}; copy or save it again.") from error
        if entry.file_size > limit:
            raise UserError(f"{self.file}: its entry {name} is larger than {limit} bytes; it is not read.")
        try:
            return self._zip.read(entry)
        except Exception as error:  # zipfile and what unpacks for it raise many kinds
            raise UserError(f"{self.file}: its entry {name} is damaged; copy or save it again.") from error

    def json(self, name: str) -> dict[str, Any]:
        """An entry that is a JSON object.

        Raises:
            UserError: it is not.
        """
        try:
            value = json.loads(self.read(name, JSON_BYTES))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.file}: its entry {name} is not valid JSON; copy or save it again.") from error
        if not isinstance(value, dict):
            raise UserError(f"{self.file}: its entry {name} is not a JSON object; copy or save it again.")
        return value
