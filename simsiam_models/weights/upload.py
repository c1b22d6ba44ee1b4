"""Uploads a repository's files to the Hub, and pins those of published tags."""
import json
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_hf_file_metadata, get_token, hf_hub_url

from ..runtime.files import write_json
from ..runtime.messages import one_line
from . import sources, tensorfile
from .history import TRAINING
from .published import WEIGHTS
from .tensorfile import CONFIG, HEADS, MODEL
from .verify import FINGERPRINT

CARD = 'README.md'


def check_token() -> None:
    if get_token() is None:
        raise RuntimeError('no Hugging Face token: run `hf auth login` or set HF_TOKEN (--dry-run FOLDER needs none)')


def is_published(name: str) -> bool:
    """Returns whether the Hub has every pinned file of a tag. It states the SHA-256 of large files only."""
    if not sources.is_pinned(name):
        return False
    pin = sources.read_pin(name)
    for file, sha256 in pin['files'].items():
        try:
            stated = get_hf_file_metadata(hf_hub_url(pin['repo'], file, revision=pin['revision'])).etag or ''
        except Exception:  # requests in huggingface_hub 0.36, httpx in 1.x and 2.x: no common base class
            return False
        if file == MODEL and stated != sha256 or len(stated) == len(sha256) and stated != sha256:
            return False
    return True


def upload(folder: Path, tag: str | None, repo: str, private: bool = False) -> list[str]:
    """Creates the repository if there is none, uploads the files, and returns what was done.

    Raises RuntimeError if the upload fails, or if the repository is public although `private` is set.
    """
    names = [name for name in (CARD, CONFIG, FINGERPRINT, TRAINING, MODEL, HEADS) if (folder / name).exists()]
    try:
        api = HfApi()
        api.create_repo(repo, exist_ok=True, private=private or None)
        if private and not api.model_info(repo).private:  # it was there before
            raise RuntimeError(f'--private: {repo} is public; make it private on the Hub first, or name another one')
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=names, commit_message='Upload weights and card')
    except Exception as e:  # requests in huggingface_hub 0.36, httpx in 1.x and 2.x: no common base class
        reason = one_line(e if type(e) is RuntimeError else f'{type(e).__name__}: {e}', 300)
        status = getattr(getattr(e, 'response', None), 'status_code', None)
        if status in (401, 403):
            reason = (f'the Hub refused the token ({status}): it needs write access to the namespace '
                      f'{repo.split("/")[0]} (--repo or SIMSIAM_HUB_NAMESPACE names another)')
        raise RuntimeError(f'{repo} was not uploaded: {reason}') from e
    record = {
        'repo': repo, 'revision': commit.oid, 'files': {n: tensorfile.hash_file(folder / n) for n in names},
        'fingerprint': json.loads((folder / FINGERPRINT).read_text())}
    pinned = pin_upload(tag, record) if tag in WEIGHTS else []
    return [f'Uploaded {", ".join(names)} to {repo} (revision {commit.oid}).', *pinned]


def pin_upload(tag: str, record: dict[str, Any]) -> list[str]:
    """Pins an upload, so that every later download is checked against it."""
    path = sources.PINS
    try:
        write_json(path, {**json.loads(path.read_text()), tag: record})
    except (OSError, ValueError) as e:  # the upload is done, and its hashes must not get lost
        return [f'{path} cannot be written ({e}); add this to it:', json.dumps({tag: record}, indent=2)]
    return [f'Recorded the revision and hashes in {path}: commit that file.']
