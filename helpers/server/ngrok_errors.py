"""What ngrok reports when something goes wrong, and what to do about it."""

import re
import time

import requests
from pyngrok.exception import PyngrokError, PyngrokNgrokHTTPError, PyngrokNgrokInstallError

from helpers.server.credentials import NGROK_DOMAIN, NGROK_TOKEN

WHERE_TO_GET_A_TOKEN = (
    "Get a free token at https://dashboard.ngrok.com/get-started/your-authtoken.\n"
    f"In Colab, put it into the Secrets panel (the key symbol on the left) as {NGROK_TOKEN} and\n"
    f"switch on 'Notebook access'; elsewhere, set the environment variable {NGROK_TOKEN}.\n"
    "Then run this cell again."
)

WITHOUT_NGROK = "Without ngrok: in Colab, EXPOSE_UI = False shows the UI below the cell."
WAIT_FOR_NEXT_MONTH = (
    "See https://dashboard.ngrok.com/usage, and wait for the next month or take a larger plan. "
    + WITHOUT_NGROK
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
        "Your ngrok account already has as many agents running as its plan allows, in other "
        "notebooks or on other machines. Stop one, there or at "
        "https://dashboard.ngrok.com/agents, and run this cell again."
    ),
    "ERR_NGROK_121": (
        "The ngrok agent on this machine is too old for your account. Renew it with the command "
        "python -m pyngrok.ngrok update (in a notebook with ! in front), and run this cell again."
    ),
    "ERR_NGROK_334": (
        "Another machine or notebook already shows its UI at your account's address, and a free "
        "account has only one. Stop that one: there, by running this cell with EXPOSE_UI = False, "
        "or at https://dashboard.ngrok.com/endpoints. Then run this cell again. " + WITHOUT_NGROK
    ),
    "ERR_NGROK_725": (
        "Your ngrok account has used up the data that its plan allows in a month (1 GB, on the "
        f"free plan). {WAIT_FOR_NEXT_MONTH}"
    ),
    "ERR_NGROK_727": (
        "Your ngrok account has used up the requests that its plan allows in a month (20,000, on "
        f"the free plan). {WAIT_FOR_NEXT_MONTH}"
    ),
    "ERR_NGROK_734": (
        "There were more requests in a short time than the plan of your ngrok account allows. "
        "Wait a minute, then load the page again."
    ),
    "ERR_NGROK_3200": "The tunnel is offline. Run this cell again to open it anew.",
    "ERR_NGROK_8012": (
        "The tunnel is open, but the MLflow server behind it does not answer. Run this cell "
        "again: it starts the server."
    ),
}
# The domain is somebody else's, is not reserved, or is not for this plan.
DOMAIN_CODES = ("ERR_NGROK_314", "ERR_NGROK_319", "ERR_NGROK_320", "ERR_NGROK_326")


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
    said = getattr(error, "ngrok_error", None) or body or str(error)
    return explain_code(f"{said}\n{logs}", domain)


def explain_code(text: str, domain: str | None = None) -> str:
    """Turn a report of ngrok, with an ``ERR_NGROK_`` code in it or without, into advice.

    Parameters
    ----------
    domain : str, optional
        The reserved domain that was asked for.
    """
    found = re.search(r"ERR_NGROK_\d+", text)
    if found is None:
        return (
            "The ngrok agent did not get through to ngrok; perhaps this network blocks it, or is "
            f"down. {WITHOUT_NGROK} It said: {text.strip().split(chr(10))[0][:300]}"
        )
    code = found.group()
    link = f"https://ngrok.com/docs/errors/{code.lower()}"
    advice = ADVICE.get(code)
    if advice is None and domain and code in DOMAIN_CODES:
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
