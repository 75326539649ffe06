"""The engines under test. A server takes half a minute or more to start, so each runs once a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engine.bench import Bench, start_bench


def _both(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[bool, Bench]]:
    """With a tied and with an untied head; they start at the same time, and each test waits for the one it needs."""
    benches: dict[bool, Bench] = {}
    try:
        for tied in (True, False):
            benches[tied] = start_bench(kind, tied, tmp_path_factory.mktemp(f"{kind}_tied_{tied}"))
        yield benches
    finally:
        for bench in benches.values():
            bench.engine.close()


def _ready(benches: dict[bool, Bench], tied: bool) -> Bench:
    benches[tied].engine.wait_ready()
    return benches[tied]


@pytest.fixture(scope="session")
def _vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[bool, Bench]]:
    yield from _both("vllm", tmp_path_factory)


@pytest.fixture(scope="session")
def vllm_tied(_vllm: dict[bool, Bench]) -> Bench:
    return _ready(_vllm, True)


@pytest.fixture(scope="session")
def vllm_untied(_vllm: dict[bool, Bench]) -> Bench:
    return _ready(_vllm, False)


@pytest.fixture(scope="session")
def _sglang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[bool, Bench]]:
    yield from _both("sglang", tmp_path_factory)


@pytest.fixture(scope="session")
def sglang_tied(_sglang: dict[bool, Bench]) -> Bench:
    return _ready(_sglang, True)


@pytest.fixture(scope="session")
def sglang_untied(_sglang: dict[bool, Bench]) -> Bench:
    return _ready(_sglang, False)


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
