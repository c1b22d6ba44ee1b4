"""safetensors files that can tell whether they are whole: their header holds a hash of what they hold."""
import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

CONTENT = 'content_sha256'


def content_sha256(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        x = tensors[name]
        digest.update(f'{name} {x.dtype} {list(x.shape)}\n'.encode())
        digest.update(x.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def file_sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Write under a temporary name, then rename: the file is either whole or not there. Equal contents, equal bytes."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    # safetensors writes metadata in random order, so the header is completed here: length, JSON, spaces up to 8 bytes.
    data = save(tensors)
    end = 8 + int.from_bytes(data[:8], 'little')
    header = {'__metadata__': {'format': 'pt', CONTENT: content_sha256(tensors), **dict(sorted(metadata.items()))}}
    text = json.dumps(header | json.loads(data[8:end])).encode()
    text += b' ' * (-len(text) % 8)
    part = path.with_name(f'{path.name}.{os.getpid()}.part')
    try:
        with open(part, 'wb') as f:
            f.write(len(text).to_bytes(8, 'little') + text)
            f.write(memoryview(data)[end:])
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def metadata(path: str | Path) -> dict[str, str]:
    with safe_open(str(path), 'pt') as f:
        return f.metadata() or {}


def is_whole(path: str | Path) -> bool:
    """Does the file hold what its header says? A file without such a header is taken as whole."""
    try:
        with safe_open(str(path), 'pt') as f:
            expected = (f.metadata() or {}).get(CONTENT)
            return expected is None or expected == content_sha256({k: f.get_tensor(k) for k in f.keys()})
    except Exception:  # a damaged header raises whatever its bytes lead to
        return False
