"""Where things that were worked out once are kept."""
import os
from pathlib import Path


def cache_folder() -> Path | None:
    """$SIMSIAM_CACHE, else simsiam_models below the user's cache folder; None where it cannot be written."""
    try:
        base = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
        folder = Path(os.environ.get('SIMSIAM_CACHE') or Path(base) / 'simsiam_models')
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: a user without a home, as in some containers
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None
