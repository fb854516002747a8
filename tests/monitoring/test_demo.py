from types import SimpleNamespace

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


def test_first_day_is_sent_once_with_its_labels(watched, promoted):
    model = load(watched.name, registry.production_version(watched.name))
    app = Application(Models(model), Recorder(watched.workspace.scored_rows))
    with serve_here(app.starlette()) as url:
        client = serving.connect(url)
        done = monitoring.play_first_day(watched.workspace, client, promoted.split)
        again = monitoring.play_first_day(watched.workspace, client, promoted.split)
    assert done == f"{watched.name} version 1: 450 rows and labels."
    assert "nothing sent" in again
    report = watched.monitor()
    assert report.periods["labelled"].tolist() == [450]
    assert report.current == []


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
