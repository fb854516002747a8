"""Google Drive, as a folder."""

import os
from pathlib import Path


def mount(mountpoint, force_remount=False):
    """Show the person's Drive below `mountpoint`, as ``MyDrive``."""
    place = Path(mountpoint) / "MyDrive"
    if place.is_symlink() and not force_remount:
        print(f"Drive already mounted at {mountpoint}; to attempt to forcibly remount, call drive.")
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(os.environ["COLAB_DOUBLE_DRIVE"])
    print(f"Mounted at {mountpoint}")
