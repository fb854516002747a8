"""The project itself: documents that say what the code does, notebooks that read well."""

import ast
import json
import re
import subprocess
import sys

import pytest

from helpers.workspace import PROJECT_ROOT

DOCUMENTS = (
    "README.md",
    "helpers/README.md",
    "notebooks/walkthrough.md",
    ".github/CONTRIBUTING.md",
)
IN_SPANISH = {
    "README.md": "README.es.md",
    "notebooks/walkthrough.md": "notebooks/walkthrough.es.md",
}
NETWORKS, PICTURES = {"tensorflow", "keras"}, {"matplotlib", "seaborn"}
NOTEBOOKS = sorted((PROJECT_ROOT / "notebooks").glob("*.ipynb"))
NOTEBOOK_IMAGES = sorted((PROJECT_ROOT / "notebooks" / "images").iterdir())


def code_cells(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def code_lines(cell):
    """Return the lines of a code cell that are neither blank nor a comment alone."""
    lines = map(str.strip, "".join(cell["source"]).splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def read(name):
    return (PROJECT_ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [*DOCUMENTS, *IN_SPANISH.values()])
def test_document_names_no_file_that_is_not_there(name):
    text, folder = read(name), (PROJECT_ROOT / name).parent
    named = set(re.findall(r"(?<![/\w])((?:helpers|notebooks|tests)/[\w./]*\w)", text))
    links = re.findall(r'(?:\]\(|src=")([^)"#]+)', text)
    there = [PROJECT_ROOT / each for each in named]
    there += [folder / each for each in links if not each.startswith("http")]
    assert there
    assert [path for path in there if not path.exists()] == []


def test_every_picture_is_in_a_document():
    shown = "".join(map(read, DOCUMENTS))
    assert [p.name for p in NOTEBOOK_IMAGES if p.name not in shown] == []


def test_readme_has_at_most_200_lines():
    for name in ("README.md", "README.es.md"):
        assert len(read(name).splitlines()) <= 200


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_without_outputs_and_with_a_sentence_before_each_cell(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert cells[0]["cell_type"] == "markdown"
    for before, cell in zip(cells, cells[1:], strict=False):
        if cell["cell_type"] == "code":
            assert before["cell_type"] == "markdown"
            assert not cell["outputs"]
            assert cell["execution_count"] is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_and_functions_are_short(path):
    for cell in code_cells(path):
        source = "".join(cell["source"])
        assert len(source.splitlines()) <= 20, source
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno < 5, node.name


def test_first_cell_is_a_short_form_and_the_same_in_all_notebooks():
    firsts = [code_cells(path)[0] for path in NOTEBOOKS]
    assert len({"".join(cell["source"]) for cell in firsts}) == 1
    assert len(code_lines(firsts[0])) <= 17
    for cell in firsts:
        # Collapsed in Colab, and in JupyterLab.
        assert cell["metadata"]["cellView"] == "form"
        assert cell["metadata"]["jupyter"]["source_hidden"] is True


def is_set_up(cell, line):
    """Tell whether a line prepares the notebook rather than doing what its title says."""
    source = "".join(cell["source"])
    pyngrok_cell = "tunnel.opening(" in source
    return pyngrok_cell or "open_notebook(" in line or line.startswith("from helpers")


def test_at_least_half_of_the_lines_do_what_the_title_says():
    # The parameters are of the title's subject; who reads them learns what can be chosen.
    for path in NOTEBOOKS:
        first, *others = code_cells(path)
        lines = [(cell, line) for cell in others for line in code_lines(cell)]
        set_up = len(code_lines(first)) + sum(is_set_up(*each) for each in lines)
        assert set_up <= len(lines) + len(code_lines(first)) - set_up, path.stem


@pytest.mark.parametrize(
    ("modules", "libraries"),
    [
        ("helpers.registry, helpers.models.svm, helpers.run, helpers.data", NETWORKS),
        ("helpers.tracking, helpers.models.interface", NETWORKS | PICTURES),
        ("helpers.serving.app", NETWORKS | PICTURES),
    ],
)
def test_nobody_waits_for_the_import_of_libraries_that_are_not_needed(modules, libraries):
    code = f"import sys, {modules}; assert not {libraries} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PROJECT_ROOT)


def test_requirements_name_every_library_that_the_helpers_import():
    lines = (PROJECT_ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    named = {re.match(r"[\w.-]+", line).group() for line in lines if line and line[0] != "#"}
    imported = set()
    for path in (PROJECT_ROOT / "helpers").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    packages = {
        "sklearn": "scikit-learn",
        "art": "adversarial-robustness-toolbox",
        "ai_edge_litert": "ai-edge-litert",
    }
    # Keras, joblib and threadpoolctl come with TensorFlow and scikit-learn, IPython and what
    # handles notebooks with ipykernel, papermill and jupyter, the database's tools, a cache and
    # Jinja with MLflow; pexpect with IPython where there is a Drive to mount.
    brought = {"keras", "joblib", "IPython", "jupyter_client", "nbformat", "nbconvert", "google"}
    brought |= {"alembic", "sqlalchemy", "packaging", "cloudpickle", "cachetools", "pexpect"}
    brought |= {"jinja2", "threadpoolctl"}
    foreign = imported - set(sys.stdlib_module_names) - {"helpers"} - brought
    assert {packages.get(name, name) for name in foreign} <= named


def _shape(text):
    """Return what both languages share: commands, pictures, links, and the names in tables."""
    return {
        "commands": re.findall(r"^```(?:bash|python)\n.*?^```$", text, re.M | re.S),
        "pictures": re.findall(r'(?:src="|!\[[^]]*\]\()([^")]+\.png)', text),
        "links": re.findall(r"https?://[^\s)>,;]+", text),
        "files": sorted(re.findall(r"\b(?:helpers|notebooks|tests)/[\w./]*\w", text)),
        "rows": re.findall(r"^\| (`[^|]*`) \|", text, re.M),
        "headings": re.findall(r"^#+(?= )", text, re.M),
    }


@pytest.mark.parametrize("name", IN_SPANISH)
def test_spanish_document_has_the_commands_pictures_and_tables_of_the_english_one(name):
    english, spanish = _shape(read(name)), _shape(read(IN_SPANISH[name]))
    assert len(english["pictures"]) >= 3
    # Each links to the document in its own language.
    spanish["files"] = [each.replace(".es.md", ".md") for each in spanish["files"]]
    for part, content in english.items():
        assert spanish[part] == content, part
