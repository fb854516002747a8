"""A copy of the workspace that outlives the machine: in Google Drive, a share, any folder.

A Colab machine disappears, and SQLite does not work reliably on a mounted Drive. So the series
works on the local disk and keeps a safe copy in a folder of the user's::

    FOLDER/snapshots/00012-3f9a….json   what the workspace held: where each file's content is
    FOLDER/packs/00012-3f9a….zip        the contents that were new then; an ordinary zip
    FOLDER/progress/                    training and search that are not finished
    FOLDER/machines/                    who works with it at the moment

Every file is written under another name and then renamed, the pack before the snapshot that
names it: a copy that is cut off leaves the earlier ones as they were. A snapshot names its
parents. Where two machines saved side by side there are two snapshots that nobody built upon;
whoever starts next puts them together (`helpers.colab.merge`), and nothing of either is lost.

Passwords, the server's users and logs are not copied: put passwords into Colab Secrets.
"""

import atexit
import hashlib
import json
import os
import shutil
import socket
import sqlite3
import tempfile
import threading
import time
import uuid
import zipfile
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

from helpers.colab import mount_drive
from helpers.colab.merge import close_runs, merge_scored, merge_tracking
from helpers.data import SPLIT_FILES, keep_previous, replace_split
from helpers.display import notice
from helpers.workspace import DRIVE, ProjectError, atomic_path, file_digest, in_colab

OFF = "off"

SPLIT = {f"data/{name}" for name in SPLIT_FILES}
DATABASES = ("tracking.db", "scored.db")
FILES = ("series",)
FOLDERS = ("data", "mlruns", "executed", "batch")
PROGRESS = ("search", "training")
KEPT = 10  # snapshots that others were built upon, but that stay for a while
KEPT_FOR = 24 * 3600  # seconds; a machine that was asleep may still build upon them
HEARTBEAT = 60  # seconds between two signs of life of a machine
SAVE_EVERY = 300  # seconds after which changes between two steps are saved, such as in the UI
GONE = 300  # seconds without one after which a machine counts as gone
MIRROR_EVERY = 2  # seconds between two looks for new parts of a search or a training
FORMAT = 1


class SafeCopyError(ProjectError):
    """The folder of the safe copy cannot be used, or what it holds is damaged."""


@dataclass(frozen=True)
class Snapshot:
    """What a workspace held at one moment.

    Attributes
    ----------
    name : str
        A number, larger than those of its parents, and a random ending.
    parents : list of str
        Names of the snapshots that it was built upon.
    time : float
        Seconds since the epoch.
    files : dict of str to list of (str, str)
        By path in the workspace: name of the pack, SHA-256 of the content.
    """

    name: str
    parents: list
    time: float
    files: dict

    @property
    def number(self):
        """The number in its name."""
        return int(self.name.split("-")[0])

    @property
    def digests(self):
        """SHA-256 by path."""
        return {path: digest for path, (_, digest) in self.files.items()}


# --- for the notebooks ------------------------------------------------------------------------


_running = {}  # the copy of each workspace that this process keeps


def start(workspace, folder, what):
    """Bring the workspace up to the safe copy, and keep the copy from now on.

    Parameters
    ----------
    workspace : helpers.workspace.Workspace
    folder : str or None
        Where the copy is; None or ``off``: there is none. In Colab, what begins with
        ``MyDrive/`` is in Google Drive.
    what : str
        Who uses it, such as the notebook's name; other machines are told.

    Returns
    -------
    SafeCopy or NoCopy

    Raises
    ------
    SafeCopyError
        If the folder cannot be written to, or what it holds is damaged.
    """
    if workspace.root in _running:
        # The cell was run again.
        _running.pop(workspace.root).release()
    place = _find_folder(folder)
    if place is None:
        if in_colab():
            print("There is no safe copy: nothing is kept when this machine goes (USE_DRIVE).")
        return NoCopy()
    copy = SafeCopy(workspace, place)
    taken = copy.restore()
    copy.hold(what)
    _running[workspace.root] = copy
    if taken:
        newest = max(snapshot.time for snapshot in taken)
        together = f", put together from {len(taken)} machines" if len(taken) > 1 else ""
        print(f"Restored what was saved at {_clock(newest)}{together} from {place}")
    else:
        print(f"Safe copy: {place}")
    return copy


