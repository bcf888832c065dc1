"""Where halfbyte keeps what it fetched."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`HALFBYTE_CACHE`, else the platform's cache folder for halfbyte. Not created here."""
    override = os.environ.get("HALFBYTE_CACHE")
    if override:
        return Path(override).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("halfbyte", appauthor=False))
