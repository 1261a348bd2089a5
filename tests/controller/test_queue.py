"""The work queue on its own."""

from __future__ import annotations

import asyncio

from tuneyard.controller.queue import Queue


def test_a_queue_that_is_canceled_while_a_key_is_added_ends() -> None:
    """asyncio.wait_for of Python 3.11 drops a cancellation that comes together with the event it
    waits for. The operator would not exit after it has lost its Lease."""

    async def run() -> bool:
        async def work(_: str) -> None: ...

        queue: Queue[str] = Queue(work, workers=1)
        running = asyncio.create_task(queue.run())
        queue.add_after("later", 2.0)
        await asyncio.sleep(0.05)
        queue.add_after("job", 1.5)
        running.cancel()
        await asyncio.wait({running}, timeout=1.0)
        ended = running.done()
        running.cancel()
        return ended

    assert asyncio.run(run())
