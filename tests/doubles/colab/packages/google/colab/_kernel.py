"""The kernel class of the whole machine: by it each kernel has ``google.colab``."""

import os
import pty
import signal
import subprocess
from contextlib import suppress

from ipykernel.ipkernel import IPythonKernel
from ipykernel.zmqshell import ZMQInteractiveShell


class Shell(ZMQInteractiveShell):
    """Its commands have a terminal, and are not ended by an interrupt, but told of it."""

    def system(self, cmd):
        """Run a command to its end and print what it writes."""
        ours, theirs = pty.openpty()
        streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        process = subprocess.Popen(
            self.var_expand(cmd, depth=1), shell=True, executable="/bin/bash", **streams
        )
        os.close(theirs)
        # What a terminal says at the end is an error.
        with suppress(OSError):
            while True:
                try:
                    print(os.read(ours, 4096).decode(errors="replace"), end="", flush=True)
                except KeyboardInterrupt:
                    process.send_signal(signal.SIGINT)
        os.close(ours)
        self.user_ns["_exit_code"] = process.wait()


class Kernel(IPythonKernel):
    """A kernel of Colab."""

    def _shell_class_default(self):
        return Shell
