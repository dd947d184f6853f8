"""README and docs: every ``python`` block runs, links lead somewhere, messages are real."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("peft")

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lora_kernels import (
    LoRAConfig,
    _settings,
    accelerate,
    apply_lora,
    load_adapter,
    lora_linear,
    methods,
    multi_lora_linear,
    quantize_base,
    save_adapter,
    stack_adapters,
    use_backend,
)
from lora_kernels.adapters import METHODS
from lora_kernels.cli.methods import with_table
from lora_kernels.nn import merge_adapters, mixed_adapters
from lora_kernels.schedules import compact
from lora_kernels.serving.modules import apply_multi_lora, pool_linears
from lora_kernels.serving.pool import AdapterPool

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
MESSAGE = re.compile(r"^```text\n(.*?)\n```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


def read(path):
    return path.read_text(encoding="utf-8")


def snippets():
    for page in (page for page in PAGES if page.stem != "walkthrough"):  # see test_walkthrough.py
        text = read(page)
        for block in BLOCK.finditer(text):
            line = text.count("\n", 0, block.start()) + 1
            yield pytest.param(page, block, id=f"{page.stem}-line-{line}")


@pytest.fixture
def own_methods():
    """Forgets the methods that a snippet registered; those of the package stay with their modules."""
    yield
    for key in set(METHODS) - set(methods.structures()):
        del METHODS._classes[key]


@pytest.mark.parametrize("page, block", list(snippets()))
@pytest.mark.usefixtures("own_methods")
def test_snippet(page, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = block.string.count("\n", 0, block.start(1))
    code = compile("\n" * line + block.group(1), str(page), "exec")
    exec(code, {"__name__": "__main__"})


def test_the_readme_has_snippets_and_is_short():
    assert BLOCK.search(read(README)), "README.md shows no python"
    assert len(read(README).splitlines()) <= 150


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    links = [link for link in LINK.findall(read(page)) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_every_page_is_in_the_navigation():
    site = read(ROOT / "mkdocs.yml")
    pages = {page.name for page in PAGES if page != README}
    assert pages == set(re.findall(r"^  - (\S+\.md)$", site, re.MULTILINE))


def test_every_package_that_exports_is_in_the_reference():
    page = read(ROOT / "docs" / "api.md")
    for source in (ROOT / "lora_kernels").glob("**/__init__.py"):
        if "__all__" in read(source):
            package = ".".join(source.parent.relative_to(ROOT).parts)
            assert f"\n::: {package}\n" in page, package


def test_what_is_made_of_the_register_is_up_to_date():
    assert read(ROOT / "docs" / "methods.md") == methods.listing(), "run lora-kernels methods --write"
    readme = read(README)
    assert with_table(readme) == readme, "run lora-kernels methods --write"
    assert methods.table() in readme


def test_every_environment_variable_has_its_line():
    page = read(ROOT / "docs" / "environment.md")
    for source in (Path(_settings.__file__), ROOT / "setup.py"):
        for name in set(re.findall(r"\b(?:LORA_KERNELS|TRITON|TORCH|XDG)_[A-Z_]+\b", read(source))):
            assert re.search(rf"^\| `{name}`", page, re.MULTILINE), name


def two(dtype=torch.float32):
    return nn.Sequential(nn.Linear(64, 64, dtype=dtype), nn.Linear(64, 8, dtype=dtype))


def adapted(dtype=torch.float32, name="default", **options):
    return apply_lora(two(dtype), LoRAConfig(**{"r": 2, "target_modules": "all-linear", **options}), name)


def backend(name):
    with use_backend(name):
        lora_linear(torch.randn(2, 4), torch.randn(4, 4), torch.randn(1, 4), torch.randn(4, 1))


def merged():
    model = adapted()
    merge_adapters(model)
    model[0].add_adapter("other", LoRAConfig(r=2))
    model[0].set_adapter("other")


def transformed():
    stack = stack_adapters([torch.zeros(2, 4)], [torch.zeros(4, 2)])
    ids = torch.zeros(3, dtype=torch.int64)
    torch.func.vmap(lambda x: multi_lora_linear(x, None, stack, ids))(torch.zeros(2, 3, 4))


def moments_of_more_ranks():
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(torch.randn(2, 64)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        model[0].adapters["default"].lora_A[0] = 0
    compact(model)
    optimizer.step()


def sharded():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = fully_shard(adapted(), mesh=init_device_mesh("cpu", (1,)))
        apply_lora(model, LoRAConfig(target_modules=["0"]), adapter_name="b")
    finally:
        dist.destroy_process_group()


def foreign():
    Path("adapter_config.json").write_text('{"peft_type": "IA3"}', encoding="utf-8")
    load_adapter(two(), ".")


def without_weights():
    save_adapter(adapted(), "there")
    Path("there/adapter_model.safetensors").unlink()
    load_adapter(two(), "there")


def of_another_model():
    one = nn.Sequential(nn.Linear(64, 64))
    save_adapter(apply_lora(one, LoRAConfig(r=2, target_modules=".*")), "other")
    load_adapter(two(), "other")


def served_twice():
    model = two()
    pool = AdapterPool(pool_linears(model, "all-linear"), max_rank=4)
    apply_multi_lora(apply_multi_lora(model, pool), pool)


def no_such_linear():
    apply_multi_lora(two(), AdapterPool({"lm_head": (4, 4)}, max_rank=4))


def unknown_adapter():
    model = adapted(name="a")
    apply_lora(model, LoRAConfig(r=2, target_modules="all-linear"), "b")
    with mixed_adapters(model, ["c"]):
        pass


# What provokes the messages of docs/troubleshooting.md, in its order.
CAUSES = (
    lambda: backend("cuda"),
    lambda: backend("tritn"),
    lambda: adapted(target_modules=["q_proj"]),
    lambda: adapted(target_modules=None),
    lambda: LoRAConfig(method="lorra"),
    lambda: LoRAConfig(method_options={"experts": 2}),
    lambda: apply_lora(quantize_base(two(), "nf4"), LoRAConfig(target_modules=["0"], use_dora=True)),
    lambda: adapted(torch.bfloat16)(torch.randn(2, 64)),
    lambda: adapted()(torch.randn(2, 63)),
    lambda: apply_lora(adapted(), LoRAConfig(target_modules="all-linear")),
    merged,
    lambda: adapted()[0]._replicate_for_data_parallel(),
    transformed,
    moments_of_more_ranks,
    sharded,
    lambda: accelerate(two()),
    foreign,
    without_weights,
    of_another_model,
    served_twice,
    no_such_linear,
    unknown_adapter,
)
MESSAGES = MESSAGE.findall(read(ROOT / "docs" / "troubleshooting.md"))


def test_each_message_has_its_cause():
    assert len(MESSAGES) == len(CAUSES)


@pytest.mark.parametrize("message, cause", list(zip(MESSAGES, CAUSES, strict=False)), ids=range(len(CAUSES)))
def test_messages_are_real(message, cause, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception) as raised:
        cause()
    pattern = ".*".join(map(re.escape, message.split("…")))
    assert re.fullmatch(pattern, str(raised.value), re.DOTALL)
