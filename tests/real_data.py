"""Real pictures for tests: they stay outside the repository, in $SIMSIAM_TEST_DATA, by default ../shared/data."""
import os
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

FOLDER = Path(os.environ.get('SIMSIAM_TEST_DATA', ROOT.parent / 'shared' / 'data'))


def unpack_real(name: str, folder: Path) -> Path:
    """Unpacks an archive of real pictures, such as coco_mini.zip, into `folder`; skips the test if it is not there."""
    file = FOLDER / name
    if not file.is_file():
        pytest.skip(f'{file} is not there: real pictures are no part of the repository; set SIMSIAM_TEST_DATA')
    with zipfile.ZipFile(file) if file.suffix == '.zip' else tarfile.open(file) as archive:
        archive.extractall(folder)
    tops = [path for path in folder.iterdir() if path.name == file.stem]
    return tops[0] if tops else folder
