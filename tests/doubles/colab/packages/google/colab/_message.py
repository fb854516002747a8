"""Questions to the front end, which answers by way of the kernel's input, or never."""

import itertools
import json
import os
import time
from pathlib import Path

from google.colab import errors
from IPython import get_ipython

_numbers = itertools.count(1)


class MessageError(errors.Error):
    """The front end answered with an error."""


def blocking_request(request_type, request="", timeout_sec=5):
    """Ask the front end; None if it does not answer in time, without a limit wait for ever."""
    kernel = get_ipython().kernel
    number, begin = next(_numbers), time.monotonic()
    kernel.session.send(
        kernel.iopub_socket,
        "colab_request",
        content={"request": request},
        metadata={"colab_request_type": request_type, "colab_msg_id": number},
        parent=kernel.get_parent("shell"),
    )
    reply = None
    try:
        while reply is None and not (timeout_sec and time.monotonic() > begin + timeout_sec):
            _, message = kernel.session.recv(kernel.stdin_socket)
            value = message["content"]["value"] if message else None
            if isinstance(value, dict) and value.get("colab_msg_id") == number:
                reply = value
            else:
                time.sleep(0.025)
    finally:
        seconds = round(time.monotonic() - begin, 2)
        with Path(os.environ["COLAB_DOUBLE_LOG"]).open("a", encoding="utf-8") as log:
            log.write(json.dumps([request_type, reply is not None, seconds]) + "\n")
    if reply and "error" in reply:
        raise MessageError(reply["error"])
    return reply and reply.get("data")
