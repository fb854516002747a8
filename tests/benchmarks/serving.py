"""How fast the scoring server answers, beside MLflow's own server of the plain flavours.

``python -m tests.benchmarks.serving``: runs the series on the bundled sample with a small grid,
serves the same network and SVM both ways, one after the other on the same machine, and prints a
table: start-up time, latency of single rows over HTTP on loopback (p50, p99), and rows per second
in batches; beside them the same models called in this process, without HTTP. Before that, the
latency of 1,000 single rows asked by 8 clients, alone, and beside 60 idle connections and an
upload of 60 MB.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import requests

from helpers import registry, series, server, serving, tracking
from helpers.data import load_split
from helpers.models.interface import TabularPreprocessor
from helpers.workspace import open_workspace
from tests.series import ONE_PAIR, run_series

SINGLE = 300  # requests of one row
BATCHES = (100, 10_000)
REPEATS = 5  # requests of each batch
CROWD, CLIENTS = 1_000, 8  # requests of one row, and how many ask at once
PORT = 5601
JSON = {"Content-Type": "application/json"}


def _bodies(rows, n_rows, count):
    """Return the bodies of requests with `n_rows` rows each, as clients write them."""
    many = pd.concat([rows] * (n_rows // len(rows) + 2), ignore_index=True)
    starts = np.random.default_rng(0).integers(0, len(rows), count)
    parts = [many.iloc[start : start + n_rows] for start in starts]
    return [
        '{"dataframe_split": ' + part.to_json(orient="split", index=False) + "}" for part in parts
    ]


def _seconds(ask, items):
    """Return how long each call took, after one that does not count."""
    ask(items[0])
    taken = []
    for item in items:
        start = time.perf_counter()
        ask(item)
        taken.append(time.perf_counter() - start)
    return np.array(taken)


def measure(ask, make):
    """Return latency and throughput of a way to ask.

    Parameters
    ----------
    ask : callable
        Takes what `make` gives.
    make : callable
        From rows per request and number of requests to a list.

    Returns
    -------
    dict of str to float
        ``p50`` and ``p99`` in milliseconds, ``rows/s`` by size of the batch.
    """
    single = _seconds(ask, make(1, SINGLE)) * 1000
    result = {"p50": np.quantile(single, 0.5), "p99": np.quantile(single, 0.99)}
    result["rows/s by 1"] = 1000 / single.mean()
    for size in BATCHES:
        result[f"rows/s by {size:,}"] = size / np.median(_seconds(ask, make(size, REPEATS)))
    return result


def _over_http(url, rows):
    with requests.Session() as session:
        session.trust_env = False

        def ask(body):
            session.post(url, data=body, headers=JSON, timeout=600).raise_for_status()

        return measure(ask, lambda n_rows, count: _bodies(rows, n_rows, count))


def _beside_a_large_one(client, rows):
    """Return the milliseconds that many clients wait for single rows, alone and beside others."""
    host, port = client.url.removeprefix("http://").split(":")
    csv = pd.concat([rows] * (60 * 2**20 // len(rows.to_csv(index=False)))).to_csv(index=False)
    network = client.address("model_conv_network") + "/invocations?record=false"
    single = _bodies(rows, 1, CROWD)

    def ask(number):
        with client.session() as session:
            url = f"{client.address(list(client.models)[number % 2])}/invocations?record=false"
            return [_answered(session, url, body) for body in single[number::CLIENTS]]

    def crowd(pool):
        return 1000 * np.concatenate(list(pool.map(ask, range(CLIENTS))))

    with ThreadPoolExecutor(CLIENTS + 1) as pool, ExitStack() as idle:
        alone = crowd(pool)
        for _ in range(60):
            idle.enter_context(socket.create_connection((host, int(port))))
        kind = {"Content-Type": "text/csv"}
        upload = pool.submit(requests.post, network, csv, headers=kind, timeout=600)
        rounds = [crowd(pool)]
        while not upload.done():
            rounds.append(crowd(pool))
        upload.result().raise_for_status()
    return {"alone": alone, "beside an upload of 60 MB": np.concatenate(rounds)}


def _answered(session, url, body):
    start = time.perf_counter()
    session.post(url, data=body, headers=JSON, timeout=600).raise_for_status()
    return time.perf_counter() - start


def _in_process(model, rows):
    many = pd.concat([rows] * (max(BATCHES) // len(rows) + 2), ignore_index=True)
    return measure(
        model.predict, lambda n_rows, count: [many.iloc[n : n + n_rows] for n in range(count)]
    )


def _log_plain(folder, split):
    """Log the same fitted parts with MLflow's flavours; return the paths and inputs of each.

    The plain flavours take what the models take, so the rows are preprocessed here, before the
    clock runs.
    """
    import joblib
    import keras

    paths, inputs = {}, {}
    for name in series.MODELS:
        version = registry.production_version(name)
        local = mlflow.artifacts.download_artifacts(
            f"models:/{name}/{version.version}", dst_path=str(folder / f"{name}-parts")
        )
        (parts,) = Path(local).rglob("interface.json")
        path = str(folder / f"{name}-plain")
        interface = json.loads(parts.read_text(encoding="utf-8"))
        preprocessing = TabularPreprocessor.from_dict(interface["preprocessing"])
        rows = pd.DataFrame(preprocessing.transform(split.X_test).astype("float32"))
        rows.columns = [f"i{number}" for number in rows.columns]
        if (parts.parent / "network.keras").exists():
            network = keras.saving.load_model(parts.parent / "network.keras", compile=False)
            signature = mlflow.models.infer_signature(rows.to_numpy())
            mlflow.tensorflow.save_model(network, path, signature=signature)
        else:
            classifier = joblib.load(parts.parent / "classifier.joblib")
            mlflow.sklearn.save_model(classifier, path, serialization_format="cloudpickle")
        paths[name], inputs[name] = path, rows
    return paths, inputs


def _tensor_bodies(rows):
    """Return a maker of requests for a model that takes arrays."""

    def make(n_rows, count):
        many = pd.concat([rows] * (n_rows // len(rows) + 2), ignore_index=True).to_numpy()
        return [json.dumps({"instances": many[n : n + n_rows].tolist()}) for n in range(count)]

    return make


def _serve_plain(path, rows, tensors, port):
    """Measure ``mlflow models serve`` of a saved model."""
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", path]
    command += ["--port", str(port), "--env-manager", "local"]
    start = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        # It starts uvicorn by its name.
        programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "PATH": programs},
        )
        try:
            while not _pings(f"http://127.0.0.1:{port}"):
                if process.poll() is not None:
                    log.seek(0)
                    sys.exit(log.read().decode())
                time.sleep(0.1)
            started = time.perf_counter() - start
            url = f"http://127.0.0.1:{port}/invocations"
            with requests.Session() as session:
                session.trust_env = False

                def ask(body):
                    session.post(url, data=body, headers=JSON, timeout=600).raise_for_status()

                make = _tensor_bodies(rows) if tensors else lambda n, c: _bodies(rows, n, c)
                return {"start": started, **measure(ask, make)}
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def _pings(url):
    try:
        return requests.get(f"{url}/ping", timeout=1).ok
    except requests.RequestException:
        return False


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.serving", description=__doc__)
    parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        done = run_series(folder / "ws", "--data", "sample", "--only", "01,02,03,04", *ONE_PAIR)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        workspace = open_workspace(folder / "ws")
        tracking.connect(workspace, keep=False)
        split, table = load_split(workspace), {}
        start = time.perf_counter()
        ours = serving.start(workspace, PORT, keep=False)
        started = time.perf_counter() - start
        for title, waited in _beside_a_large_one(ours, split.X_test).items():
            p50, p99, longest = np.quantile(waited, [0.5, 0.99, 1])
            print(
                f"{CLIENTS} clients {title}: p50 {p50:.0f} ms, p99 {p99:.0f} ms, "
                f"longest {longest:.0f} ms"
            )
        for name in ours.models:
            url = f"{ours.address(name)}/invocations?record=true"
            table[f"{name}, this project's server"] = {
                "start": started,
                **_over_http(url, split.X_test),
            }
        serving.stop(workspace)
        for name in registry.require_production():
            model = registry.load_production(name)
            table[f"{name}, in process"] = _in_process(model, split.X_test)
        paths, inputs = _log_plain(folder, split)
        server.stop_server(workspace)
        for number, (name, path) in enumerate(paths.items()):
            tensors = name == "model_conv_network"
            title = f"{name}, mlflow models serve, plain {'Keras' if tensors else 'scikit-learn'}"
            # Another port each: the one before may still be ending.
            table[title] = _serve_plain(path, inputs[name], tensors, PORT + 10 + number)
    frame = pd.DataFrame(table).T
    print(frame.round(1).to_string())
    plain = frame.loc[[name for name in frame.index if "plain Keras" in name], "p50"].iloc[0]
    for name in series.MODELS:
        ratio = plain / frame.loc[f"{name}, this project's server", "p50"]
        print(f"{name}: p50 {ratio:.1f} times lower than the plain Keras flavour's")
    return 0


if __name__ == "__main__":
    sys.exit(main())