def _find_folder(folder):
    if not folder or folder == OFF:
        return None
    if in_colab() and Path(folder).parts[0] == "MyDrive":
        if not mount_drive():
            raise SafeCopyError(
                "Google Drive is not mounted, and only a person can allow it. Run the first cell "
                "of a notebook in Colab with USE_DRIVE before, or set DRIVE_FOLDER to off."
            )
        return DRIVE / folder
    return Path(folder).expanduser().resolve()


def _clock(seconds):
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


class NoCopy:
    """Stands where no safe copy is wanted."""

    def save(self):
        """Do nothing."""


# --- the copy ---------------------------------------------------------------------------------


class SafeCopy:
    """The safe copy of a workspace.

    Parameters
    ----------
    workspace : helpers.workspace.Workspace
    folder : path-like
        Where; made if missing.

    Raises
    ------
    SafeCopyError
        If the folder cannot be written to.
    """

    def __init__(self, workspace, folder):
        self.workspace, self.folder = workspace, Path(folder)
        self._root, self._local = workspace.root, workspace.root / ".copy"
        self._packs, self._snapshots, self._progress, self._machines = (
            self.folder / name for name in ("packs", "snapshots", "progress", "machines")
        )
        if self.folder == self._root or self.folder.is_relative_to(self._root):
            raise SafeCopyError(
                f"DRIVE_FOLDER {self.folder} is inside the workspace, which it is a copy of. "
                "Choose a folder outside."
            )
        try:
            for place in (self._packs, self._snapshots, self._machines, self._local):
                place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise SafeCopyError(
                f"The folder of the safe copy {self.folder} is not writable ({error.strerror}). "
                "Is the Drive mounted? Choose another folder with DRIVE_FOLDER."
            ) from None
        # Keeps other processes away, and other threads of this one.
        self._lock = FileLock(self._local / "lock")
        self._mirroring = threading.Lock()
        self._read = {}
        self._digests, self._mirrored, self._ended = {}, {}, threading.Event()

    # --- snapshots --------------------------------------------------------------------------

    def snapshots(self):
        """Return all snapshots that are complete, by name, the oldest first."""
        paths = {path.stem: path for path in self._snapshots.glob("*.json")}
        for name in paths.keys() - self._read:
            # Renaming makes half a file impossible here, but not on every mounted drive; and
            # another machine may tidy up meanwhile.
            with suppress(ValueError, FileNotFoundError):
                self._read[name] = self._parse(paths[name].read_text(encoding="utf-8"))
        found = [each for name, each in self._read.items() if name in paths]
        return {each.name: each for each in sorted(found, key=lambda each: each.name)}

    def _parse(self, text):
        content = json.loads(text)
        if content.pop("format") > FORMAT:
            raise SafeCopyError(
                f"The safe copy {self.folder} was made by a newer version of this project. "
                "Update this one: run the first cell again on a new machine."
            )
        return Snapshot(**content)

    def _base(self):
        """Return what this workspace was last in step with: snapshots' names, and files."""
        path = self._local / "base.json"
        if not path.is_file():
            return {"names": [], "files": {}}
        return json.loads(path.read_text(encoding="utf-8"))

    def _set_base(self, names, files):
        with atomic_path(self._local / "base.json") as path:
            path.write_text(json.dumps({"names": sorted(names), "files": files}), encoding="utf-8")

    # --- saving -----------------------------------------------------------------------------

    def save(self):
        """Save what is new.

        Returns
        -------
        Snapshot or None
            None if nothing is new.

        Raises
        ------
        SafeCopyError
            If the folder is full or gone; what was saved before is as it was.
        """
        try:
            with self._lock:
                self.mirror()
                snapshot = self._save()
        except OSError as error:
            raise SafeCopyError(
                f"Not saved to {self.folder}: {error.strerror}. What was saved before is as it "
                "was. Make room there or mount it again, then run this cell again."
            ) from error
        if snapshot is not None:
            size = (self._packs / f"{snapshot.name}.zip").stat().st_size
            print(f"Saved to {self.folder} ({size / 1e6:.1f} MB new)")
        return snapshot

    def _save(self):
        every, base = self.snapshots(), self._base()
        name = f"{1 + max((s.number for s in every.values()), default=0):05d}-{uuid.uuid4().hex}"
        known = self._known(every)
        files, pack = {}, self._packs / f"{name}.zip"
        with tempfile.TemporaryDirectory(dir=self._local) as folder:
            # The databases first: the artifacts that they name are there by then.
            sources = {**_back_up(self._root, Path(folder)), **self._own_files()}
            temporary = Path(folder) / "pack.zip"
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
                for path, source in sources.items():
                    self._add(archive, name, path, source, files, known)
            if {path: digest for path, (_, digest) in files.items()} == base["files"]:
                return None
            _move(temporary, pack)
        snapshot = Snapshot(name, base["names"], time.time(), files)
        with atomic_path(self._snapshots / f"{name}.json") as path:
            path.write_text(json.dumps({"format": FORMAT, **asdict(snapshot)}), encoding="utf-8")
        self._set_base([name], snapshot.digests)
        self._tidy()
        return snapshot

    def _known(self, every):
        """Return the pack of each content by (path, SHA-256)."""
        packs = {path.stem for path in self._packs.glob("*.zip")}
        return {
            (path, digest): pack
            for snapshot in every.values()
            for path, (pack, digest) in snapshot.files.items()
            if pack in packs
        }

    def _own_files(self):
        found = {name: self._root / name for name in FILES if (self._root / name).is_file()}
        for name in FOLDERS:
            for path in sorted((self._root / name).rglob("*")):
                relative = path.relative_to(self._root)
                if path.is_file() and not any(part.startswith(".") for part in relative.parts):
                    found[relative.as_posix()] = path
        return found

    def _add(self, archive, name, path, source, files, known):
        """Note where the content of a file is, and add it to the pack where it is new."""
        try:
            status = source.stat()
            stamp = (status.st_size, status.st_mtime_ns)
            if self._digests.get(path, (None,))[0] != stamp:
                content = source.read_bytes()
                self._digests[path] = (stamp, hashlib.sha256(content).hexdigest())
            digest = self._digests[path][1]
            if (path, digest) not in known:
                content = source.read_bytes()
                digest = hashlib.sha256(content).hexdigest()
                archive.writestr(path, content)
                known[path, digest] = name
        except FileNotFoundError:
            # Deleted meanwhile, such as a staging file.
            return
        files[path] = (known[path, digest], digest)

    def _tidy(self):
        """Delete snapshots that others were built upon long ago, and packs nobody names."""
        every = self.snapshots()
        parents = {parent for each in every.values() for parent in each.parents}
        old = [
            each
            for each in [each for each in every.values() if each.name in parents][:-KEPT]
            if time.time() - each.time > KEPT_FOR
        ]
        for each in old:
            (self._snapshots / f"{each.name}.json").unlink(missing_ok=True)
            del every[each.name]
        needed = {pack for each in every.values() for pack, _ in each.files.values()}
        for path in [*self._packs.glob("*"), *self._snapshots.glob(".*.tmp")]:
            # A pack without a snapshot may be half of what another machine saves right now.
            with suppress(FileNotFoundError):
                if path.stem not in needed and time.time() - path.stat().st_mtime > KEPT_FOR:
                    path.unlink()

    # --- restoring --------------------------------------------------------------------------

    def restore(self):
        """Bring the workspace up to what the copy holds.

        What the workspace has already stays: what other machines made is added to it.

        Returns
        -------
        list of Snapshot
            Those that were taken over.

        Raises
        ------
        SafeCopyError
            If contents are missing or damaged; names the file.
        """
        with self._lock:
            every, names = self.snapshots(), self._base()["names"]
            parents = {parent for each in every.values() for parent in each.parents}
            known = _ancestors(every, names)
            heads = [each for each in every.values() if each.name not in parents]
            # The longest line first: its versions keep their numbers.
            taken = sorted(
                (each for each in heads if each.name not in known), key=lambda each: -each.number
            )
            for snapshot in taken:
                self._take_over(snapshot, _nearest(every, snapshot, names))
                after = _ancestors(every, [snapshot.name])
                names = [each for each in names if each not in after] + [snapshot.name]
                # One snapshot alone is what the workspace holds; several, no snapshot is.
                alone = len(names) == 1 and not self._base()["names"]
                self._set_base(names, snapshot.digests if alone else {})
            if (self._root / "tracking.db").is_file():
                close_runs(self._root / "tracking.db", self._alive())
            self._fetch_progress()
            return taken

    def _take_over(self, snapshot, base):
        with tempfile.TemporaryDirectory(dir=self._local) as folder:
            theirs, before = Path(folder) / "theirs", Path(folder) / "base"
            changed = {
                path: where
                for path, where in snapshot.files.items()
                if path in SPLIT or self._own_digest(path) != where[1]
            }
            self._extract(changed, theirs)
            was = {}
            if base is not None:
                was = base.digests
                databases = {path: base.files[path] for path in DATABASES if path in base.files}
                self._extract(databases, before)
            # Artifacts before the databases that name them.
            self._take_files(snapshot, was, changed, theirs)
            self._take_databases(theirs, before)
            self._take_split(snapshot, was, theirs)

    def _own_digest(self, path):
        own = self._root / path
        if path in DATABASES or not own.is_file():
            return None
        return file_digest(own)

    def _extract(self, files, folder):
        """Fetch contents out of their packs, each checked."""
        by_pack = {}
        for path, (pack, digest) in files.items():
            by_pack.setdefault(pack, []).append((path, digest))
        for pack, wanted in by_pack.items():
            place = self._packs / f"{pack}.zip"
            try:
                with zipfile.ZipFile(place) as archive:
                    for path, digest in wanted:
                        content = archive.read(path)
                        if hashlib.sha256(content).hexdigest() != digest:
                            raise zipfile.BadZipFile(path)
                        target = folder / path
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(content)
            except (zipfile.BadZipFile, KeyError, OSError) as error:
                raise SafeCopyError(
                    f"The safe copy is damaged: {place} ({error}) lacks {wanted[0][0]} or more. "
                    "If the Drive is still loading it, run this cell again in a minute; else look "
                    "for an earlier version of this file in the Drive's history."
                ) from error

    def _take_databases(self, theirs, before):
        numbers = {}
        for name in DATABASES:
            own, other, base = self._root / name, theirs / name, before / name
            if not other.is_file():
                continue
            if not own.is_file():
                os.replace(other, own)
                own.chmod(0o600)
            elif name == "tracking.db":
                numbers = merge_tracking(own, other, base if base.is_file() else None)
            else:
                merge_scored(own, other, numbers)

    def _take_files(self, snapshot, was, changed, theirs):
        for path in changed:
            own = self._root / path
            if path in DATABASES or path in SPLIT:
                continue
            if own.is_file() and not self._is_newer(path, snapshot, was):
                continue
            own.parent.mkdir(parents=True, exist_ok=True)
            # As old as it is: what is newer decides where both sides changed a file.
            os.utime(theirs / path, (snapshot.time, snapshot.time))
            os.replace(theirs / path, own)

    def _is_newer(self, path, snapshot, was):
        """Tell whether the file of a snapshot is to take the place of the one here."""
        if snapshot.digests[path] == was.get(path):
            return False  # changed here only
        unchanged_here = self._own_digest(path) == was.get(path)
        return unchanged_here or (self._root / path).stat().st_mtime < snapshot.time

    def _take_split(self, snapshot, was, theirs):
        """Take a split over as a whole: its parts belong together."""
        path = "data/manifest.json"
        if path not in snapshot.files or snapshot.digests[path] == self._own_digest(path):
            return
        if (self._root / path).is_file() and not self._is_newer(path, snapshot, was):
            if snapshot.digests[path] != was.get(path):
                keep_previous(theirs / "data", self._root / "data")
            return
        keep_previous(self._root / "data", self._root / "data")
        os.utime(theirs / path, (snapshot.time, snapshot.time))
        replace_split(theirs / "data", self._root / "data")

    # --- what is not finished ---------------------------------------------------------------

    def mirror(self):
        """Copy new parts of searches and trainings; forget those that are finished here."""
        with self._mirroring:
            there = {}
            for name in PROGRESS:
                for source in (self._root / name).rglob("*"):
                    with suppress(FileNotFoundError):
                        if source.suffix not in (".part", ".tmp") and source.is_file():
                            there[source.relative_to(self._root)] = source.stat().st_mtime_ns
            for path in there:
                if there[path] != self._mirrored.get(path):
                    with suppress(FileNotFoundError):
                        _copy_newer(self._root / path, self._progress / path)
            for path in self._mirrored.keys() - there:
                (self._progress / path).unlink(missing_ok=True)
            self._mirrored = there

    def _fetch_progress(self):
        for source in self._progress.rglob("*"):
            if source.is_file() and not source.name.endswith(".tmp"):
                path = source.relative_to(self._progress)
                with suppress(FileNotFoundError):
                    _copy_newer(source, self._root / path)
                    self._mirrored[path] = (self._root / path).stat().st_mtime_ns

    # --- who uses it ------------------------------------------------------------------------

    @property
    def machine(self):
        """Name of this machine, kept on its local disk."""
        path = self._local / "machine"
        if not path.is_file():
            path.write_text(uuid.uuid4().hex, encoding="utf-8")
        return path.read_text(encoding="utf-8")

    def machines(self):
        """Return the notes of other machines: ``host``, ``what``, ``seen`` by name."""
        found = {}
        for path in self._machines.glob("*.json"):
            with suppress(ValueError, FileNotFoundError):
                if path.stem != self.machine:
                    found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def hold(self, what):
        """Note that this machine uses the copy, until the process ends; say who else does.

        Parameters
        ----------
        what : str
            Such as the notebook's name.
        """
        now = time.time()
        for note in self.machines().values():
            minutes = (now - note["seen"]) / 60
            if now - note["seen"] < GONE:
                notice(
                    f"{note['what']} on another machine ({note['host']}) uses this copy, too; "
                    f"last sign of life {minutes:.0f} minutes ago. Both may go on: what they make "
                    "comes together when the next notebook starts. If that machine is gone, there "
                    f"is nothing to do: it is forgotten after {GONE // 60} minutes.",
                    "warning",
                )
            else:
                notice(
                    f"{note['what']} on another machine ({note['host']}) ended without a word at "
                    f"{_clock(note['seen'])}. What it had saved is here; a run that it left open "
                    "is marked as killed; run its notebook again, and it goes on from its last "
                    "checkpoint.",
                    "warning",
                )
        self._forget_gone()
        self.touch(what)
        self._beat = threading.Thread(target=self._live, args=(what,), daemon=True)
        self._beat.start()
        atexit.register(self.release)

    def _alive(self):
        """Return the host names of the machines that are not gone, this one included."""
        notes = self.machines().values()
        alive = {note["host"] for note in notes if time.time() - note["seen"] < GONE}
        return alive | {socket.gethostname()}

    def _forget_gone(self):
        for name, note in self.machines().items():
            if time.time() - note["seen"] >= GONE:
                (self._machines / f"{name}.json").unlink(missing_ok=True)

    def touch(self, what):
        """Give a sign of life: note who uses the copy on this machine."""
        note = {"host": socket.gethostname(), "what": what, "seen": time.time()}
        with atomic_path(self._machines / f"{self.machine}.json") as path:
            path.write_text(json.dumps(note), encoding="utf-8")

    def _live(self, what):
        last = saved = time.monotonic()
        while not self._ended.wait(MIRROR_EVERY):
            # A Drive that is away for a moment must not end the notebook's work.
            with suppress(OSError, sqlite3.Error, SafeCopyError):
                self.mirror()
                if time.monotonic() - last > HEARTBEAT:
                    self.touch(what)
                    last = time.monotonic()
                if time.monotonic() - saved > SAVE_EVERY:
                    with self._lock:
                        self._save()
                    saved = time.monotonic()

    def release(self):
        """Say that this machine does not use the copy any more."""
        self._ended.set()
        self._beat.join()
        atexit.unregister(self.release)
        with suppress(OSError):
            self.mirror()
            (self._machines / f"{self.machine}.json").unlink(missing_ok=True)


