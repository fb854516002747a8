from types import SimpleNamespace

import pandas as pd
from sklearn.pipeline import make_pipeline

from helpers import monitoring, registry, serving
from helpers.models.interface import convert
from helpers.monitoring.drift import column_drift
from helpers.registry.reference import make_reference
from helpers.serving.app import Application
from helpers.serving.models import Models, load
from helpers.serving.recorder import Recorder
from helpers.tracking import column_kinds
from tests.conftest import split_frame
from tests.scoring import answer_of, fit_svm, serve_here


def test_demo_is_sent_once_and_kept_out_of_real_monitoring(watched, promoted):
    model = load(watched.name, registry.production_version(watched.name))
    app = Application(Models(model), Recorder(watched.workspace.scored_rows))
    with serve_here(app.starlette()) as url:
        client = serving.connect(url)
        done = monitoring.play_demo(watched.workspace, client, promoted.split)
        assert done.startswith(f"{watched.name} version 1: a demo of 10 periods")
        monitoring.play_demo(watched.workspace, client, promoted.split, "W")
        serving.ask(client, watched.name, promoted.split.X_test.head(7))
    demo = monitoring.monitor(watched.workspace, "W", demo=True).periods
    assert demo["rows"].tolist() == [250] * 10
    assert demo["labelled"].tolist() == [250] * 8 + [0] * 2
    assert demo["start"].diff().dropna().eq(pd.Timedelta(weeks=1)).all()
    # The rows of the later periods are hard, which labels say, and without them the estimate.
    assert demo["accuracy"][6:8].max() < demo["accuracy"][:6].min() - 0.05
    assert demo["estimated_accuracy"][6:].max() < demo["estimated_accuracy"][:6].min() - 0.05
    assert demo["alerts"][:6].sum() == 0
    assert demo["alerts"][6:].sum() > 0
    assert watched.runs() == []
    assert monitoring.alerts(watched.workspace).empty
    assert watched.tag() is None
    assert watched.monitor().periods["rows"].tolist() == [7]
    assert watched.tag().startswith("ok ")


def test_rehearsal_finds_something_and_writes_nothing(watched, promoted):
    model = registry.load_production(watched.name)
    found = monitoring.rehearse({watched.name: model}, promoted.split)
    assert found["message"].str.contains("accuracy").any()
    assert found["message"].str.contains("drifted").any()
    assert watched.runs() == []
    assert monitoring.alerts(watched.workspace).empty
    assert watched.tag() is None


def test_rehearsal_of_truths_sends_truths(small_frame):
    frame = small_frame(400)
    truths = {"long": frame["length"] > 1.5, "wide": frame["width"] > 7, "old": frame["age"] > 30}
    split = split_frame(frame[["Target"]].assign(**truths), categorical=())
    assert set(split.X_test.dtypes) == {truths["old"].dtype}
    classifier, kinds = make_pipeline(*fit_svm(split)), column_kinds(split.X_train)

    def predict(rows):
        return answer_of(classifier, convert(rows, kinds), split.labels)

    found = monitoring.rehearse({"a model": SimpleNamespace(predict=predict)}, split)
    assert found["message"].str.contains("old has drifted").any()
    # The scoring server keeps them as the numbers that they are to the model.
    reference = make_reference(split, predict(split.X_test))
    assert not column_drift(reference, split.X_train.astype("float64"))["drifted"].any()
