"""A JSON text that is read value by value, so that little of it is in memory as objects.

As objects a text takes up to 24 times its size, and while `json.loads` makes them no other thread
gets a turn.
"""

import codecs
import json
import re
from collections.abc import Iterator

from starlette.exceptions import HTTPException

WINDOW = 2**16  # bytes that are looked at; more where a value needs them
MOST_BYTES = 2**20  # of a value that is read at once
DECODER = json.JSONDecoder()
BLANKS = re.compile(r"[ \t\n\r]*")
SCALARS = re.compile(r'(?:(?:[-+.\w]+|"[^"\\]*")[ \t\n\r]*,[ \t\n\r]*)+')  # followed by more
NEAR_THE_END = 16  # letters; an escape or a word that is cut off is shorter


class JsonReader:
    """Reads a JSON text from a byte on: its first letter, or a place that `mark` gave.

    Blanks between values are left out.

    What is no JSON, or too large, is refused with starlette's ``HTTPException``.
    """

    def __init__(self, body: bytes, start: int):
        self._body = body
        # Bytes of the body that are in view as text, and the place in the text.
        self._start = self._end = start
        self._text, self._at = "", 0

    def mark(self) -> int:
        """Return the place of what comes next."""
        return self._start + len(self._text[: self._at].encode())

    def again(self, start: int) -> "JsonReader":
        """Return a second reader of the same text, from a place that `mark` gave."""
        return JsonReader(self._body, start)

    def _refused(self, reason: str) -> HTTPException:
        return HTTPException(400, f"The body is not JSON: {reason}, near byte {self.mark():,}.")

    def _more(self) -> bool:
        """Bring more into view, from here on; tell whether there was more."""
        if self._end == len(self._body):
            return False
        size = WINDOW if self._at or not self._text else 2 * (self._end - self._start)
        if size > MOST_BYTES:
            limit = MOST_BYTES // 2**20
            raise HTTPException(
                413, f"A row or a value near byte {self._start:,} is over {limit} MB. Send less."
            )
        self._start = self.mark()
        view = memoryview(self._body)[self._start : self._start + size]
        whole = self._start + size >= len(self._body)
        try:
            self._text, read = codecs.utf_8_decode(view, "strict", whole)
        except UnicodeDecodeError:
            self._text = ""
            raise self._refused("it is not UTF-8 text") from None
        self._at, self._end = 0, self._start + read
        return True

    def peek(self) -> str:
        """Return the letter that comes next, blanks left out; "" at the end."""
        while True:
            self._at = BLANKS.match(self._text, self._at).end()
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def take(self, letters: str) -> str:
        """Read one of some letters; return it."""
        found = self.peek()
        if not found or found not in letters:
            raise self._refused(f"there is {found!r} where {' or '.join(letters)} should be")
        self._at += 1
        return found

    def end(self) -> None:
        """Make sure that nothing comes any more."""
        if self.peek():
            raise self._refused("there is something behind its end")

    def value(self) -> object:
        """Read a value, whole."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                begun = error.msg.startswith("Unterminated")
                wrong = error.pos < len(self._text) - NEAR_THE_END and not begun
                if wrong or not self._more():
                    raise self._refused(error.msg) from None
            except ValueError as error:  # an integer of thousands of digits
                raise self._refused(str(error)) from None
            except RecursionError:
                raise HTTPException(400, "The JSON is nested too deeply.") from None
            else:
                # A number at the end of the view may go on.
                if end < len(self._text) or not self._more():
                    self._at = end
                    return value

    def values(self) -> Iterator[object]:
        """Read a list, value by value."""
        self.take("[")
        if self.peek() == "]":
            self._at += 1
            return
        while True:
            several = SCALARS.match(self._text, self._at)
            if several:
                try:
                    yield from DECODER.decode(f"[{several.group().rpartition(',')[0]}]")
                except ValueError as error:
                    raise self._refused(str(error)) from None
                self._at = several.end()
            yield self.value()
            if self.take(",]") == "]":
                return
            self.peek()

    def fields(self) -> Iterator[str]:
        """Read an object, name by name; whoever asks reads the value before the next name."""
        self.take("{")
        if self.peek() == "}":
            self._at += 1
            return
        while True:
            if self.peek() != '"':
                raise self._refused("a name in double quotes is missing")
            name = self.value()
            self.take(":")
            yield name
            if self.take(",}") == "}":
                return
