"""Why a model answers as it does: which columns decide in general, and in single rows.

Both are asked of the model as its clients see it, raw columns in and probabilities out, so the
same code serves any model. In general: how much worse its answers get when a column is shuffled
(permutation importance [1]_). In a row: what each value adds to a probability (Shapley values
[2]_, sampled as in [3]_: shap's other explainer of any model spends seconds on compiling first).

References
----------
.. [1] L. Breiman (2001). *Random Forests*. Machine Learning 45. doi:10.1023/A:1010933404324
.. [2] S. M. Lundberg, S.-I. Lee (2017). *A Unified Approach to Interpreting Model Predictions*.
   NeurIPS. arXiv:1705.07874
.. [3] E. Štrumbelj, I. Kononenko (2014). *Explaining prediction models and individual predictions
   with feature contributions*. Knowledge and Information Systems 41.
   doi:10.1007/s10115-013-0679-x
"""

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import joblib
import mlflow
import numpy as np
import pandas as pd
from mlflow.pyfunc import PyFuncModel
from sklearn.inspection import permutation_importance
from sklearn.metrics import log_loss

from helpers.data import Split, most_telling
from helpers.registry.groups import alarm_label
from helpers.registry.production import LOAD_ERRORS

if TYPE_CHECKING:
    from shap import Explanation as ShapValues

    from helpers.registry.candidates import Candidate

SHUFFLED_ROWS = 150  # test rows in which each column is shuffled
REPEATS = 3  # times that it is
SAMPLES = 40  # orders of the columns in which each value of a row is put in place
BACKGROUND_ROWS = 100  # training rows whose values stand for "not known"
MOST_NAMED = 3  # columns named in a sentence
MOST_EXPLAINED = 40  # columns that are shuffled and explained; the others stay as they are


@dataclass(frozen=True)
class Explanation:
    """Why a model answers as it does.

    Attributes
    ----------
    importance : pandas.DataFrame
        By column, the most important first: ``mean`` and ``std`` over the shuffles of how much
        the log loss rises; of many columns, the most telling ones.
    n_columns : int
        How many the table has.
    rows : dict of str to shap.Explanation
        By description of a test row: what its values add to the probability of `label`.
    label : str or int
        The class whose probability is explained.
    """

    importance: pd.DataFrame
    n_columns: int
    rows: "dict[str, ShapValues]"
    label: str | int

    @property
    def deciding(self) -> pd.DataFrame:
        """The columns whose importance is more than chance: above two standard deviations."""
        return self.importance[self.importance["mean"] > 2 * self.importance["std"]]

    def __str__(self):
        some = self.deciding
        if some.empty:
            return "No column decides: shuffling any of them changes nothing beyond chance."
        named = [f"{name} (+{row['mean']:.2f})" for name, row in some.head(MOST_NAMED).iterrows()]
        shown, all_of_them = len(self.importance), f"{self.n_columns:,} columns"
        of = (
            all_of_them if shown == self.n_columns else f"the {shown} most telling of {all_of_them}"
        )
        return (
            f"What decides most: {', '.join(named)}; in brackets, how much the log loss rises when "
            f"the column is shuffled. Of {of} {len(some)} matter beyond chance."
        )


class _Classifier:
    """A logged model as scikit-learn and shap see one."""

    def __init__(self, model: PyFuncModel, split: Split):
        # Without MLflow's checks, which take longer than the model for a few rows.
        self._model = model.unwrap_python_model()
        self._names = [f"probability_{label}" for label in split.labels]
        rows = pd.concat([split.X_train, split.X_test])
        self._texts = {n: pd.Index(rows[n].dropna().unique()) for n in rows.select_dtypes(object)}
        self._columns = rows.columns

    def fit(self, X, y):
        """Do nothing: the model is trained already."""

    def predict_proba(self, X: pd.DataFrame) -> np.ndarray:
        return self._model.predict(None, X)[self._names].to_numpy()

    def encode(self, X: pd.DataFrame) -> np.ndarray:
        """Return rows as numbers, with which shap calculates; texts by their place."""
        codes = {name: texts.get_indexer(X[name]) for name, texts in self._texts.items()}
        return X.assign(**codes).to_numpy("float64")

    def decode(self, numbers: np.ndarray) -> pd.DataFrame:
        """Return the rows of what `encode` returned."""
        X = pd.DataFrame(np.atleast_2d(numbers), columns=self._columns)
        for name, texts in self._texts.items():
            # A missing text has the place -1.
            X[name] = np.append(texts.to_numpy(object), None)[X[name].astype(int)]
        return X


def explain(model: PyFuncModel, split: Split, answer: pd.DataFrame, label=None) -> Explanation:
    """Explain a model on test rows.

    Parameters
    ----------
    answer : pandas.DataFrame
        Its answer to the test rows.
    label
        The class whose probability is explained in single rows; None: the rarest one.
    """
    if label is None:
        label = split.y_train.value_counts().idxmin()
    classifier, columns = _Classifier(model, split), _looked_at(split)
    importance = _importance(classifier, split, columns)
    rows = _explain_rows(classifier, split, answer, label, columns)
    return Explanation(importance, len(split.X_test.columns), rows, label)


