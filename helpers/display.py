"""What a notebook shows besides tables and pictures: notices and progress."""

import html
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal
from weakref import WeakSet

from tqdm import tqdm

from helpers.workspace import kernel

STDERR = 2  # number of the error stream
# Of seaborn's colour-blind palette, as in the pictures.
COLOURS = {"info": "#0173b2", "good": "#029e73", "warning": "#de8f05", "bad": "#d55e00"}


def set_up() -> None:
    """Have tables show texts in full, pictures below their cell, and one line after an interrupt.

    Texts from outside stay as they are: nothing between two dollar signs becomes a formula.
    """
    import pandas as pd

    pd.set_option("display.max_colwidth", None, "display.html.use_mathjax", False)
    if kernel() is not None:
        from IPython import get_ipython

        get_ipython().run_line_magic("matplotlib", "inline")
        get_ipython().set_custom_exc((KeyboardInterrupt,), _show_interrupt)


def _show_interrupt(shell, kind, error, trace, tb_offset=None) -> None:
    """Show how to go on after an interrupt in place of its traceback; close what bars are open."""
    for bar in list(_open_bars):
        # Where no `with` closes it, as in Keras' callbacks.
        bar.__exit__(kind, error, trace)
    advice = getattr(error, "advice", "run the cell again")
    error._render_traceback_ = lambda: [f"Interrupted: {advice}."]
    shell.showtraceback((kind, error, trace))


_open_bars = WeakSet()


class progress(tqdm):  # noqa: N801 - used like a function, as tqdm itself
    """A bar that stays one line: in a notebook an output that is updated in place.

    tqdm writes to the error stream, whose every step an executed notebook keeps.

    Parameters
    ----------
    total
        Steps to do.
    desc
        What is being done.
    unit
        What a step is.
    advice
        What to do if the cell is interrupted meanwhile; default: run it again.
    **options
        Of `tqdm.tqdm`.
    """

    def __init__(
        self,
        total: int,
        desc: str,
        unit: str = "it",
        advice: Callable[[], str] | None = None,
        **options,
    ):
        self._handle, self._shown, self._advice = None, kernel() is not None, advice
        if self._shown:
            # What moves a terminal's cursor is for nobody.
            options |= {"file": io.StringIO(), "ascii": False}
        shape = {"total": total, "desc": desc, "unit": unit, "ncols": 90, "mininterval": 0.5}
        super().__init__(**shape, **options)
        _open_bars.add(self)

    def __exit__(self, kind, error, trace):
        """Close the bar; an interrupt takes the advice along."""
        if isinstance(error, KeyboardInterrupt) and self._advice:
            error.advice = self._advice()
        super().__exit__(kind, error, trace)

    def close(self) -> None:
        """Leave the bar as it is."""
        _open_bars.discard(self)
        super().close()

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Show the line as it is now."""
        if not self._shown:
            super().display(msg, pos)
            return
        from IPython.display import display

        line = {"text/plain": str(self) if msg is None else msg}
        if self._handle is None:
            self._handle = display(line, raw=True, display_id=True)
        else:
            self._handle.update(line, raw=True)


@contextmanager
def silenced_libraries() -> Iterator[None]:
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


def notice(text: str, level: Literal["info", "good", "warning", "bad"] = "info") -> None:
    """Show a message that cannot be overlooked: in a coloured box, outside a notebook printed.

    It is plain text; line breaks are kept.
    """
    if kernel() is None:
        print(text, flush=True)
        return
    from IPython.display import display

    style = f"border-left: 6px solid {COLOURS[level]}; padding: 0.4em 0.8em; margin: 0.4em 0"
    body = html.escape(text).replace("\n", "<br>")
    # The classes keep MathJax from taking "$" for a formula.
    page = f'<div class="tex2jax_ignore mathjax_ignore" style="{style}">{body}</div>'
    display({"text/html": page, "text/plain": text}, raw=True)
