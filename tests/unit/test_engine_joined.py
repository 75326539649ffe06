"""Servers of engine.urls, over real HTTP: one queue, file descriptors, hangs, deaths, returns, certificates."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo_ds.config import EngineConfig
from grpo_ds.engine import make_engine, make_server, server
from grpo_ds.engine.base import EngineDown, EngineError, EngineSettings, Request, SamplingSpec, stream_seed
from tests.unit.engine_fakes import publish, wait_for
from tests.unit.engine_stub import Stub

SPEC = SamplingSpec(n=2, max_tokens=4)
STALL_S = 1.5
Make = Callable[..., Stub]


def requests(count: int) -> list[Request]:
    return [Request((1, 2), k, f"r{k}") for k in range(count)]


def check(answers: Any, count: int, version: int) -> None:
    """Each request has its own two responses, of the version."""
    assert len(answers) == count
    for request, row in zip(requests(count), answers, strict=True):
        seed = stream_seed(request.seed)
        assert [r.token_ids for r in row] == [((seed + k) % 1000,) for k in range(2)]
        assert {span.version for r in row for span in r.spans} == {version}


@pytest.fixture
def stubs() -> Iterator[Make]:
    made: list[Stub] = []

    def make(**options: Any) -> Stub:
        made.append(Stub(**options))
        return made[-1]

    yield make
    for stub in made:
        stub.close()


@pytest.fixture
def pools() -> Iterator[Callable[..., Any]]:
    made: list[Any] = []

    def make(*stubs: Stub, **config: Any) -> Any:
        """A pool of these servers, which are at version 1."""
        settings = {"max_restarts": 5, "stall_timeout_s": STALL_S, "start_timeout_s": 30} | config
        made.append(
            make_engine(
                EngineConfig(urls=[stub.url for stub in stubs], **settings),
                model_path="m",
                dtype="float32",
                max_model_len=64,
                log_dir=Path(),
                device="cpu",
                seed=0,
            )
        )
        made[-1].start()
        made[-1].wait_ready()
        publish(made[-1], 1)
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def test_servers_elsewhere_share_one_queue_so_that_a_slow_one_does_not_set_the_pace(
    stubs: Make, pools: Callable[..., Any]
) -> None:
    slow, fast = stubs(), stubs()
    pool = pools(slow, fast, stall_timeout_s=60)
    slow.may_answer = lambda: len(fast.asked) >= 250
    check(pool.generate(requests(400), SPEC), 400, 1)
    assert Counter(slow.asked + fast.asked) == {f"r{k}": 1 for k in range(400)}
    assert len(slow.asked) == 150, "what it may have in flight at once; an equal share were 200"


def test_a_server_that_falls_silent_is_noticed_and_joined_again_when_it_speaks(
    stubs: Make, pools: Callable[..., Any]
) -> None:
    stuck, well = stubs(), stubs()
    pool = pools(stuck, well)
    stuck.talks.clear()
    begun = time.monotonic()
    check(pool.generate(requests(20), SPEC), 20, 1)
    assert STALL_S <= time.monotonic() - begun < STALL_S + 30, "long before engine.request_timeout_s"
    counts = pool.take_counts()
    assert counts["quarantined"] == 1 and counts["redone_requests"] > 0
    publish(pool, 2)
    assert (stuck.version, well.version) == ("1", "2"), "an update does not wait for it"
    stuck.talks.set()
    wait_for("its return", pool.needs_weights)
    assert pool.take_counts()["restarts"] == 1
    publish(pool, 3)
    assert (stuck.version, well.version) == ("3", "3")
    stuck.asked.clear()
    check(pool.generate(requests(20), SPEC), 20, 3)
    assert stuck.asked


def test_a_server_that_died_and_was_started_again_is_joined_again(stubs: Make, pools: Callable[..., Any]) -> None:
    first = stubs()
    pool = pools(first)
    first.close()
    with pytest.raises(EngineDown):
        pool.generate(requests(3), SPEC)
    second = stubs(port=first.server_port)
    publish(pool, 2)  # waits for it
    assert second.version == "2"
    check(pool.generate(requests(3), SPEC), 3, 2)


@pytest.mark.parametrize("how", ["silent", "dead"])
def test_without_restarts_one_failure_ends_the_run_and_names_the_server(
    stubs: Make, pools: Callable[..., Any], how: str
) -> None:
    broken, well = stubs(), stubs()
    pool = pools(broken, well, max_restarts=0)
    if how == "dead":
        broken.close()
    else:
        broken.talks.clear()
    begun = time.monotonic()
    with pytest.raises(EngineError, match=f"^engine {broken.url} failed: ") as error:
        pool.generate(requests(20), SPEC)
    assert time.monotonic() - begun < STALL_S + 30
    assert how == "dead" or "no answer to a health check within 1.5 s" in str(error.value)


def test_one_server_alone_is_watched_as_well(stubs: Make, pools: Callable[..., Any]) -> None:
    alone = stubs()
    pool = pools(alone, max_restarts=0)
    alone.talks.clear()
    with pytest.raises(EngineError, match="no answer to a health check within 1.5 s"):
        pool.generate(requests(2), SPEC)


CROWD = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
from grpo_ds.config import EngineConfig
from grpo_ds.engine import make_engine
from tests.unit.engine_fakes import publish
from tests.unit.test_engine_joined import check, requests, SPEC
pool = make_engine(
    EngineConfig(urls=sys.argv[1:], stall_timeout_s=60), model_path="m", dtype="float32", max_model_len=64,
    log_dir=Path(), device="cpu", seed=0,
)
pool.start()
pool.wait_ready()
publish(pool, 1)
check(pool.generate(requests(800), SPEC), 800, 1)
pool.close()
"""


