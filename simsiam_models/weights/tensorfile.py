"""safetensors files that can be checked for damage: their header holds a hash of their contents."""
import hashlib
import json
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..runtime.files import write_atomically

MODEL, HEADS, CONFIG = 'model.safetensors', 'heads.safetensors', 'config.json'  # the files of an exported folder
CONTENT = 'content_sha256'
# In the header of weights that were trained on BGR pixels: conv1 takes RGB now. A file without it must not be used.
CHANNELS, REVERSED = 'channels', 'RGB, reversed from BGR'


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """Returns the SHA-256 over names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        x = tensors[name]
        digest.update(f'{name} {x.dtype} {list(x.shape)}\n'.encode())
        digest.update(x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def find_nonfinite(tensors: dict[str, Tensor]) -> list[str]:
    """Returns the names of the tensors that hold NaN or infinity."""
    return [k for k, v in tensors.items() if not v.isfinite().all()]


def hash_file(path: str | Path) -> str:
    """Returns the SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Writes the file atomically. Equal tensors and metadata give equal bytes."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    # safetensors writes metadata in random order, so the header is completed here: length, JSON, spaces up to 8 bytes.
    data = save(tensors)
    end = 8 + int.from_bytes(data[:8], 'little')
    header = {'__metadata__': {'format': 'pt', CONTENT: hash_tensors(tensors), **dict(sorted(metadata.items()))}}
    text = json.dumps(header | json.loads(data[8:end])).encode()
    text += b' ' * (-len(text) % 8)

    def write_parts(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, 'little') + text)
        file.write(memoryview(data)[end:])

    write_atomically(path, write_parts, shared=True)


def read_metadata(path: str | Path) -> dict[str, str]:
    """Returns the strings in the header; an empty dictionary if there are none, or if it is no safetensors file."""
    try:
        with safe_open(str(path), 'pt') as f:
            return f.metadata() or {}
    except SafetensorError:
        return {}


def is_whole(path: str | Path) -> bool:
    """Returns whether the contents match the hash in the header; a file without a hash needs only a valid header.

    Raises OSError if the file cannot be read, which says nothing about its contents.
    """
    with open(path, 'rb'):  # safetensors reports every failure to open a file as "No such file"
        pass
    try:
        with safe_open(str(path), 'pt') as f:
            expected = (f.metadata() or {}).get(CONTENT)
            return expected is None or expected == hash_tensors({k: f.get_tensor(k) for k in f.keys()})
    except SafetensorError:
        return False


def check_whole(path: Path) -> None:
    """Raises ValueError if the contents of a safetensors file do not match its header."""
    if not is_whole(path):
        raise ValueError(f'{path}: it is damaged or was cut off; copy or export it again')
