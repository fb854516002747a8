"""What every notebook does after its parameters: check them, open the workspace, save it."""

from helpers import server
from helpers.colab import safe_copy
from helpers.colab.safe_copy import NoCopy, SafeCopy
from helpers.display import notice, set_up
from helpers.locks import hold
from helpers.settings import check_parameters, declared_parameters
from helpers.workspace import Workspace, open_workspace

WITHOUT_SERVER = "01"  # the notebook that logs nothing


def open_notebook(name: str, namespace: dict) -> tuple[Workspace, SafeCopy | NoCopy]:
    """Check a notebook's parameters, open its workspace and start what goes on beside it.

    One kernel at a time runs a step of a workspace: who comes second waits for the first to end.

    Parameters
    ----------
    name : str
        Of the notebook, such as ``02_cnn_training``.
    namespace : dict
        The notebook's ``globals()``. The parameters in it are replaced by their checked values.

    Returns
    -------
    workspace : helpers.workspace.Workspace
    copy : helpers.colab.safe_copy.SafeCopy or helpers.colab.safe_copy.NoCopy
        The safe copy; ``copy.save()`` brings it up to date.

    Raises
    ------
    helpers.workspace.ParameterError
        If a value cannot be used; names the parameter.
    helpers.workspace.WorkspaceError, helpers.colab.safe_copy.SafeCopyError
        If the workspace or the safe copy cannot be used.
    """
    given = {each: namespace[each] for each in declared_parameters() if each in namespace}
    checked = check_parameters(**given)
    namespace.update(checked)
    set_up()
    workspace = open_workspace(checked.get("WORKSPACE"))
    print("Workspace:", workspace.root)
    hold(workspace, [name[:2]], f"an open notebook, {name}", say=notice)
    copy = safe_copy.start(workspace, checked.get("DRIVE_FOLDER"), name)
    if not name.startswith(WITHOUT_SERVER):
        # It takes seconds to start: time in which the reader, or the notebook, goes on.
        server.start(workspace, wait=False)
    return workspace, copy
