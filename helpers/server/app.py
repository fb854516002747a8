"""What runs inside the MLflow server's process: MLflow's basic-auth app behind the gate.

One process that imports MLflow starts in half the time of the chain that ``mlflow server`` starts
(the command line, then uvicorn).
"""

import logging
import os
import warnings

from helpers.server import credentials, own_process, store
from helpers.server.gate import Gate
from helpers.server.mlflow_server import service
from helpers.server.protected import Protected
from helpers.workspace import Workspace, open_workspace


class Accounts:
    """MLflow's accounts, and its cache of passwords that were right a short while ago.

    A password takes some 50 ms to check, on purpose. MLflow forgets what it remembers of an
    account as soon as that is changed.

    Parameters
    ----------
    auth : module
        `mlflow.server.auth`, after its ``create_app``.
    """

    def __init__(self, auth):
        # Looked up here: an MLflow that has them no more ends the start, not a request.
        self._store, self._remembered = auth.store, auth._USER_AUTH_CACHE
        self._key, self._authenticate = auth._auth_cache_key, auth._authenticate_cached
        self._forget = auth._invalidate_user_auth_cache

    def remembers(self, user: str, password: str) -> bool:
        """Tell whether this password was found right a short while ago."""
        return self._key(user, password) in self._remembered

    def authenticate(self, user: str, password: str):
        """Return the account as it is now, with ``is_admin``; None if user or password are wrong.

        An unknown user costs the time of a wrong password.
        """
        account = self._authenticate(user, password)
        if not self._store.has_user(user):
            self._forget(user)
            self._store.authenticate_user(credentials.ADMIN, password)
            return None
        now = self._store.get_user(user)
        if account is not None and _rights(now) != _rights(account):
            # Changed while it was being remembered, or by another program.
            self._forget(user)
            account = self._authenticate(user, password)
        return account

    def keep(self, user: str, password: str) -> None:
        """Make the account of an administrator, or give it today's password."""
        if not self._store.has_user(user):
            self._store.create_user(user, password, is_admin=True)
        elif not self._store.authenticate_user(user, password):
            self._store.update_user(user, password=password)


def _rights(account) -> tuple:
    return account.id, account.password_hash, account.is_admin


def _configure_mlflow(workspace: Workspace) -> None:
    """Set what ``mlflow server --app-name basic-auth`` sets before it starts its workers."""
    config = workspace.server / "basic_auth.ini"
    accounts = (workspace.server / "users.db").as_posix()
    config.write_text(
        "[mlflow]\n"
        # What others made: to be seen. Whoever makes something may do everything with it.
        "default_permission = READ\n"
        f"database_uri = sqlite:///{accounts}\n"
        f"admin_username = {credentials.ADMIN}\n"
        "auth_cache_ttl_seconds = 60\n",
        encoding="utf-8",
    )
    os.environ.update(
        MLFLOW_AUTH_CONFIG_PATH=str(config),
        MLFLOW_AUTH_ADMIN_PASSWORD=credentials.password_of(workspace, credentials.ADMIN),
        MLFLOW_FLASK_SERVER_SECRET_KEY=credentials.stored_secret(workspace, "cookie key"),
        # The job workers serve features of language-model evaluation; they only cost time here.
        MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
        MLFLOW_DISABLE_TELEMETRY="true",
        _MLFLOW_SGI_NAME="uvicorn",
    )
    # Settings of the user's own MLflow clients are not meant for this server.
    for name in (
        "MLFLOW_TRACKING_URI",
        "MLFLOW_SERVER_ALLOWED_HOSTS",
        "MLFLOW_AUTH_ADMIN_USERNAME",
    ):
        os.environ.pop(name, None)


def create_app(workspace: Workspace, port: int) -> Gate:
    """Make the app: MLflow with basic-auth on the workspace's store, behind the gate."""
    _configure_mlflow(workspace)
    import mlflow.server as mlflow_server

    store.prepare(workspace.tracking_db)
    store_uri = f"sqlite:///{workspace.tracking_db.as_posix()}"
    os.environ[mlflow_server.BACKEND_STORE_URI_ENV_VAR] = store_uri
    os.environ[mlflow_server.ARTIFACT_ROOT_ENV_VAR] = "mlflow-artifacts:/"
    os.environ[mlflow_server.ARTIFACTS_DESTINATION_ENV_VAR] = workspace.artifacts.as_uri()
    os.environ[mlflow_server.SERVE_ARTIFACTS_ENV_VAR] = "true"
    mlflow_server.handlers.initialize_backend_stores(store_uri, None, "mlflow-artifacts:/")
    from mlflow.server import auth

    logging.getLogger("mlflow.server.auth").setLevel(logging.ERROR)
    app, accounts = auth.create_app(), Accounts(auth)
    accounts.keep(
        credentials.NOTEBOOKS, credentials.stored_secret(workspace, credentials.NOTEBOOKS)
    )
    accounts.keep(credentials.ADMIN, os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"])
    return Gate(app, accounts, Protected(mlflow_server.handlers), workspace, port)


def _close_runs(workspace: Workspace) -> None:
    """Close the runs of batch runs that were killed, past the server, which is ending."""
    from mlflow import MlflowClient

    store.close_abandoned_runs(MlflowClient(f"sqlite:///{workspace.tracking_db.as_posix()}"))


def main() -> None:
    """Run the server in this process until it is ended."""
    options = own_process.argument_parser("helpers.server.app", main.__doc__).parse_args()
    warnings.simplefilter("ignore")
    workspace = open_workspace(options.workspace)
    own_process.serve(
        create_app(workspace, options.port),
        options,
        service(workspace),
        lambda: _close_runs(workspace),
    )


if __name__ == "__main__":
    main()
