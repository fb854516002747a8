"""The folder of a safe copy: one line of snapshots, and the packs that hold their contents.

A snapshot lists what a workspace held; a pack, an ordinary zip, holds the contents that were new
then. Every file is written under another name and then renamed, the pack before the snapshot
that names it: what is cut off leaves everything as it was. Nothing that is read is believed:
files may be empty, cut off, another program's, or missing.
"""

import hashlib
import json
import os
import re
import tempfile
import time
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from helpers.colab.contents import SafeCopyError, belongs, stamp

FORMAT = 2
KEPT = 10  # snapshots; older ones are deleted, with the packs that no other needs

SNAPSHOT = re.compile(r"([0-9]{5,})\.json")
PACK = re.compile(r"([0-9]{5,})-[0-9a-f]{32}\.zip")
CUT_OFF = re.compile(r"\.([0-9]{5,})[-.].*\.tmp")
EARLIER = re.compile(r"[0-9]{5}-[0-9a-f]{32}\.json")  # a snapshot of format 1
# What reading a file that is not what it should be can raise; RuntimeError: an encrypted zip.
UNREADABLE = (
    *(OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError),
    *(ValueError, TypeError, LookupError, AttributeError),
)


class TakenError(Exception):
    """The number of a new snapshot is another one's."""


@dataclass(frozen=True)
class Snapshot:
    """What a workspace held at one moment.

    Attributes
    ----------
    history : list of str
        A name of its own, after those of all snapshots before it: its number is their count.
    by, time : str
        Who saved it, such as the notebook's name, and when; to be shown.
    files : dict of str to list of (str, str)
        By path in the workspace: file name of the pack, SHA-256 of the content.
    """

    history: list
    by: str
    time: str
    files: dict

    @property
    def number(self) -> int:
        """Its place in the line, from 1."""
        return len(self.history)

    @property
    def id(self) -> str:
        """Tells it from others of the same number."""
        return self.history[-1]

    def check(self, number: int) -> None:
        """Raise ValueError unless this can be the snapshot of that number."""
        texts = [*self.history, self.by, self.time]
        if not (self.number == number > 0 and all(isinstance(each, str) for each in texts)):
            raise ValueError(f"not number {number}")
        for path, (pack, digest) in self.files.items():
            if not (belongs(path) and PACK.fullmatch(pack) and isinstance(digest, str)):
                raise ValueError(f"{path!r} is no file of a workspace")


