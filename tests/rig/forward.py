"""The only door into the rig's network: a port on 127.0.0.1, forwarded to the same port inside."""

from __future__ import annotations

import asyncio
import socket

from rig import linux

CHUNK_BYTES = 1 << 16


def listen(port: int) -> socket.socket:
    """Open the outer end, before this process changes networks."""
    return socket.create_server(("127.0.0.1", port))


async def serve(door: socket.socket, inside_pid: int) -> asyncio.Server:
    """Move this process into the other's network and pass on every connection made to the door."""
    linux.enter_network_of(inside_pid)
    port = door.getsockname()[1]

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _connect(reader, writer, port)

    return await asyncio.start_server(connect, sock=door)


async def _connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
    try:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        # Nobody listens yet: the caller sees its connection closed, and tries again.
        writer.close()
        return
    await asyncio.gather(_pump(reader, inner_writer), _pump(inner_reader, writer))
    inner_writer.close()
    writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy one direction to its end, and pass that end on: watches close one side at a time."""
    try:
        while data := await reader.read(CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except OSError:
        writer.close()
