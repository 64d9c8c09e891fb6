"""A connection of JupyterLab's server that sends each message of a kernel at once.

``jupyter lab --ServerApp.kernel_websocket_connection_class=cpnb_lab.PromptConnection``

A kernel answers a step of a slider in several small messages. By default TCP keeps the
second back until the browser's side has acknowledged the first, and that side may wait
40 ms for something to send along (Nagle's algorithm against delayed acknowledgements).
On one machine these 40 ms are most of the time from key to picture.

A module of its own, because the server would import torch with cpnb.
"""

from typing import Any

from jupyter_server.services.kernels.connection.channels import (
    ZMQChannelsWebsocketConnection,
)


class PromptConnection(ZMQChannelsWebsocketConnection):
    """Kernel and browser, with TCP_NODELAY set towards the browser."""

    def connect(self) -> Any:
        """Set the option on the open websocket and connect the kernel to it."""
        self.websocket_handler.set_nodelay(True)
        return super().connect()
