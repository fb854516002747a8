"""The browser's side: JavaScript, and ports of the machine."""

import json

from google.colab import _message
from IPython.display import Javascript, display


def eval_js(script, ignore_result=False, timeout_sec=None):
    """Have the browser evaluate a script; without a limit wait for ever."""
    if not ignore_result:
        return _message.blocking_request("cell_javascript_eval", {"script": script}, timeout_sec)
    return None


def serve_kernel_port_as_iframe(
    port, path="/", width="100%", height="400", cache_in_notebook=False
):
    """Show a port in a frame below the cell."""
    frame = {"path": path, "width": width, "height": height, "cache": cache_in_notebook}
    url = f"google.colab.kernel.proxyPort({port})"
    display(Javascript(f"stand_in.iframe({url}, {json.dumps(frame)})"))


def serve_kernel_port_as_window(port, path="/", anchor_text=None, skip_warning=False):
    """Show a link that opens a port in a window, of which browsers' rules make nothing."""
    if not skip_warning:
        print("Warning: This function may stop working due to changes in browser security.")
    text = json.dumps(anchor_text or f"https://localhost:{port}{path}")
    display(Javascript(f"stand_in.window(google.colab.kernel.proxyPort({port}), {text})"))
