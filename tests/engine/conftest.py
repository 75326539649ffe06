"""The engines under test. A server takes half a minute or more to start, so each runs once a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.bench import Bench, start_bench


@pytest.fixture(scope="session")
def _vllm_starting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[bool, Bench]]:
    """Both servers start at the same time; each test waits for the one it needs."""
    benches = {tied: start_bench("vllm", tied, tmp_path_factory.mktemp(f"vllm_tied_{tied}")) for tied in (True, False)}
    try:
        yield benches
    finally:
        for bench in benches.values():
            bench.engine.close()


@pytest.fixture(scope="session")
def vllm_tied(_vllm_starting: dict[bool, Bench]) -> Bench:
    _vllm_starting[True].engine.wait_ready()
    return _vllm_starting[True]


@pytest.fixture(scope="session")
def vllm_untied(_vllm_starting: dict[bool, Bench]) -> Bench:
    _vllm_starting[False].engine.wait_ready()
    return _vllm_starting[False]


def _sglang(tied: bool, folder: Path) -> Iterator[Bench]:
    bench = start_bench("sglang", tied, folder)
    try:
        bench.engine.wait_ready()
        yield bench
    finally:
        bench.engine.close()


@pytest.fixture(scope="session")
def sglang_tied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    yield from _sglang(True, tmp_path_factory.mktemp("sglang_tied"))


@pytest.fixture(scope="session")
def sglang_untied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    yield from _sglang(False, tmp_path_factory.mktemp("sglang_untied"))


@pytest.fixture(scope="session")
def hf_tied(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return start_bench("hf", True, tmp_path_factory.mktemp("hf_tied"))


@pytest.fixture(scope="session")
def hf_untied(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return start_bench("hf", False, tmp_path_factory.mktemp("hf_untied"))


# An SGLang server may take minutes to start where several processes share few cores.
SGLANG = (pytest.mark.sglang, pytest.mark.timeout(900))


@pytest.fixture(params=["hf_tied", "vllm_tied", pytest.param("sglang_tied", marks=SGLANG)])
def bench(request: pytest.FixtureRequest) -> Bench:
    found: Bench = request.getfixturevalue(request.param)
    return found


@pytest.fixture(
    params=[
        *("hf_tied", "hf_untied", "vllm_tied", "vllm_untied"),
        *(pytest.param(name, marks=SGLANG) for name in ("sglang_tied", "sglang_untied")),
    ]
)
def any_bench(request: pytest.FixtureRequest) -> Bench:
    found: Bench = request.getfixturevalue(request.param)
    return found
