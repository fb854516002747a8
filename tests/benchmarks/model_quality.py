"""Measure the models' quality on a table, beside well-known methods.

``python -m tests.benchmarks.model_quality [TABLE.csv] [--seeds 10] [--only NAME]``: for each seed
a stratified 70/30 split; every choice is made on the training rows, the test rows are used once.
Our two models are trained by the cells of their notebooks. Prints a Markdown table of means over
the seeds and their standard errors; without a table, one of accuracies on small tables that
scikit-learn brings.
"""

import argparse
import contextlib
import io
import os
import platform
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from catboost import CatBoostClassifier
from lightgbm import LGBMClassifier
from sklearn import datasets
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, log_loss
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC
from xgboost import XGBClassifier

from helpers import data, server, tracking
from helpers.models.interface import TabularPreprocessor
from helpers.workspace import open_workspace
from tests.cells import run_cells, train_network
from tests.conftest import split_table

SMALL = {
    "wine": datasets.load_wine,
    "breast cancer": datasets.load_breast_cancer,
    "iris": datasets.load_iris,
    "digits": datasets.load_digits,
}
WIDE = {"svc__C": 2.0 ** np.arange(-5, 13, 2), "svc__gamma": 2.0 ** np.arange(-15, 4, 2)}


def _answered(answer, labels):
    return answer[[f"probability_{label}" for label in labels]].to_numpy()


def network(split, seed, ws):
    """Train the network by the cells of notebook 02."""
    return _answered(train_network(split, ws, SEED=seed).answer, split.labels)


def support_vector_machine(split, seed, ws):
    """Search and fit by the cells of notebook 03."""
    made = run_cells("03_svm_grid_search", "Pipeline(", "log_model(", split=split, ws=ws)
    return _answered(made.answer, split.labels)


def _coded(make):
    """Give a method the raw columns, with codes for texts and labels."""

    def fit(split, seed, ws):
        texts = [name for name, kind in split.X_train.dtypes.items() if kind.kind == "O"]
        every = pd.concat([split.X_train, split.X_test])
        codes = {name: pd.factorize(every[name])[0] for name in texts}
        every = every.assign(**codes)
        X, X_test = every.iloc[: len(split.X_train)], every.iloc[len(split.X_train) :]
        return make(seed).fit(X, split.encode(split.y_train)).predict_proba(X_test)

    return fit


def _catboost(weights):
    """Give CatBoost the categories as such."""

    def fit(split, seed, ws):
        names = list(split.categorical)
        X, X_test = (
            part.assign(**{name: part[name].astype(str) for name in names})
            for part in (split.X_train, split.X_test)
        )
        model = CatBoostClassifier(
            iterations=500,
            random_seed=seed,
            verbose=0,
            auto_class_weights=weights,
            allow_writing_files=False,
        )
        model.fit(X, split.encode(split.y_train), cat_features=names)
        return model.predict_proba(X_test)

    return fit


def _preprocessed(make):
    """Give a method the inputs of our SVM."""

    def fit(split, seed, ws):
        model = make_pipeline(TabularPreprocessor(split.categorical), make())
        return model.fit(split.X_train, split.encode(split.y_train)).predict_proba(split.X_test)

    return fit


def wide_search(split, seed, ws):
    """Search scikit-learn's SVM over a wide grid; gives the chosen classes as probabilities."""
    pipeline = make_pipeline(TabularPreprocessor(split.categorical), SVC())
    search = GridSearchCV(pipeline, WIDE, cv=StratifiedKFold(5), n_jobs=-1)
    search.fit(split.X_train, split.encode(split.y_train))
    return np.eye(len(split.labels))[search.predict(split.X_test)]


OURS = {
    "`model_svm_rbf` (notebook 03)": support_vector_machine,
    "`model_conv_network` (notebook 02)": network,
}
LOGISTIC = {"logistic regression": _preprocessed(lambda: LogisticRegression(max_iter=5000))}
METHODS = {
    **OURS,
    "XGBoost, 200 trees": _coded(lambda seed: XGBClassifier(n_estimators=200, random_state=seed)),
    "LightGBM, 200 trees, rate 0.03, 15 leaves": _coded(
        lambda seed: LGBMClassifier(
            n_estimators=200, learning_rate=0.03, num_leaves=15, random_state=seed, verbose=-1
        )
    ),
    "CatBoost, 500 trees": _catboost(None),
    "CatBoost, 500 trees, balanced classes": _catboost("Balanced"),
    "random forest, 500 trees": _coded(
        lambda seed: RandomForestClassifier(500, random_state=seed, n_jobs=-1)
    ),
    **LOGISTIC,
    "majority class": _preprocessed(lambda: DummyClassifier(strategy="prior")),
}
ON_SMALL = {**OURS, **LOGISTIC, "`GridSearchCV` of an SVM, wide grid": wide_search}


def measure(table, seeds, methods, ws):
    """Return one row per method and seed: accuracy, macro F1, log loss."""
    rows = []
    for seed in range(seeds):
        split = split_table(table, 0.3, seed)
        truth = split.encode(split.y_test)
        for name, method in methods.items():
            with contextlib.redirect_stdout(io.StringIO()):
                chances = np.asarray(method(split, seed, ws), dtype="float64")
            guess = chances.argmax(axis=1)
            figures = {
                "accuracy": accuracy_score(truth, guess),
                "macro F1": f1_score(truth, guess, average="macro"),
                "log loss": log_loss(truth, chances / chances.sum(axis=1, keepdims=True)),
            }
            rows.append({"model": name, "seed": seed, **figures})
            print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def _with_error(values):
    return f"{values.mean():.4f} ± {values.std() / np.sqrt(len(values)):.4f}"


def _markdown(frame):
    """Return a table as Markdown, its index as the first column."""
    lines = [[frame.index.name, *frame.columns], ["---"] * (1 + frame.shape[1])]
    lines += [[name, *row] for name, row in zip(frame.index, frame.to_numpy(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def on_small_tables(seeds, methods, ws):
    """Return the accuracies on the tables of scikit-learn, as CSV, one column each."""
    columns = {}
    for name, load in SMALL.items():
        frame = load(as_frame=True).frame.rename(columns={"target": "Target"})
        frame["Target"] = "class " + frame["Target"].astype(str)
        table = data.read_table(frame.to_csv(index=False).encode(), name, categorical=[])
        rows = measure(table, seeds, methods, ws)
        columns[name] = rows.groupby("model", sort=False)["accuracy"].agg(_with_error)
    return pd.DataFrame(columns)


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", nargs="?", help="path of a CSV with a column Target")
    parser.add_argument("--seeds", type=int, help="10 on a table, 5 on the small ones")
    parser.add_argument("--only", default="", help="part of the methods' names")
    options = parser.parse_args()
    seeds = options.seeds or (10 if options.table else 5)
    methods = METHODS if options.table else ON_SMALL
    chosen = {name: fit for name, fit in methods.items() if options.only in name}
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, {seeds} seeds")
    with tempfile.TemporaryDirectory() as folder:
        ws = open_workspace(Path(folder) / "ws")
        tracking.connect(ws, keep=False)
        try:
            if options.table:
                table = data.read_table(Path(options.table).read_bytes(), options.table)
                rows = measure(table, seeds, chosen, ws).drop(columns="seed")
                result = rows.groupby("model", sort=False).agg(_with_error)
            else:
                result = on_small_tables(seeds, chosen, ws)
        finally:
            server.stop_server(ws)
    print(_markdown(result))


if __name__ == "__main__":
    main()
