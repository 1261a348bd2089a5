"""Forward a port on 127.0.0.1 to the same port in the rig's network, the only way in."""

from __future__ import annotations

import asyncio
import socket

from rig import linux

CHUNK_BYTES = 1 << 16


def listen(port: int) -> socket.socket:
    """Open the port on the machine's own loopback, before this process changes its network."""
    return socket.create_server(("127.0.0.1", port))


async def serve(listener: socket.socket, inside_pid: int) -> asyncio.Server:
    """Move this process into the network of `inside_pid` and forward the listener's connections."""
    linux.enter_network_of(inside_pid)
    port = listener.getsockname()[1]

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _connect(reader, writer, port)

    return await asyncio.start_server(connect, sock=listener)


async def _connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
    try:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        # The server inside does not listen yet; the client retries a closed connection.
        writer.close()
        return
    await asyncio.gather(_copy(reader, inner_writer), _copy(inner_reader, writer))
    inner_writer.close()
    writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy one direction until it ends, then close that direction only: a watch may continue."""
    try:
        while data := await reader.read(CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except OSError:
        writer.close()
