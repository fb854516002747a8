"""Google Drive, as a folder that a person has to show to the machine."""

import os
from pathlib import Path

from google.colab import _message


def mount(mountpoint, force_remount=False, timeout_ms=120000, readonly=False):
    """Show the person's Drive below `mountpoint`; ask first, whatever is there already.

    An answer that never comes is noticed only when the machine has no right to Drive.
    """
    if readonly:
        raise NotImplementedError("The stand-in's Drive can always be written to.")
    if " " in mountpoint:
        raise ValueError("Mountpoint must not contain a space.")
    request = {"authType": "dfs_ephemeral"}
    _message.blocking_request("request_auth", request, timeout_sec=int(timeout_ms / 1000))
    place = Path(mountpoint).expanduser()
    shown = place / "MyDrive"
    if shown.is_dir() and not force_remount:
        print(
            f"Drive already mounted at {mountpoint}; to attempt to forcibly remount, call "
            f'drive.mount("{mountpoint}", force_remount=True).'
        )
        return
    shown.unlink(missing_ok=True)
    if place.is_symlink():
        raise ValueError("Mountpoint must not be a symlink")
    if place.is_dir() and any(place.iterdir()):
        raise ValueError("Mountpoint must not already contain files")
    if place.exists() and not place.is_dir():
        raise ValueError("Mountpoint must either be a directory or not exist")
    if not place.parent.is_dir():
        raise ValueError("Mountpoint must be in a directory that exists")
    if not Path(os.environ["COLAB_DOUBLE_RIGHT"]).is_file():
        raise ValueError("mount failed")
    place.mkdir(exist_ok=True)
    shown.symlink_to(os.environ["COLAB_DOUBLE_DRIVE"])
    print(f"Mounted at {mountpoint}")