def test_hundreds_of_requests_need_few_file_descriptors(stubs: Make) -> None:
    """With 128 of them a process has at most 32 requests open at each of two servers; any failure would end it."""
    pair = [stubs(), stubs()]
    for stub in pair:
        stub.seconds = 0.02
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    words = [sys.executable, "-c", CROWD, *(stub.url for stub in pair)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(8 < stub.most_open <= 32 for stub in pair), "many at once at both, but no more"


def test_requests_in_flight_are_no_threads(stubs: Make, pools: Callable[..., Any]) -> None:
    pair = [stubs(), stubs()]
    pool = pools(*pair, stall_timeout_s=60)
    for stub in pair:
        stub.seconds = 0.5
    begun, most = threading.active_count(), []
    pair[0].finish_request = _noting(pair[0].finish_request, lambda: most.append(_own_threads()))  # type: ignore[method-assign]
    pool.generate(requests(200), SPEC)
    assert begun > 0 and max(most) <= 8, "a loop for each server, and health checks"


def _own_threads() -> int:
    """Those of the engines, not of the stubs."""
    return sum(thread.name.startswith("engine-") for thread in threading.enumerate())


def _noting(call: Callable[..., None], note: Callable[[], None]) -> Callable[..., None]:
    def noting(*args: Any) -> None:
        note()
        call(*args)

    return noting


def test_an_abort_that_is_not_answered_has_a_deadline(stubs: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_ABORT_TIMEOUT_S", 1.0)
    stub = stubs()
    engine = make_server(EngineConfig(), EngineSettings("m", "float32", 64, Path(), "cpu", 0, url=stub.url))
    stub.talks.clear()
    begun = time.monotonic()
    with pytest.raises(EngineError, match=r"POST http://127.0.0.1:\d+/abort_requests failed: ReadTimeout"):
        engine.abort()
    assert time.monotonic() - begun < 10
    engine.close()


# ---- https ----


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 127.0.0.1, signed by itself, with its key in the same file."""
    folder = tmp_path_factory.mktemp("certificate")
    words = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    words += ["-subj", "/CN=engine", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run(["openssl", *words, *files], check=True, capture_output=True, timeout=60)
    (folder / "both.pem").write_text((folder / "key.pem").read_text() + (folder / "cert.pem").read_text())
    return folder / "both.pem"


def joined(stub: Stub) -> Any:
    return make_server(EngineConfig(), EngineSettings("m", "float32", 64, Path(), "cpu", 0, url=stub.url))


def secure(stubs: Make, certificate: Path) -> Stub:
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return stubs(tls=context)


def test_a_server_is_joined_over_https_when_its_certificate_is_trusted(
    stubs: Make, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    stub = secure(stubs, certificate)
    engine = joined(stub)
    engine.wait_ready(timeout_s=30)
    assert len(engine.generate(requests(2), SPEC)) == 2
    engine.close()


def test_a_certificate_that_nobody_vouches_for_is_refused_with_the_reason(
    stubs: Make, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    stub = secure(stubs, certificate)
    engine = joined(stub)
    with pytest.raises(EngineError, match=rf"{stub.url} did not answer .*CERTIFICATE_VERIFY_FAILED"):
        engine.wait_ready(timeout_s=0.3)
    assert stub.asked == []
    engine.close()
