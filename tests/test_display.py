"""What an executed notebook shows: progress in one line, pictures once, texts in full."""

import nbformat
import pytest
from nbclient import NotebookClient
from nbconvert import HTMLExporter

from helpers.workspace import PROJECT_ROOT

CELLS = (
    "import pandas as pd\nfrom helpers import display, plots\ndisplay.set_up()",
    """with display.progress(200, "Working", "part") as bar:
    for step in range(200):
        bar.set_postfix_str(f"step {step}")
        bar.update()
        bar.refresh()""",
    """try:
    with display.progress(10, "Stopped") as bar:
        bar.update(4)
        raise KeyboardInterrupt
except KeyboardInterrupt:
    print("interrupted")""",
    """bar = display.progress(10, "Left open", advice=lambda: f"go on after {bar.n} of 10 parts")
bar.update(4)
import os, signal, time
os.kill(os.getpid(), signal.SIGINT)
time.sleep(60)""",
    """with display.progress(10, "Closed", advice=lambda: "go on here"):
    raise KeyboardInterrupt""",
    "raise KeyboardInterrupt",
    "plots.activity(pd.DataFrame({'user': ['ana'], 'kind': ['look']}))",
    "pd.DataFrame({'message': ['word ' * 60 + '$end$']})",
)
INTERRUPTED = {3: "go on after 4 of 10 parts", 4: "go on here", 5: "run the cell again"}


@pytest.fixture(scope="module")
def exported():
    """The cells executed, and their HTML."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in CELLS])
    for cell in INTERRUPTED:
        notebook.cells[cell].metadata["tags"] = ["raises-exception"]
    resources = {"metadata": {"path": str(PROJECT_ROOT)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    return notebook, HTMLExporter(exclude_input=True).from_notebook_node(notebook)[0]


def test_progress_is_one_line_in_an_exported_notebook(exported):
    notebook, page = exported
    (bar,) = notebook.cells[1].outputs
    assert "200/200" in bar.data["text/plain"]
    assert page.count("Working") == 1
    stopped, said = notebook.cells[2].outputs
    assert "4/10" in stopped.data["text/plain"]
    assert said.text == "interrupted\n"


def test_interrupted_cell_shows_one_sentence_and_closes_its_bar(exported):
    notebook, page = exported
    for cell, advice in INTERRUPTED.items():
        *bars, error = notebook.cells[cell].outputs
        assert error.traceback == [f"Interrupted: {advice}."]
        assert len(bars) == (cell < 5)
    assert "4/10" in notebook.cells[3].outputs[0].data["text/plain"]
    assert page.count("Left open") == page.count("Closed") == 1


def test_picture_appears_once_and_long_texts_in_full(exported):
    notebook, page = exported
    (picture,) = notebook.cells[6].outputs
    assert "image/png" in picture.data
    (table,) = notebook.cells[7].outputs
    assert "$end$" in table.data["text/html"]
    assert "tex2jax_ignore" in table.data["text/html"]
