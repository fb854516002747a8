"""A stand-in for ngrok: its agent as an executable, and its cloud with an https edge.

`NgrokCloud` runs in the test process; the executable that `NgrokCloud.install` writes is started
by the real pyngrok and connects to it. Clients reach an endpoint by its genuine address
(``https://<name>.ngrok-free.app``) through the cloud's forward proxy, trusting its certificate.
What the two print and answer follows ngrok's documentation and recorded output of the v3 agent.
"""

from .cloud import NgrokCloud, paid_account

__all__ = ["NgrokCloud", "paid_account"]
