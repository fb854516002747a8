"""Measure the models' quality on a table, beside well-known methods.

``python -m tests.benchmarks.model_quality TABLE.csv [--seeds 5]``: for each seed a stratified
70/30 split; every choice (the network's epochs, the SVM's C and gamma) is made on the training
rows; the test rows are used once. Prints a Markdown table of means over the seeds.
"""

import argparse
import os
import platform
import time
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC
from xgboost import XGBClassifier

from helpers import cnn, data, svm
from helpers.preprocessing import make_preprocessor
from tests.conftest import split_table

GRID = svm.make_grid(range(-5, 7), range(-5, 7))


def network(split, seed):
    """Train the network as notebook 02 does."""
    training = cnn.train(split, cnn.Settings(seed=seed))
    inputs = training.preprocessor.transform(split.X_test).astype("float32")
    answers = np.asarray(split.labels)[training.network.predict(inputs, verbose=0).argmax(axis=1)]
    return answers, f"epoch {training.best_epoch} of {len(training.history)}"


def support_vector_machine(split, seed):
    """Search and fit as notebook 03 does."""
    pair = svm.best_pair(svm.search(split, GRID))
    return svm.fit_best(split, **pair).predict(
        split.X_test
    ), f"C {pair['C']:g}, gamma {pair['gamma']:g}"


def original_svm(split, seed):
    """Fit the SVM as the original series deployed it: raw columns, C = 1, gamma = 0.001."""
    return SVC(C=1, gamma=0.001).fit(split.X_train, split.y_train).predict(split.X_test), ""


def _fitted(model, split):
    preprocessor = make_preprocessor(split.numeric, split.categorical)
    fitted = make_pipeline(preprocessor, model).fit(split.X_train, split.y_train)
    return fitted.predict(split.X_test), ""


def gradient_boosting(split, seed):
    """Fit XGBoost with 200 trees on the raw columns."""
    model = XGBClassifier(n_estimators=200, random_state=seed)
    codes = np.searchsorted(split.labels, split.y_train)
    return np.asarray(split.labels)[model.fit(split.X_train, codes).predict(split.X_test)], ""


def random_forest(split, seed):
    """Fit a random forest of 500 trees on the raw columns."""
    model = RandomForestClassifier(500, random_state=seed, n_jobs=-1)
    return model.fit(split.X_train, split.y_train).predict(split.X_test), ""


def logistic_regression(split, seed):
    """Fit a logistic regression on the preprocessed columns."""
    return _fitted(LogisticRegression(max_iter=2000), split)


def majority_class(split, seed):
    """Answer the most frequent class."""
    return _fitted(DummyClassifier(), split)


METHODS = {
    "`model_svm_rbf` (notebook 03)": support_vector_machine,
    "`model_conv_network` (notebook 02)": network,
    "XGBoost, 200 trees": gradient_boosting,
    "random forest, 500 trees": random_forest,
    "logistic regression": logistic_regression,
    "the original's SVM as deployed": original_svm,
    "majority class": majority_class,
}


def measure(path, seeds, methods):
    """Return one row per method and seed: accuracy, macro F1, seconds, and what was chosen."""
    table = data.read_table(Path(path).read_bytes(), str(path))
    rows = []
    for seed in range(seeds):
        split = split_table(table, 0.3, seed)
        for name in methods:
            start = time.perf_counter()
            answers, chosen = METHODS[name](split, seed)
            rows.append(
                {
                    "model": name,
                    "seed": seed,
                    "accuracy": accuracy_score(split.y_test, answers),
                    "macro F1": f1_score(split.y_test, answers, average="macro"),
                    "seconds": time.perf_counter() - start,
                    "chosen": chosen,
                }
            )
            print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", help="path of a CSV with a column Target")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", help="part of the methods' names")
    options = parser.parse_args()
    chosen = [name for name in METHODS if not options.only or options.only in name]
    rows = measure(options.table, options.seeds, chosen)
    means = rows.groupby("model", sort=False)[["accuracy", "macro F1", "seconds"]].mean()
    print(
        f"\nMeans over {options.seeds} seeds, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}\n"
    )
    print("| model | accuracy | macro F1 | seconds |\n|---|---|---|---|")
    for name, row in means.iterrows():
        print(f"| {name} | {row.accuracy:.4f} | {row['macro F1']:.4f} | {row.seconds:.1f} |")


if __name__ == "__main__":
    main()
