"""Keeping a workspace and its safe copy in step: saving what is new, taking over what others saved.

What it does where both sides went on is in `helpers.colab.safe_copy`.
"""

import json
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from filelock import FileLock

from helpers.colab import contents
from helpers.colab.contents import DATABASES, UNFINISHED, SafeCopyError, top
from helpers.colab.history import UNREADABLE, History, Snapshot, TakenError
from helpers.display import notice
from helpers.workspace import Workspace, atomic_path, file_digest


@dataclass
class _View:
    """Both sides at one moment.

    Attributes
    ----------
    base : Snapshot or None
        What this workspace was last in step with.
    saved : dict of str to str
        The digests here at that time. A database's is not that of the snapshot after it was
        written into one in use.
    head : Snapshot or None
        The newest one in the folder.
    here : dict of str to pathlib.Path
        By path in the workspace, where to read what is there: a database's copy, or the file.
    digests : dict of str to str
        Of what is here.
    scratch : pathlib.Path
        Folder on the workspace's disk, for the moment.
    """

    base: Snapshot | None
    saved: dict
    head: Snapshot | None
    here: dict
    digests: dict
    scratch: Path

    def __post_init__(self):
        self.is_behind = self.head is not None and (
            self.base is None or self.head.id not in self.base.history
        )
        if self.is_behind and self.base and self.base.id not in self.head.history:
            # The folder has another line of history.
            self.base, self.saved = None, {}

    def has(self, path: str, where: list) -> bool:
        """Tell whether a file of the head is here, as it is there."""
        digest = self.digests.get(path)
        unchanged = self.base and self.base.files.get(path) == where
        return digest == where[1] or (unchanged and digest == self.saved[path])

    @property
    def has_unsaved(self) -> bool:
        """Whether something here is neither what was saved nor what the head has."""
        return any(
            digest not in (self.saved.get(path), self.head.files.get(path, (None, None))[1])
            for path, digest in self.digests.items()
        )


