"""A request on its way through the gate: where it comes from, what it may, what became of it."""

import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response
from starlette.types import Message, Receive, Scope, Send

# Where Colab shows a frame: in an output of its page, whose host is another one each time.
COLAB_FRAMES = (
    "frame-ancestors 'self' https://colab.research.google.com https://*.googleusercontent.com"
)


class RejectedError(HTTPException):
    """A request that does not get through; `outcome` is one of `activity.OUTCOMES`."""

    def __init__(self, status: int, outcome: str, message: str, **headers: str):
        super().__init__(status, message, {"x-content-type-options": "nosniff", **headers})
        self.outcome = outcome

    def response(self) -> Response:
        """Return what the client is told."""
        return PlainTextResponse(self.detail, self.status_code, self.headers)


class UnauthorizedError(RejectedError):
    """A request without the sign-in that it needs."""

    def __init__(self, message: str):
        super().__init__(401, "sign-in", message, **{"www-authenticate": 'Basic realm="mlflow"'})


class Visit:
    """A request at the gate, and what becomes of it: one line of the activity log."""

    in_colab = False  # whether it came by Colab's port proxy, or may have come by it

    def __init__(self, scope: Scope):
        self.start = time.perf_counter()
        self.method, self.path = scope["method"], scope["path"]
        self.headers = Headers(scope=scope)
        self.host = self.headers.get("host", "").lower()
        # The last address is the one that the nearest proxy added; those before it may be lies.
        forwarded = ",".join(self.headers.getlist("x-forwarded-for")).split(",")[-1]
        self.address = forwarded.strip()[:60] or (scope.get("client") or ("?",))[0]
        self.user, self.status, self.outcome = None, 500, None
        self.signed_in = self.is_reader = self.is_admin = self.is_read = False

    def listen(self, receive: Receive) -> Receive:
        """Return a `receive` that notes when all of the request was read."""

        async def noted() -> Message:
            message = await receive()
            self.is_read = not message.get("more_body", False)
            return message

        return noted

    def watch(self, send: Send) -> Send:
        """Return a `send` that notes the status on its way, and says who may frame the page."""

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
                if self.in_colab:
                    # Browsers then pay no heed to MLflow's own X-Frame-Options, SAMEORIGIN.
                    MutableHeaders(scope=message)["content-security-policy"] = COLAB_FRAMES
            await send(message)

        return watched

    @property
    def is_telling(self) -> bool:
        """Whether it says who did what; a page's scripts and "are you there?" do not."""
        is_script = self.path.startswith("/static-files/") and self.status < 400
        return self.path != "/health" and not is_script

    def line(self) -> dict:
        """Return the fields of the line."""
        # 404 is an answer like any other: notebooks ask whether a version is there.
        of_mlflow = {401: "sign-in", 403: "role", 404: "ok"}.get(
            self.status, "ok" if self.status < 400 else "error"
        )
        return {
            "time": round(time.time(), 3),
            "user": self.user,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "duration": round(1000 * (time.perf_counter() - self.start), 1),
            "address": self.address,
            "host": self.host,
            "outcome": self.outcome or of_mlflow,
        }
