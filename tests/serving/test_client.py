import json
import shutil

import pytest

from helpers import serving
from tests.scoring import NETWORK, SVM, assert_same


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl_sends_a_csv(served, local_models, tmp_path):
    rows = served.split.X_test.head(4)
    rows.to_csv(tmp_path / "rows.csv", index=False)
    shown = serving.ask_with_curl(served.client, SVM, tmp_path / "rows.csv")
    command, answer = shown.split("\n", 1)
    assert command.startswith("$ curl ")
    assert_same(json.loads(answer)["predictions"], local_models[SVM].predict(rows))


def test_table_shows_what_is_served_and_where(served):
    table = served.client.table()
    assert list(table.index) == [NETWORK, SVM]
    assert table.loc[SVM, "address"] == f"{served.client.url}/models/{SVM}/invocations"


def test_address_where_nothing_answers_is_said():
    with pytest.raises(serving.ServingError, match="No scoring server answers"):
        serving.connect("http://127.0.0.1:9")
