"""What a Colab machine needs: packages, Drive, and a safe copy of the work.

This face imports nothing that is not on every machine: `set_up` is called before anything is
installed.
"""

from helpers.colab.setup import main, mount_drive, set_up

__all__ = ["main", "mount_drive", "set_up"]
