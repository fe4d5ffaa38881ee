"""Options and fixtures of the whole suite: models exported once a session, from assets fetched where they can be."""

from __future__ import annotations

import fcntl
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from graphwright.models import registry
from graphwright.passes.errors import AssetError


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-snapshots", action="store_true", help="rewrite the lower halves of tests/cases from what passes do"
    )


@functools.cache
def _refusal(name: str) -> str | None:
    """Why a model's or asset's files cannot be had; None when they are in the cache now."""
    try:
        registry.fetch(name)
    except AssetError as error:
        return str(error)
    return None


@pytest.fixture(scope="session")
def fetched() -> Callable[[str], None]:
    """Fetches what a model or asset needs; skips the test with the reason where that is not possible."""

    def fetch(name: str) -> None:
        if reason := _refusal(name):
            pytest.skip(reason)

    return fetch


@pytest.fixture(scope="session")
def exported(fetched: Callable[[str], None], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The ONNX file of a model, exported on first use by whichever worker of the run comes first."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "exported"
    folder.mkdir(exist_ok=True)

    def export(name: str, **options: Any) -> Path:
        path = folder / f"{'-'.join([name, *(f'{k}{v}' for k, v in sorted(options.items()))])}.onnx"
        fetched(name)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                registry.export(name, path, **options)
        return path

    return export
