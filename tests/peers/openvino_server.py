"""OpenVINO GenAI's continuous-batching pipeline behind just enough of /v1/completions to be measured.

openvino_server.py FOLDER PORT THREADS, in OpenVINO's environment. One thread steps the pipeline; each step's tokens go
to the requests' queues in one call. Prompts are token ids; text is a word per id, as the checkpoint's tokenizer has it.
"""

import asyncio
import itertools
import json
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import openvino
import openvino_genai
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse


class Engine:
    def __init__(self, folder: str, threads: int) -> None:
        scheduling = openvino_genai.SchedulerConfig()
        scheduling.cache_size = 1
        scheduling.enable_prefix_caching = False
        properties = {"INFERENCE_NUM_THREADS": threads}
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(folder, scheduling, "CPU", properties)
        self.running: dict[int, tuple[openvino_genai.GenerationHandle, asyncio.Queue[list[int] | None]]] = {}
        self.inbox: list[tuple[int, list[int], int, asyncio.Queue[list[int] | None]]] = []
        self.wake = threading.Condition()
        self.ids = itertools.count()
        self.loop = asyncio.get_running_loop()
        threading.Thread(target=self.run, daemon=True).start()

    async def generate(self, prompt: list[int], max_tokens: int) -> AsyncIterator[list[int]]:
        queue: asyncio.Queue[list[int] | None] = asyncio.Queue()
        with self.wake:
            self.inbox.append((next(self.ids), prompt, max_tokens, queue))
            self.wake.notify()
        while (ids := await queue.get()) is not None:
            yield ids

    def run(self) -> None:
        while True:
            with self.wake:
                self.wake.wait_for(lambda: self.inbox or self.running)
                arrived, self.inbox = self.inbox, []
            for number, prompt, max_tokens, queue in arrived:
                options = openvino_genai.GenerationConfig()
                options.max_new_tokens = options.min_new_tokens = max_tokens
                options.ignore_eos, options.do_sample = True, False
                ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
                self.running[number] = (self.pipeline.add_request(number, ids, options), queue)
            self.pipeline.step()
            self.loop.call_soon_threadsafe(self.deliver, self.collect())

    def collect(self) -> list[tuple[asyncio.Queue[list[int] | None], list[int] | None]]:
        found: list[tuple[asyncio.Queue[list[int] | None], list[int] | None]] = []
        for number, (handle, queue) in list(self.running.items()):
            while handle.can_read():
                found += [(queue, list(output.generated_ids)) for output in handle.read().values()]
            if handle.get_status() != openvino_genai.GenerationStatus.RUNNING:
                found.append((queue, None))
                del self.running[number]
        return found

    @staticmethod
    def deliver(found: list[tuple[asyncio.Queue[list[int] | None], list[int] | None]]) -> None:
        for queue, ids in found:
            queue.put_nowait(ids)


def make_app(folder: str, threads: int) -> FastAPI:
    @asynccontextmanager
    async def loaded(app: FastAPI) -> AsyncIterator[None]:
        app.state.engine = Engine(folder, threads)
        yield

    app = FastAPI(lifespan=loaded)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/completions")
    async def completions(request: Request) -> StreamingResponse:
        body = await request.json()

        async def events() -> AsyncIterator[str]:
            count = 0
            async for ids in app.state.engine.generate(body["prompt"], body["max_tokens"]):
                count += len(ids)
                text = "".join(f"w{token} " for token in ids)
                yield f"data: {json.dumps({'choices': [{'index': 0, 'text': text}]})}\n\n"
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


if __name__ == "__main__":
    uvicorn.run(make_app(sys.argv[1], int(sys.argv[3])), port=int(sys.argv[2]), log_level="warning")
