"""Executed notebooks as pages: ``python -m helpers.run --html``."""

from helpers.series import STEPS
from helpers.workspace import Workspace, atomic_path

# Nothing is fetched when it is read, and a wide table sticks out rather than being cut.
PAGE = """{% extends 'index.html.j2' %}
{% block html_head_js_requirejs %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
{% block html_head_css %}<style>
.jp-OutputArea, .jp-OutputArea-child, .jp-OutputArea-output {overflow: visible}
</style>{% endblock %}
"""


def write_pages(workspace: Workspace, numbers: list[str]) -> None:
    """Write executed notebooks as HTML beside them, each one file that needs no other."""
    import nbformat
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(raw_template=PAGE)
    for number in numbers:
        notebook = workspace.executed / f"{STEPS[number].name}.ipynb"
        if not notebook.is_file():
            continue  # it needs what failed
        content = nbformat.read(notebook, nbformat.NO_CONVERT)
        for cell in content.cells:
            # Libraries' remarks go; what a reader must know is shown otherwise.
            cell["outputs"] = [o for o in cell.get("outputs", []) if o.get("name") != "stderr"]
        page, _ = exporter.from_notebook_node(content)
        with atomic_path(notebook.with_suffix(".html")) as path:
            path.write_text(page, encoding="utf-8")
