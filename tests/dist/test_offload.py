"""The optimizer in host memory steps as the one on the device does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.dist.harness import launch


@pytest.mark.slow  # compiles DeepSpeed's Adam: some three minutes on two cores
@pytest.mark.timeout(1200)
def test_two_ranks_compile_the_offloaded_optimizer_once_and_take_the_same_steps_with_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    for rank in launch("tests.dist.offload:main", 2, folder, timeout_s=1000):
        plain, offloaded = rank["zero3.json"], rank["zero3_offload.json"]
        assert (plain["optimizer"], offloaded["optimizer"]) == ("AdamW", "DeepSpeedCPUAdam")
        assert len(plain["norms"]) >= 2
        assert offloaded["norms"] == pytest.approx(plain["norms"], rel=1e-5)
        for name, weight in plain["weights"].items():
            torch.testing.assert_close(offloaded["weights"][name], weight, rtol=1e-5, atol=1e-6)
    (made,) = (tmp_path / "extensions" / "grpo_ds").iterdir()
    assert {file.name for file in made.iterdir()} == {"cpu_adam.so", "build.log", "lock"}, "no lock of torch is left"
    assert [file.name for file in (tmp_path / "extensions").iterdir()] == ["grpo_ds"], "DeepSpeed built nothing itself"
