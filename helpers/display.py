"""What a notebook shows besides tables: notices, and one look for all plots."""

import html
import os
import sys
from contextlib import contextmanager

import matplotlib
from matplotlib.figure import Figure

STDERR = 2  # number of the error stream
COLOURS = {"info": "#1f77b4", "good": "#2ca02c", "warning": "#ff7f0e", "bad": "#d62728"}


def _in_notebook():
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return getattr(shell, "kernel", None) is not None


@contextmanager
def silenced_libraries():
    """Keep what C++ libraries write to the error stream out of the notebook.

    TensorFlow reports there, before any of its settings takes effect, that there is no GPU.
    Python's own messages and exceptions are not affected.
    """
    kept, nowhere = os.dup(STDERR), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, STDERR)
    try:
        yield
    finally:
        os.dup2(kept, STDERR)
        os.close(kept)
        os.close(nowhere)


def notice(text, level="info"):
    """Show a message that cannot be overlooked.

    Parameters
    ----------
    text : str
        Plain text; line breaks are kept.
    level : {'info', 'good', 'warning', 'bad'}
        Decides the colour of the box. Outside a notebook the text is printed.
    """
    if not _in_notebook():
        print(text, flush=True)
        return
    from IPython.display import HTML, display

    style = f"border-left: 6px solid {COLOURS[level]}; padding: 0.4em 0.8em; margin: 0.4em 0"
    body = html.escape(text).replace("\n", "<br>")
    display(
        {"text/html": HTML(f'<div style="{style}">{body}</div>').data, "text/plain": text}, raw=True
    )


def new_figure(rows=1, columns=1, width=6.0, height=4.0, **options):
    """Make a figure with the series' fonts and sizes.

    Parameters
    ----------
    rows, columns : int
        Number of axes.
    width, height : float
        Size of the whole figure in inches.
    **options
        Passed to `matplotlib.figure.Figure.subplots`.

    Returns
    -------
    figure : matplotlib.figure.Figure
    axes : matplotlib.axes.Axes or numpy.ndarray of Axes
    """
    style = {
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.labelsize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        # Not by way of pyplot, which would show the figure a second time and keep it in memory.
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, **options)
