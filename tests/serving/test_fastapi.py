"""``examples/serve_fastapi.py``, asked by clients: pieces as they come, adapters side by side."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path

import pytest
import torch

for package in ("peft", "fastapi", "uvicorn"):
    pytest.importorskip(package)

from lora_kernels import LoRAConfig, apply_lora, save_adapter  # noqa: E402
from lora_kernels.serving.lowered import lower_adapter  # noqa: E402
from lora_kernels.serving.pool import PoolFullError  # noqa: E402

NAMES = ("poems", "code", "__base__")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The application, its pool, and an adapter that may take the place of another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
        import serve_fastapi
        from tiny import llama, tokenizer

    folder, adapted = tmp_path_factory.mktemp("adapters"), []
    for seed, name in enumerate(("poems", "code", "other")):
        made = llama()
        torch.manual_seed(seed)
        config = LoRAConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        adapted.append(apply_lora(made, config))
        save_adapter(made, folder / name)
    model = llama()
    model.config.max_position_embeddings = 4096
    pool = serve_fastapi.put_into_pool(model, {name: folder / name for name in ("poems", "code")})
    return serve_fastapi.service(model, tokenizer(), pool), pool, adapted[2]


async def post(app, adapter, tokens=12, leave_after=None):
    """Status and pieces of an answer as ASGI has them; the client may leave after some of these."""
    body = json.dumps({"prompt": "2 + 2 = ", "adapter": adapter, "max_new_tokens": tokens}).encode()
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/generate",
        "query_string": b"",
        "http_version": "1.1",
    }
    scope["headers"] = [(b"content-type", b"application/json")]
    scope["asgi"] = {"version": "3.0", "spec_version": "2.0"}
    status, pieces, asked, left = [], [], [], asyncio.Event()

    async def receive():
        if not asked:
            asked.append(True)
            return {"type": "http.request", "body": body, "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        status.append(message.get("status"))
        if message.get("body"):
            pieces.append(message["body"])
        if leave_after is not None and len(pieces) >= leave_after:
            left.set()

    await app(scope, receive, send)
    return status[0], pieces


def all_of(app, *asks):
    async def run():
        return await asyncio.gather(*(post(app, *ask) for ask in asks))

    return asyncio.run(asyncio.wait_for(run(), 60))


def test_an_answer_comes_token_by_token(served):
    [(status, pieces)] = all_of(served[0], ("poems",))
    assert status == 200 and len(pieces) > 6


def test_an_unknown_adapter_is_a_404_that_names_it(served):
    [(status, pieces)] = all_of(served[0], ("nope",))
    assert status == 404 and b"got 'nope'" in b"".join(pieces)


def test_requests_side_by_side_give_what_each_alone_gives(served):
    alone = {name: b"".join(all_of(served[0], (name,))[0][1]) for name in NAMES}
    assert len(set(alone.values())) == 3
    for name, (_, pieces) in zip(NAMES * 2, all_of(served[0], *((name,) for name in NAMES * 2)), strict=True):
        assert b"".join(pieces) == alone[name]


def test_a_client_that_leaves_ends_its_generation_and_no_other(served):
    app, _, _ = served
    [(_, want)] = all_of(app, ("code",))
    before = threading.active_count()
    left, (_, got) = all_of(app, ("poems", 4000, 2), ("code",))
    assert b"".join(got) == b"".join(want) and len(left[1]) < 4000
    until = time.monotonic() + 20
    while any("generate" in one.name for one in threading.enumerate()) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any("generate" in one.name for one in threading.enumerate()), before


def test_an_adapter_may_be_replaced_while_requests_run(served):
    app, pool, other = served
    [(_, base)], [(_, old)] = all_of(app, ("__base__",)), all_of(app, ("poems",))

    async def run():
        asks = [asyncio.create_task(post(app, name, 24)) for name in ("poems", "__base__", "poems")]
        await asyncio.sleep(0.02)
        while asks:
            try:
                pool.update("poems", *lower_adapter(other))
                break
            except PoolFullError:  # a step is under way: between two of them it may
                await asyncio.sleep(0.001)
        return await asyncio.gather(*asks)

    (_, first), (_, beside), _ = asyncio.run(asyncio.wait_for(run(), 60))
    assert first and b"".join(beside).startswith(b"".join(base))
    [(_, new)] = all_of(app, ("poems",))
    assert b"".join(new) != b"".join(old)
