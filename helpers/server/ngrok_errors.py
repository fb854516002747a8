"""What ngrok reports when something goes wrong, and what to do about it."""

import re
import time

import requests
from pyngrok.exception import PyngrokError, PyngrokNgrokHTTPError, PyngrokNgrokInstallError

from helpers.server.credentials import NGROK_DOMAIN, NGROK_TOKEN

WHERE_TO_GET_A_TOKEN = (
    "Get a free token at https://dashboard.ngrok.com/get-started/your-authtoken. In Colab, put "
    f"it into the Secrets panel (the key symbol on the left) under the name "
    f"{NGROK_TOKEN} and switch on 'Notebook access'; elsewhere, set the environment "
    f"variable {NGROK_TOKEN}. Then run this cell again."
)

# What to do about what ngrok reports; messages: https://ngrok.com/docs/errors
ADVICE = {
    "ERR_NGROK_4018": f"ngrok wants the token of an account. {WHERE_TO_GET_A_TOKEN}",
    "ERR_NGROK_105": (
        f"What {NGROK_TOKEN} holds is no ngrok token; perhaps only a part of it was "
        f"copied, or an API key. {WHERE_TO_GET_A_TOKEN}"
    ),
    "ERR_NGROK_107": (
        f"The token in {NGROK_TOKEN} is not valid (any more). {WHERE_TO_GET_A_TOKEN}"
    ),
    "ERR_NGROK_108": (
        "Your ngrok account already has as many agents running as its plan allows (one, on the "
        "free plan), perhaps in another notebook. Stop that one, there or at "
        "https://dashboard.ngrok.com/agents, and run this cell again."
    ),
    "ERR_NGROK_334": (
        "Another agent already serves this address, perhaps in another notebook or on another "
        "machine. Stop it, there or at https://dashboard.ngrok.com/endpoints, and run this cell "
        "again."
    ),
    "ERR_NGROK_3200": "The tunnel is offline. Run this cell again to open it anew.",
    "ERR_NGROK_8012": (
        "The tunnel is open, but the MLflow server behind it does not answer. Run this cell "
        "again: it starts the server."
    ),
}
# The domain is somebody else's, or is not reserved.
DOMAIN_CODES = ("ERR_NGROK_319", "ERR_NGROK_320", "ERR_NGROK_326")


def explain(error: PyngrokError, domain: str | None) -> str:
    """Say in one message what went wrong and what to do."""
    if isinstance(error, PyngrokNgrokInstallError):
        return (
            "The ngrok agent could not be downloaded from bin.ngrok.com; perhaps this network "
            f"blocks it ({error}). Download it from https://ngrok.com/download in another way and "
            "name the file with the environment variable PYNGROK_NGROK_PATH."
        )
    logs = "\n".join(log.line for log in getattr(error, "ngrok_logs", None) or [])
    body = str(error.body) if isinstance(error, PyngrokNgrokHTTPError) else ""
    text = "\n".join([str(error), getattr(error, "ngrok_error", None) or "", body, logs])
    return explain_code(text, domain)


def explain_code(text: str, domain: str | None = None) -> str:
    """Turn a report of ngrok, with an ``ERR_NGROK_`` code in it or without, into advice.

    Parameters
    ----------
    text : str
    domain : str, optional
        The reserved domain that was asked for.
    """
    found = re.search(r"ERR_NGROK_\d+", text)
    if found is None:
        return (
            "The ngrok agent could not connect; perhaps this network blocks it. It said: "
            f"{' '.join(text.split())[:300]}"
        )
    code = found.group()
    link = f"https://ngrok.com/docs/errors/{code.lower()}"
    advice = ADVICE.get(code)
    if advice is None and (domain or code in DOMAIN_CODES):
        advice = (
            f"ngrok does not give you the domain {domain}, which {NGROK_DOMAIN} asks "
            "for. Reserve it at https://dashboard.ngrok.com/domains, or do without that setting."
        )
    return f"{advice or 'ngrok refused to open the tunnel.'} ({code}, see {link})"


def problem_outside(url: str, patience: float = 0.0) -> str | None:
    """Ask for the server by its public address; say what is wrong, or return None.

    Only ngrok's own error codes count: a machine that cannot reach its own tunnel says nothing
    about others.
    """
    end = time.monotonic() + patience
    while True:
        try:
            answer = requests.get(
                f"{url}/health", headers={"ngrok-skip-browser-warning": "1"}, timeout=10
            )
        except requests.RequestException:
            return None
        code = answer.headers.get("Ngrok-Error-Code")
        if code is None:
            return None
        if time.monotonic() >= end:
            return explain_code(code)
        time.sleep(0.5)
