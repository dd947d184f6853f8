"""A plugin for PEFT's own tests: every model that PEFT makes goes through ``accelerate`` at once.

``pytest -p accelerating --outcomes FILE [--stock] …``: the outcome of each test as a line of JSON, in FILE.
"""

from __future__ import annotations

import functools
import json
import pathlib


def pytest_addoption(parser):
    parser.addoption("--stock", action="store_true", help="leave the models as PEFT makes them")
    parser.addoption("--outcomes", help="file that gets a line of JSON for each test")


def pytest_configure(config):
    if not config.getoption("--stock"):
        accelerate_all()
    path = config.getoption("--outcomes")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(pathlib.Path(path)))


def accelerate_all():
    """Whatever makes adapters in PEFT ends in its tuners' ``inject_adapter``; after each, ``accelerate``."""
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    from lora_kernels import accelerate

    def accelerated(inject):
        @functools.wraps(inject)
        def inject_adapter(self, model, *args, **kwargs):
            result = inject(self, model, *args, **kwargs)
            if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
                accelerate(model)
            return result

        return inject_adapter

    kinds = [BaseTuner]
    for kind in kinds:
        kinds += kind.__subclasses__()
        if "inject_adapter" in vars(kind):
            kind.inject_adapter = accelerated(vars(kind)["inject_adapter"])


class Outcomes:
    """Writes what became of each test as soon as that is known: a crash leaves the rest."""

    def __init__(self, path):
        self.path = path

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            reason = report.longreprtext.strip().splitlines()[-1:] if report.failed else []
            with self.path.open("a") as file:
                file.write(json.dumps([report.nodeid, report.outcome, *reason]) + "\n")
