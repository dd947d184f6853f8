"""A pool of adapters behind HTTP: POST /generate streams text, and a field of the request names the adapter.

python serve_fastapi.py MODEL --adapter NAME=FOLDER [--adapter NAME=FOLDER ...] [--port 8000]

A folder is what PEFT or ``save_adapter`` wrote. Without a model a tiny one serves two adapters, and is asked.
"""

import argparse
import contextlib
import json
import socket
import threading
import urllib.request

import torch
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from starlette.concurrency import iterate_in_threadpool
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from lora_kernels import LoRAConfig, apply_lora, save_adapter
from lora_kernels.integrations.pool import load_into_pool
from lora_kernels.serving.modules import apply_multi_lora, pool_linears
from lora_kernels.serving.pool import AdapterPool


class Ask(BaseModel):
    """The body of a request."""

    prompt: str = Field(min_length=1)
    adapter: str = "__base__"
    max_new_tokens: int = Field(32, ge=1, le=4096)


class Pieces(TextIteratorStreamer):
    """Text as soon as it is certain: Transformers' own waits for the end of a word."""

    def put(self, value):
        """A token; a character that wants more of them is held back."""
        if self.next_tokens_are_prompt and self.skip_prompt:
            return super().put(value)
        self.token_cache.extend(value.flatten().tolist())
        text = self.tokenizer.decode(self.token_cache, **self.decode_kwargs)
        if text[self.print_len :] and not text.endswith("\ufffd"):
            self.on_finalized_text(text[self.print_len :])
            self.print_len = len(text)


class Stop(StoppingCriteria):
    """Ends a generation whose client has gone."""

    def __init__(self, gone):
        self.gone = gone

    def __call__(self, input_ids, scores, **kwargs):
        """One answer a sample."""
        return torch.full((len(input_ids),), self.gone.is_set(), device=input_ids.device)


async def until_gone(streamer, gone):
    """The pieces, each taken in a worker thread; when nobody wants more, generation stops."""
    try:
        async for piece in iterate_in_threadpool(streamer):
            yield piece
    finally:
        gone.set()


def put_into_pool(model, folders):
    """Serves ``model`` from a pool with these adapters, name -> folder."""
    linears = pool_linears(model.eval(), "all-linear")
    pool = AdapterPool(linears, max_rank=64, device=model.device, dtype=model.dtype)
    for name, folder in folders.items():
        load_into_pool(pool, folder, name)
    apply_multi_lora(model, pool)
    return pool


def service(model, tokenizer, pool):
    """Each request generates in a thread of its own; all of them share the base, and each adapter's pages."""
    app = FastAPI(title="lora-kernels")

    def generate(ask, streamer, gone):
        inputs = tokenizer(ask.prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
        options = {"max_new_tokens": ask.max_new_tokens, "do_sample": False, "streamer": streamer}
        options["stopping_criteria"] = StoppingCriteriaList([Stop(gone)])
        try:
            model.generate(**inputs, **options, adapter_names=[ask.adapter])
        finally:
            streamer.end()  # whatever happened: the client waits for it

    @app.post("/generate")
    def answer(ask: Ask):
        if ask.adapter != "__base__" and ask.adapter not in pool:
            raise HTTPException(404, f"adapter: expected one of the pool's, got {ask.adapter!r}")
        streamer, gone = Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True), threading.Event()
        threading.Thread(target=generate, args=(ask, streamer, gone), daemon=True).start()
        return StreamingResponse(until_gone(streamer, gone), media_type="text/plain")

    return app


@contextlib.contextmanager
def running(app):
    """The application on a free port of this machine, within the ``with`` block; gives its address."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield "http://{}:{}".format(*listening.getsockname())
        finally:
            server.should_exit = True
            thread.join()


def ask(address, **body):
    """The whole answer; a client that shows it as it comes reads line by line."""
    data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{address}/generate", data, kind)) as response:
        return response.read().decode()


def try_out():
    """Two adapters of a tiny model, and each is asked."""
    from tiny import llama, tokenizer

    folders = {"poems": "poems", "code": "code"}
    for rank, name in enumerate(folders, start=4):
        config = LoRAConfig(r=rank, target_modules="all-linear", init_lora_weights=False)
        save_adapter(apply_lora(llama(), config), name)
    model = llama()
    with running(service(model, tokenizer(), put_into_pool(model, folders))) as address:
        for name in (*folders, "__base__"):
            print(f"{name}: {ask(address, prompt='2 + 2 = ', adapter=name, max_new_tokens=8)!r}")


def main():
    """Serves what the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    if args.model is None:
        return try_out()
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(args.model),
        AutoTokenizer.from_pretrained(args.model),
    )
    pool = put_into_pool(model, dict(one.split("=", 1) for one in args.adapter))
    uvicorn.run(service(model, tokenizer, pool), host="127.0.0.1", port=args.port)


if __name__ == "__main__":
    main()
