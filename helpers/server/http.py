"""What the servers of a workspace share about HTTP: local names, sign-in, the size of a request."""

import base64

import requests

HOST = "127.0.0.1"
LOCAL_HOSTS = ("localhost", HOST, "[::1]")  # names under which a server is asked on its machine
MOST_BYTES = 64 * 2**20  # of one request


def basic_header(user: str, password: str) -> str:
    """Return a Basic Authorization header (RFC 7617)."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def basic_credentials(header: str) -> tuple[str, str] | None:
    """Return user and password of a Basic Authorization header, or None if it is none."""
    scheme, _, encoded = header.partition(" ")
    try:
        text = base64.b64decode(encoded.strip(), validate=True).decode()
    except ValueError:
        return None
    user, colon, password = text.partition(":")
    return (user, password) if scheme.lower() == "basic" and colon else None


async def read_body(request, most: int = MOST_BYTES) -> bytes | None:
    """Return the body of a `starlette.requests.Request`, or None if it is over `most` bytes."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size <= most:
            parts.append(part)
    # Read to its end all the same: on a connection closed before, the answer may get lost.
    return b"".join(parts) if size <= most else None


def local_session() -> requests.Session:
    """Make a session for addresses on this machine, past every proxy setting."""
    session = requests.Session()
    session.trust_env = False
    return session
