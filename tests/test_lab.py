"""The connection that sends a kernel's answers to the browser at once."""

from jupyter_server.services.kernels.connection.channels import (
    ZMQChannelsWebsocketConnection,
)
from jupyter_server.services.kernels.websocket import KernelWebsocketHandler
from lab_server import CONNECTION
from traitlets.utils.importstring import import_item


def test_prompt_connection_asks_for_no_delay_and_connects(monkeypatch):
    done = []
    handler = KernelWebsocketHandler.__new__(KernelWebsocketHandler)
    monkeypatch.setattr(handler, "set_nodelay", lambda on: done.append(on))
    monkeypatch.setattr(
        ZMQChannelsWebsocketConnection, "connect", lambda self: "connected"
    )
    connection = import_item(CONNECTION)(websocket_handler=handler)
    assert connection.connect() == "connected"
    assert done == [True]