class SafeCopy:
    """The safe copy of a workspace in `folder`."""

    def __init__(self, workspace: Workspace, folder: Path, what: str):
        self.folder = folder
        self._root, self._what = workspace.root, what
        self._local = workspace.root / ".copy"
        if self.folder.is_relative_to(self._root):
            raise SafeCopyError(
                f"DRIVE_FOLDER {self.folder} is inside the workspace, which it is a copy of. "
                "Choose a folder outside."
            )
        self._history, self._digests = History(self.folder), {}
        self._local.mkdir(exist_ok=True)
        # Several processes may work in one workspace: notebooks 02 and 03, and helpers.run.
        self._lock = FileLock(self._local / "lock")

    def bring_up(self) -> str | None:
        """Bring the workspace up to the copy; return when that was saved, or None if it was.

        What was not saved here goes aside if the copy has gone on, and stays where it is if not.
        """
        with self._view("The workspace was not brought up to") as view:
            strangers = self._history.strangers()
            if strangers:
                notice(f"Not used, and left alone, in {self.folder}: {', '.join(strangers)}")
            if view.is_behind:
                aside = self._take_over(view)
                if aside:
                    notice(
                        f"This machine had work that was not saved, and {view.head.by} has saved "
                        f"number {view.head.number} meanwhile. That work is in {aside}, whole, and "
                        "the workspace is as the safe copy has it. Run the cell again that made "
                        "it, after this one.",
                        "warning",
                    )
                return view.head.time
            there = view.head.files if view.head else {}
            lost = {
                path: where
                for path, where in there.items()
                if path not in view.digests and top(path) not in UNFINISHED
            }
            if not lost:
                return None
            self._fetch(view, lost)
            self._set_base(view.base, view.saved | self._place(view, lost))
            return view.head.time

    def save(self, leaving: bool = False) -> None:
        """Save what is new under the next number; if nothing is, write nothing.

        Parameters
        ----------
        leaving : bool
            Whether the process ends: then nothing is said, and nothing put aside.

        Raises
        ------
        SafeCopyError
            If somebody else took the number: what was made here is aside then. If the folder is
            full or gone, or a database here is damaged: what was saved before is as it was.
        """
        saved = None
        try:
            with self._view("Not saved to") as view:
                if not view.is_behind:
                    saved = self._add(view)
                elif view.has_unsaved and not leaving:
                    aside = self._take_over(view)
                    raise SafeCopyError(
                        f"Not saved: while this step ran, {view.head.by} saved number "
                        f"{view.head.number} to {self.folder} from another machine. What this "
                        f"machine made is in {aside}, whole, and the workspace is as the safe copy "
                        "has it. Run the cell again, with those above it. For several people at "
                        "once there is the team server (README)."
                    )
        except TakenError:
            self.save(leaving)
        if saved and not leaving:
            print(f"Saved to {self.folder} (number {saved.number})")

    @contextmanager
    def _view(self, failed: str) -> Iterator[_View]:
        """Look at both sides, while other processes of this machine wait."""
        try:
            with self._lock, tempfile.TemporaryDirectory(dir=self._local) as folder:
                base, saved = self._base()
                head = self._head(base)
                here, digests = self._look(Path(folder))
                yield _View(base, saved, head, here, digests, Path(folder))
        except (OSError, sqlite3.Error) as error:
            raise SafeCopyError(
                f"{failed} {self.folder}: {getattr(error, 'strerror', None) or error}. What was "
                "saved before is as it was. Make room there or mount it again, then run this cell "
                "again."
            ) from error

    def _base(self) -> tuple[Snapshot | None, dict]:
        try:
            content = json.loads((self._local / "base.json").read_text(encoding="utf-8"))
            return Snapshot(**content["snapshot"]), content["here"]
        except UNREADABLE:
            # Nothing was saved yet, or by the version before.
            return None, {}

    def _set_base(self, snapshot: Snapshot, digests: dict) -> None:
        with atomic_path(self._local / "base.json") as path:
            text = json.dumps({"snapshot": asdict(snapshot), "here": digests})
            path.write_text(text, encoding="utf-8")

    def _head(self, base: Snapshot | None) -> Snapshot | None:
        numbers = self._history.numbers()
        if not numbers:
            return None
        try:
            return self._history.read(numbers[-1])
        except ValueError as error:
            if base is None or base.number != numbers[-1]:
                raise self._history.damage(numbers[-1], [str(error)]) from None
            notice(f"Damaged in {self.folder}: {error}. The next save repairs it.", "warning")
            # As if it held nothing: so there is something to save.
            return replace(base, files={})

    def _look(self, folder: Path) -> tuple[dict, dict]:
        """Return what is here and its digests, by path; databases are copied into `folder`."""
        here, digests = {}, {}
        # The databases first: the artifacts that they name are there by then.
        for name in DATABASES:
            if (self._root / name).is_file():
                here[name] = folder / name
                digests[name] = contents.back_up(self._root / name, folder / name)
        for path, source in contents.list_files(self._root):
            # Deleted meanwhile, such as a staging file.
            with suppress(FileNotFoundError):
                mark = contents.stamp(source)
                if self._digests.get(path, (None,))[0] != mark:
                    self._digests[path] = mark, file_digest(source)
                here[path], digests[path] = source, self._digests[path][1]
        return here, digests

    # --- from the folder to the workspace ---------------------------------------------------

    def _take_over(self, view: _View) -> Path | None:
        """Make the workspace what the head holds; return where what was not saved is now."""
        head, digests = view.head, dict(view.digests)
        wanted = {path: where for path, where in head.files.items() if not view.has(path, where)}
        self._fetch(view, wanted)
        aside = self._history.put_aside(head.number, view.here) if view.has_unsaved else None
        # Artifacts come before the databases that name them, and go after.
        digests |= self._place(view, wanted)
        # What others deleted goes, and what nobody saved. But a search goes on from its parts,
        # and of what the copy has nothing at all, such as a database, nothing is taken away.
        tops = {top(path) for path in head.files} - set(UNFINISHED)
        for path in view.here.keys() - head.files.keys():
            if path in view.saved or top(path) in tops:
                (self._root / path).unlink(missing_ok=True)
        self._set_base(head, {path: digests[path] for path in head.files})
        return aside

    def _fetch(self, view: _View, files: dict) -> None:
        """Fetch contents and look whether each may be put in its place; change nothing."""
        for path in files:
            own = self._root / path
            for place in [own, *own.parents[: path.count("/")]]:
                wrong_kind = place.is_dir() if place == own else place.is_file()
                if wrong_kind or place.is_symlink():
                    raise SafeCopyError(
                        f"{place} is in the way of {path} in the safe copy: a link, or a folder "
                        "where a file is to be, or a file for a folder. Move it out of the "
                        "workspace, then run this cell again; nothing was changed."
                    )
        damaged = self._history.fetch(files, view.scratch / "there")
        if damaged:
            raise self._history.damage(view.head.number, list(damaged.values()))

    def _place(self, view: _View, files: dict) -> dict[str, str]:
        """Put what was fetched into the workspace; return its digests there."""
        digests = {}
        for path in sorted(files, key=lambda path: path in DATABASES):
            source, own = view.scratch / "there" / path, self._root / path
            if path in DATABASES:
                contents.write_into(source, own)
                digests[path] = contents.back_up(own, source.with_suffix(".now"))
            else:
                own.parent.mkdir(parents=True, exist_ok=True)
                os.replace(source, own)
                digests[path] = files[path][1]
        return digests

    # --- from the workspace to the folder ---------------------------------------------------

    def _add(self, view: _View) -> Snapshot | None:
        """Write the next snapshot, unless nothing is new."""
        base, head, saved = view.base, view.head, view.saved
        for name in DATABASES:
            if name in saved and name not in view.here:
                raise SafeCopyError(
                    f"{self._root / name} is gone. Run the notebook again from the top: it is "
                    "fetched from the safe copy."
                )
        same = {path: base.files[path] for path in saved if saved[path] == view.digests.get(path)}
        if head is None:
            same = {}  # The folder is a new one.
        damaged = self._history.fetch(same)
        known = {path: where for path, where in same.items() if path not in damaged}
        new = {path: source for path, source in view.here.items() if path not in known}
        if not new and head and head.id == base.id and known == head.files:
            return None
        snapshot = self._history.add(head, self._what, known, new)
        now = {path: where[1] for path, where in snapshot.files.items() if path in new}
        self._set_base(snapshot, {path: now.get(path) or saved[path] for path in snapshot.files})
        if damaged:
            notice(f"Repaired in {self.folder}: {', '.join(sorted(set(damaged.values())))}")
        return snapshot
