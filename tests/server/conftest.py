"""A server behind an open tunnel, asked through ngrok's edge."""

from types import SimpleNamespace
from urllib.parse import urlsplit

import mlflow
import pytest
import requests

from helpers import tracking
from helpers.server import credentials
from helpers.workspace import open_workspace
from tests.tools.walkthrough import environment, exposed

USERS = ["reader:reader", "editor:editor", "boss:admin"]


@pytest.fixture(scope="module")
def public(cloud, tmp_path_factory, _no_team_server):
    """A server behind an open tunnel, with a run, a model and users of every role."""
    folder = tmp_path_factory.mktemp("exposed")
    workspace = open_workspace(folder / "ws")
    url = tracking.connect(workspace, keep=False)
    with tracking.start_run("shown", "one") as run:
        mlflow.log_metric("accuracy", 0.75)
        mlflow.log_text("hello", "note.txt")
    client = mlflow.MlflowClient()
    client.create_registered_model("there")
    client.create_model_version("there", f"runs:/{run.info.run_id}/note.txt", run.info.run_id)
    users = ",".join(USERS)
    with environment(UI_USERS=users), exposed(workspace, cloud, folder) as address:

        def session(user=None, password=None):
            asking = requests.Session()
            asking.trust_env = False
            asking.proxies = {"https": cloud.proxy_url}
            asking.verify = str(cloud.ca_file)
            asking.headers["ngrok-skip-browser-warning"] = "1"
            if user:
                asking.auth = (user, password or credentials.password_of(workspace, user))
            return asking

        yield SimpleNamespace(
            url=address.url,
            local=url,
            host=urlsplit(address.url).netloc,
            workspace=workspace,
            session=session,
            run_id=run.info.run_id,
            experiment_id=run.info.experiment_id,
            version="1",
        )
