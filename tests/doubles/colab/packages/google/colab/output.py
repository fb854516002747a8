"""The browser's side: the address of Colab's port proxy."""

import re


def eval_js(script):
    """Answer the one question that the project asks the browser."""
    port = re.search(r"proxyPort\((\d+)", script).group(1)
    return f"https://{port}-colab.example/"
