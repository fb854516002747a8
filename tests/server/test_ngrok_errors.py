"""What is advised about what ngrok reports."""

import pytest

from helpers.server.ngrok_errors import ADVICE, explain_code


@pytest.mark.parametrize(
    ("report", "words"),
    [
        *((f'lvl=eror err="failed\\n\\n{code}\\n"', advice) for code, advice in ADVICE.items()),
        ("x ERR_NGROK_999 y", "https://ngrok.com/docs/errors/err_ngrok_999"),
        ("x ERR_NGROK_320 y", "ngrok does not give you the domain a.example"),
        ("dial tcp: i/o timeout", "perhaps this network blocks it"),
    ],
)
def test_report_of_ngrok_becomes_advice(report, words):
    domain = "a.example" if "320" in report else None
    assert words in explain_code(report, domain)
