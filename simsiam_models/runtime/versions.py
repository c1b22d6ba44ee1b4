"""Names what a result was computed with: the versions of packages, and the command."""
import contextlib
import importlib.metadata
import platform
import shlex
import sys
from pathlib import Path


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that affect a result."""
    found = {'python': platform.python_version()}
    for name in ('simsiam-models', 'torch', 'torchvision', 'timm', 'numpy', 'scikit-learn'):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def describe() -> str:
    """Returns what a bug report needs beside our own version, one per line: versions of others, and the platform."""
    lines = [f'{name} {version}' for name, version in versions().items() if name != 'simsiam-models']
    return '\n'.join([*lines, f'platform {platform.platform()}'])


def command() -> str:
    """Returns the command line of this process as a shell takes it, without the folder of the program."""
    program = Path(sys.argv[0]).name
    return shlex.join(['simsiam' if program == '__main__.py' else program, *sys.argv[1:]])
