"""A copy of the workspace that outlives the machine: in Google Drive, a share, any folder.

A Colab machine disappears, and SQLite does not work reliably on a mounted Drive. So the series
works on the local disk and keeps a safe copy in a folder of the user's, as one line of history::

    FOLDER/snapshots/00012.json     what the workspace held: where each file's content is
    FOLDER/packs/00012-3f9a….zip    the contents that were new then; an ordinary zip
    FOLDER/aside/00012-51c0….zip    work of a machine that found number 12 taken

Each save takes the next number. If somebody else took it while a step ran, nothing is merged:
what this machine made goes aside, whole, and the workspace is brought up to the copy.
"""

import atexit
from contextlib import suppress
from pathlib import Path

from helpers.colab import mount_drive
from helpers.colab.contents import SafeCopyError
from helpers.colab.in_step import SafeCopy
from helpers.workspace import DRIVE, Workspace, in_colab

OFF = "off"

_running = {}  # by workspace, the copy that this process keeps


def start(workspace: Workspace, folder: str | None, what: str) -> "SafeCopy | NoCopy":
    """Bring the workspace up to its safe copy; what is returned saves it.

    Parameters
    ----------
    folder : str or None
        Where the copy is; None or ``off``: there is none. In Colab, what begins with
        ``MyDrive/`` is in Google Drive.
    what : str
        Who uses it, such as the notebook's name; others are told who saved.

    Raises
    ------
    SafeCopyError
        If the folder cannot be used, or what it holds is damaged; nothing was changed then.
    """
    _running.pop(workspace.root, None)  # The cell was run again.
    place = _find_folder(folder)
    if place is None:
        if in_colab():
            print("There is no safe copy: nothing is kept when this machine goes (USE_DRIVE).")
        return NoCopy()
    copy = SafeCopy(workspace, place, what)
    taken = copy.bring_up()
    _running[workspace.root] = copy
    print(f"Restored what was saved at {taken} from {place}" if taken else f"Safe copy: {place}")
    return copy


def _find_folder(folder: str | None) -> Path | None:
    if not folder or folder == OFF:
        return None
    if not in_colab():
        return Path(folder).expanduser().resolve()
    place = Path(folder).expanduser()
    place = DRIVE / place if place.parts[0] == "MyDrive" else place.resolve()
    if place.is_relative_to(DRIVE) and not mount_drive():
        raise SafeCopyError(
            "Google Drive is not mounted, and only a person can allow it. Run the first cell of a "
            "notebook in Colab with USE_DRIVE before (in a terminal: colab drivemount), or set "
            "DRIVE_FOLDER to off."
        )
    return place


@atexit.register
def _save_on_the_way_out() -> None:
    """Save what an interrupted step leaves, such as the finished parts of a search."""
    for copy in _running.values():
        with suppress(SafeCopyError):
            copy.save(leaving=True)


class NoCopy:
    """Stands where no safe copy is wanted."""

    def save(self) -> None:
        """Do nothing."""