class History:
    """The safe copy in `folder`, which is made if missing; see the module."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._snapshots, self._packs, self._aside = (
            folder / name for name in ("snapshots", "packs", "aside")
        )
        if any(EARLIER.fullmatch(path.name) for path in self._snapshots.glob("*.json")):
            raise SafeCopyError(
                f"The safe copy {folder} was made by an earlier version of this project, in a form "
                "that this one does not read. It stays as it is. Choose another folder with "
                f"DRIVE_FOLDER, such as {folder.name}_2, and run the series again from notebook 01."
            )
        try:
            for place in (self._packs, self._snapshots):
                place.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=place):
                    pass
        except OSError as error:
            raise SafeCopyError(
                f"The folder of the safe copy {folder} is not writable ({_reason(error)}). "
                "Is the Drive mounted? Choose another folder with DRIVE_FOLDER."
            ) from None
        self._whole = set()  # what was read and is right, while its pack is not touched

    # --- reading ----------------------------------------------------------------------------

    def numbers(self) -> list[int]:
        """Return the numbers of the snapshots, damaged or not, in order."""
        found = (SNAPSHOT.fullmatch(path.name) for path in self._snapshots.iterdir())
        return sorted(int(each[1]) for each in found if each)

    def strangers(self) -> list[str]:
        """Return files that look like the copy's own, such as Drive's conflict copies."""
        return [
            f"{place.name}/{path.name}"
            for place, own in ((self._snapshots, SNAPSHOT), (self._packs, PACK))
            for path in sorted(place.glob("[!.]*"))
            if not own.fullmatch(path.name)
        ]

    def read(self, number: int) -> Snapshot:
        """Read a snapshot.

        Raises
        ------
        ValueError
            If it is damaged; names the file.
        SafeCopyError
            If a newer version of this project made it.
        """
        path = self._snapshots / f"{number:05d}.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content.pop("format")
            if version <= FORMAT:
                snapshot = Snapshot(**content)
                snapshot.check(number)
                return snapshot
        except UNREADABLE as error:
            raise ValueError(f"snapshots/{path.name} ({_reason(error)})") from None
        raise SafeCopyError(
            f"The safe copy {self.folder} was made by a newer version of this project. "
            "Update this one: run the first cell again on a new machine."
        )

    def fetch(self, files: dict, target: Path | None = None) -> dict[str, str]:
        """Read the contents of a snapshot's files, and write them below `target`, if given.

        Returns
        -------
        dict of str to str
            What is damaged, by path.
        """
        damaged = {}
        for path, (pack, digest) in files.items():
            place = self._packs / pack
            try:
                mark = (stamp(place), path, digest)
                if target is None and mark in self._whole:
                    continue
                with zipfile.ZipFile(place) as archive:
                    content, written = archive.read(path), archive.getinfo(path).date_time
                if hashlib.sha256(content).hexdigest() != digest:
                    raise ValueError(f"another {path}")
            except UNREADABLE as error:
                damaged[path] = f"packs/{pack} ({_reason(error)})"
                continue
            self._whole.add(mark)
            if target:
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                (target / path).write_bytes(content)
                when = time.mktime((*written, 0, 0, -1))
                os.utime(target / path, (when, when))
        return damaged

    def damage(self, number: int, damaged: list[str]) -> SafeCopyError:
        """Make the error that names what is damaged in a snapshot, and the way out."""
        way, newer = "No older snapshot is whole: choose another folder with DRIVE_FOLDER.", []
        for each in reversed(self.numbers()):
            with suppress(ValueError):
                snapshot = self.read(each)
                if each < number and not self.fetch(snapshot.files):
                    way = (
                        f"The newest whole snapshot is number {each}, of {snapshot.time}: to go "
                        f"back to it, move {', '.join(newer)} to another folder, then run this "
                        "cell again."
                    )
                    break
            newer.append(f"snapshots/{each:05d}.json")
        return SafeCopyError(
            f"The safe copy {self.folder} is damaged: {', '.join(sorted(set(damaged)))}. Nothing "
            "was changed here. If the Drive is still loading, run this cell again in a minute. A "
            f"machine that has this state repairs it with its next save. {way}"
        )

    # --- writing ----------------------------------------------------------------------------

    def add(self, before: Snapshot | None, by: str, known: dict, new: dict[str, Path]) -> Snapshot:
        """Write the snapshot after `before`, and the pack of what is new in it.

        Parameters
        ----------
        known : dict of str to list of (str, str)
            Files whose contents are in earlier packs.
        new : dict of str to pathlib.Path
            By path in the workspace: where the content is.

        Raises
        ------
        TakenError
            If there is one of that number.
        """
        history = [*(before.history if before else []), uuid.uuid4().hex]
        name = f"{len(history):05d}-{history[-1]}.zip"
        digests = _pack(new, self._packs / name) if new else {}
        files = known | {path: [name, digest] for path, digest in digests.items()}
        snapshot = Snapshot(history, by, time.strftime("%Y-%m-%d %H:%M:%S"), files)
        try:
            with _whole_or_not(self._snapshots / f"{snapshot.number:05d}.json") as path:
                text = json.dumps({"format": FORMAT, **asdict(snapshot)})
                path.write_text(text, encoding="utf-8")
        except OSError as error:
            with suppress(OSError):
                (self._packs / name).unlink(missing_ok=True)
            if isinstance(error, FileExistsError):
                raise TakenError from None
            raise
        self._tidy(snapshot.number - KEPT)
        return snapshot

    def put_aside(self, number: int, files: dict[str, Path]) -> Path:
        """Write files that did not come into the line, beside the snapshot of a number."""
        self._aside.mkdir(exist_ok=True)
        target = self._aside / f"{number:05d}-{uuid.uuid4().hex}.zip"
        _pack(files, target)
        return target

    def _tidy(self, last: int) -> None:
        """Delete the snapshots up to a number, and the packs of that age that no other needs."""
        try:
            kept = [self.read(each) for each in self.numbers() if each > last]
        except ValueError:
            return  # Nobody knows what the damaged one needs.
        needed = {pack for snapshot in kept for pack, _ in snapshot.files.values()}
        for path in [*self._snapshots.iterdir(), *self._packs.iterdir()]:
            for own in (SNAPSHOT, PACK, CUT_OFF):
                found = own.fullmatch(path.name)
                if found and int(found[1]) <= last and path.name not in needed:
                    # What cannot be deleted today is tried again with the next save.
                    with suppress(OSError):
                        path.unlink()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _pack(files: dict[str, Path], target: Path) -> dict[str, str]:
    """Write files into a zip; return their digests, without those that are gone meanwhile."""
    digests = {}
    with (
        _whole_or_not(target) as temporary,
        zipfile.ZipFile(temporary, "w") as archive,
    ):
        for path, source in files.items():
            with suppress(FileNotFoundError):
                content = source.read_bytes()
                # With the time when it was written.
                info = zipfile.ZipInfo.from_file(source, path, strict_timestamps=False)
                archive.writestr(info, content, zipfile.ZIP_DEFLATED, compresslevel=1)
                digests[path] = hashlib.sha256(content).hexdigest()
    return digests


@contextmanager
def _whole_or_not(target: Path) -> Iterator[Path]:
    """Give a temporary path that becomes `target`, where there is none yet, after the block."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        try:
            os.link(temporary, target)
        except FileExistsError:
            raise
        except OSError:
            # Drive and FAT have no hard links, the only way to rename that never replaces.
            if target.exists():
                raise FileExistsError(target) from None
            os.replace(temporary, target)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
