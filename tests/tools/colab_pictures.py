"""Make the README's pictures of the way through Colab.

``python -m tests.tools.colab_pictures EXECUTED_NOTEBOOK``: the first cell's form is drawn from the
notebook itself, outputs are those of the executed notebook (02, with a safe copy).
"""

import html
import json
import re
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from helpers.series import STEPS
from helpers.workspace import PROJECT_ROOT
from tests.tools.walkthrough import find_browser

IMAGES = PROJECT_ROOT / "notebooks" / "images"
SHOWN = ("open_notebook(", "start_run(")  # the cells of 02 whose outputs are shown
STYLE = """
body { font: 15px sans-serif; margin: 0; padding: 16px; background: white; color: #222 }
.cell { background: #f7f7f7; border-radius: 6px; padding: 10px 14px; margin-bottom: 6px }
pre { font: 13px monospace; white-space: pre-wrap; margin: 0 }
.out { padding: 6px 14px 14px 14px }
.field { display: flex; gap: 12px; align-items: center; margin: 6px 0 14px 0 }
.field b { font: 14px monospace; width: 110px }
.box { flex: 1; border: 1px solid #bbb; border-radius: 4px; padding: 5px 8px; background: white;
       color: #999; min-height: 18px }
"""


def form(source):
    """Draw the fields of a cell: its title and its parameters."""
    lines = []
    for line in source.splitlines():
        title = re.match(r"# @title (.*?) \{", line)
        field = re.match(r"(\w+) = (.*?)  # @param", line)
        if title:
            lines.append(f"<h3>▶ {html.escape(title[1])}</h3>")
        elif field:
            shown = "☑" if field[2] == "True" else '<span class="box">&quot; &quot;</span>'
            lines.append(f'<div class="field"><b>{field[1]}</b>{shown}</div>')
    return f'<div class="cell">{"".join(lines)}</div>'


def outputs(notebook):
    """Show two cells of an executed notebook, with what they printed."""
    parts = []
    for cell in json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and any(part in source for part in SHOWN):
            texts = ["".join(each.get("text", "")) for each in cell["outputs"]]
            text = "".join(texts).split("\r")[-1].strip()
            parts.append(f'<div class="cell"><pre>{html.escape(source)}</pre></div>')
            parts.append(f'<div class="out"><pre>{html.escape(text)}</pre></div>')
    return "".join(parts)


def main(notebook):
    """Make both pictures."""
    path = PROJECT_ROOT / "notebooks" / f"{STEPS['01'].name}.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    first = next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    pages = {
        "colab_first_cell": (form(first), 760),
        "colab_restored": (outputs(notebook), 900),
    }
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        for name, (body, width) in pages.items():
            page = browser.new_page(viewport={"width": width, "height": 200})
            page.set_content(f"<style>{STYLE}</style>{body}")
            page.screenshot(path=IMAGES / f"{name}.png", full_page=True)
            print(IMAGES / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