def _ancestors(every, names):
    """Return the names of snapshots and of all that they were built upon."""
    found, waiting = set(), list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += every[name].parents if name in every else []
    return found


def _nearest(every, snapshot, names):
    """Return the newest snapshot that both sides were built upon, or None."""
    common = _ancestors(every, names) & _ancestors(every, [snapshot.name])
    known = [every[name] for name in common if name in every]
    return max(known, key=lambda each: each.number, default=None)


def _back_up(root, folder):
    """Copy the databases, which may be in use, as of one moment (SQLite's online backup)."""
    copies = {}
    for name in DATABASES:
        if (root / name).is_file():
            copies[name] = folder / name
            with (
                closing(sqlite3.connect(root / name)) as live,
                closing(sqlite3.connect(folder / name)) as copy,
            ):
                live.backup(copy)
                # One file: the copy must not depend on a journal beside it.
                copy.execute("PRAGMA journal_mode = DELETE")
    return copies


def _move(source, target):
    """Bring a file to another file system, whole or not at all."""
    with atomic_path(target) as temporary, source.open("rb") as file, temporary.open("wb") as out:
        shutil.copyfileobj(file, out, 2**20)
        out.flush()
        os.fsync(out.fileno())


def _copy_newer(source, target):
    """Copy a file unless a copy is there that is not older."""
    when = source.stat().st_mtime
    if target.is_file() and target.stat().st_mtime >= when:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)
        os.utime(temporary, (when, when))