def _looked_at(split: Split) -> list[str]:
    """Return the columns that are explained: of many, the most telling numbers and some codes."""
    X, codes = split.X_train, list(split.categorical)
    if len(X.columns) <= MOST_EXPLAINED:
        return list(X.columns)
    telling = most_telling(X[list(split.numeric)], split.y_train)
    return [*codes[: MOST_EXPLAINED // 2], *telling][:MOST_EXPLAINED]


def _importance(classifier: _Classifier, split: Split, columns: list[str]) -> pd.DataFrame:
    def score(classifier, shuffled, y):
        chances = classifier.predict_proba(X.assign(**shuffled))
        return -log_loss(y, chances, labels=split.labels)

    # Not by `max_samples`, which compares the scores of samples with that of all rows.
    X = split.X_test.sample(min(SHUFFLED_ROWS, len(split.X_test)), random_state=0)
    options = {"scoring": score, "n_repeats": REPEATS, "random_state": 0}
    with joblib.parallel_config("threading", n_jobs=-1):
        found = permutation_importance(classifier, X[columns], split.y_test[X.index], **options)
    table = {"mean": found.importances_mean, "std": found.importances_std}
    index = pd.Index(columns, name="column")
    return pd.DataFrame(table, index).sort_values("mean", ascending=False)


def _explain_rows(
    classifier: _Classifier, split: Split, answer: pd.DataFrame, label, columns: list[str]
) -> dict:
    import shap  # here: it takes seconds to import

    places, number = _chosen(split, answer, label), split.labels.index(label)
    rows = split.X_test.iloc[list(places.values())]
    background = split.X_train.sample(min(BACKGROUND_ROWS, len(split.X_train)), random_state=0)
    known = classifier.encode(background)
    looked = rows.columns.get_indexer(columns)
    found = {}
    every = zip(places, rows[columns].to_numpy(), classifier.encode(rows), strict=True)
    for title, row, codes in every:

        def probability(numbers, codes=codes):
            whole = np.tile(codes, (len(numbers), 1))
            whole[:, looked] = numbers
            return classifier.predict_proba(classifier.decode(whole))[:, number]

        np.random.seed(0)  # shap draws from this generator
        explainer = shap.SamplingExplainer(probability, known[:, looked])
        values = explainer.shap_values(codes[looked], nsamples=SAMPLES * len(columns), silent=True)
        found[title] = shap.Explanation(
            values, float(explainer.expected_value), row, feature_names=columns
        )
    return found


def _chosen(split: Split, answer: pd.DataFrame, label) -> dict[str, int]:
    """Return the positions of some telling test rows, by what they are."""
    probability = answer[f"probability_{label}"].to_numpy()
    right, truth = answer["prediction"].to_numpy() == split.y_test, split.y_test == label
    surest = np.where(right & truth, probability, -1).argmax()
    closest = np.abs(probability - 0.5).argmin()
    mistake = np.abs(probability - truth).argmax()
    return {
        "the surest right alarm": int(surest),
        "the closest decision": int(closest),
        "the worst mistake": int(mistake),
    }


def explain_candidates(
    candidates: dict[str, "Candidate"], alarm_class: str | None
) -> dict[str, Explanation]:
    """Explain each candidate, log it with its run, and set it in the candidate.

    Candidates that do not load are left out of what is returned. `alarm_class` is as in
    `helpers.registry.groups.alarm_label`; its probability is explained.

    Raises
    ------
    ParameterError
        If the table lacks the class; before anything is logged.
    """
    for candidate in candidates.values():
        candidate.explanation, label = None, alarm_label(candidate.split.labels, alarm_class)
        # A candidate that does not load is refused by the checks, which say why.
        with suppress(*LOAD_ERRORS):
            candidate.explanation = explain(
                candidate.model, candidate.split, candidate.answer, label
            )
    explained = {name: each.explanation for name, each in candidates.items() if each.explanation}
    for name, explanation in explained.items():
        _log(candidates[name].run.info.run_id, explanation, name)
    return explained


def _log(run_id: str, explanation: Explanation, name: str) -> None:
    # Here: the scoring server, which needs no pictures, starts sooner.
    from helpers import plots

    client = mlflow.MlflowClient()
    client.log_text(run_id, explanation.importance.to_csv(), "explanation/importance.csv")
    client.log_figure(run_id, plots.importance(explanation, name), "explanation/importance.png")
    for title, values in explanation.rows.items():
        path = f"explanation/{title.removeprefix('the ').replace(' ', '_')}"
        client.log_figure(run_id, plots.waterfall(explanation, title, name), f"{path}.png")
        added = pd.DataFrame({"value": values.data, "adds": values.values}, values.feature_names)
        client.log_text(run_id, added.rename_axis("column").to_csv(), f"{path}.csv")
