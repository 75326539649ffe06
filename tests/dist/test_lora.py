"""LoRA on real ranks: only adapters are trained, and everybody who is given the model is given the merged one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.dist import cases, oracle
from tests.dist.adapters import CUTS, KINDS, LORA
from tests.dist.harness import launch

# The first test of a world size waits for its launch.
pytestmark = pytest.mark.timeout(600)

SCALE = LORA.alpha / LORA.rank
RUNS = [(1, "partitioned"), (4, "partitioned"), *((2, config) for config in KINDS)]
EVERYWHERE = pytest.mark.parametrize(("ranks", "config"), RUNS, indirect=["ranks"])


def base_of(config: str, folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {k: v.detach() for k, v in cases.read_model(folder / KINDS[config], dtype).named_parameters()}


def adapter_in(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """{weight: (A, B)} in float64, from PEFT's file."""
    tensors = load_file(folder / "adapter_model.safetensors")
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    assert len(tensors) == 2 * len(names)
    return {
        name.removeprefix("base_model.model.") + ".weight": (
            tensors[f"{name}.lora_A.weight"].double(),
            tensors[f"{name}.lora_B.weight"].double(),
        )
        for name in names
    }


def merged_by_hand(config: str, world: int, folder: Path) -> dict[str, Tensor]:
    """float64."""
    weights = base_of(config, folder, torch.float64)
    for name, (a, b) in adapter_in(folder / f"lora-{world}-{config}" / "adapter").items():
        weights[name] = weights[name] + SCALE * b @ a
    return weights


@EVERYWHERE
def test_only_adapters_are_trained_and_have_optimizer_state(ranks: list[Any], config: str, folder: Path) -> None:
    base = base_of(config, folder)
    targets = [n for n in base if n.split(".")[-2] in LORA.targets]
    assert len(targets) == 8, "4 in each of 2 layers"
    found = [rank["lora"][config] for rank in ranks]
    wanted = {n.removesuffix("weight") + kind for n in targets for kind in ("lora_A", "lora_B")}
    numbers = sum(LORA.rank * sum(base[n].shape) for n in targets)
    for one in found:
        assert set(one["names"]) == wanted and one["frozen gradients"] == 0
        assert all(norm > 1e-3 for norm in one["norms"])
    # Each tensor may be padded to a multiple of the ranks.
    assert numbers <= sum(one["masters"] for one in found) <= numbers + len(wanted) * len(ranks)


@EVERYWHERE
def test_engines_get_the_merged_model_under_the_names_of_the_base(
    ranks: list[Any], config: str, folder: Path
) -> None:
    base, wanted = base_of(config, folder), merged_by_hand(config, len(ranks), folder)
    for rank in ranks[::2] if len(ranks) == 4 else ranks[:1]:
        first, second = rank["lora"][config]["first"], rank["lora"][config]["second"]
        assert first.keys() == second.keys() == base.keys()
        for name, start in base.items():
            assert torch.equal(first[name], start), "B begins as zeros"
            moved = float((second[name] - start).abs().max())
            if name.split(".")[-2] in LORA.targets:
                torch.testing.assert_close(second[name].double(), wanted[name], rtol=0, atol=1e-6)
                assert moved > 1e-3
            else:
                assert moved == 0


@EVERYWHERE
def test_the_exported_model_is_what_the_engines_got(ranks: list[Any], config: str, folder: Path) -> None:
    loaded = cases.read_model(folder / f"lora-{len(ranks)}-{config}" / "hf", torch.float32)
    second = ranks[0]["lora"][config]["second"]
    assert {k for k, _ in loaded.named_parameters()} == second.keys()
    assert all(torch.equal(param.detach(), second[name]) for name, param in loaded.named_parameters())


@EVERYWHERE
def test_the_trainer_computes_with_the_merged_model_and_its_reference_with_the_base(
    ranks: list[Any], config: str, folder: Path, samples: list[dict[str, Tensor]]
) -> None:
    trained = folder / f"lora-{len(ranks)}-{config}" / "hf"
    found = {}
    for state, path in (("on", trained), ("off", folder / KINDS[config])):
        model = cases.read_model(path, torch.float32)
        parts = {i: lp for rank in ranks for i, lp in rank["lora"][config]["logprobs"][state].items()}
        found[state] = torch.cat([parts[i] for i in range(len(samples))])
        with torch.no_grad():
            truth = torch.cat([oracle.logprobs(model, raw) for raw in samples])
        assert float((found[state] - truth).abs().max()) <= 1e-5
    assert float((found["on"] - found["off"]).abs().max()) > 0.01, "training must show"


@pytest.mark.parametrize("ranks", [1, 2, 4], indirect=True)
def test_the_gradient_is_the_chain_rules_however_the_step_is_split(ranks: list[Any], folder: Path) -> None:
    world = len(ranks)
    model = cases.read_model(folder / "untied", torch.float64)
    model.load_state_dict(merged_by_hand("partitioned", world, folder))
    of_merged = oracle.gradient(CUTS[0], oracle.Plain(model), cases.read_samples(folder))
    wanted = {}
    for name, (a, b) in adapter_in(folder / f"lora-{world}-partitioned" / "adapter").items():
        stem = name.removesuffix("weight")
        wanted[f"{stem}lora_A"] = SCALE * b.t() @ of_merged[name]
        wanted[f"{stem}lora_B"] = SCALE * of_merged[name] @ a.t()
    for (gradient,) in ranks[0]["lora"]["partitioned"]["gradients"]:
        assert gradient.keys() == wanted.keys()
        for kind in ("lora_A", "lora_B"):  # A's is much smaller than B's
            mine, truth = ({k: v for k, v in g.items() if k.endswith(kind)} for g in (gradient, wanted))
            error = oracle.relative_error(mine, truth)
            print("relative error", kind, error)
            assert error <= 1e-5


def test_every_zero_stage_trains_the_same_adapters(world_2: list[Any]) -> None:
    found = world_2[0]["lora"]
    for one, other in (("partitioned", "stage2"), ("zero3.json", "stage1")):
        for name, weight in found[one]["weights"].items():
            torch.testing.assert_close(found[other]["weights"][name], weight, rtol=0, atol=1e-5)


@EVERYWHERE
def test_the_adapter_folder_has_pefts_names_and_shapes(ranks: list[Any], config: str, folder: Path) -> None:
    place = folder / f"lora-{len(ranks)}-{config}" / "adapter"
    settings = json.loads((place / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["task_type"], settings["r"], settings["lora_alpha"]) == (
        *("LORA", "CAUSAL_LM"),
        *(LORA.rank, LORA.alpha),
    )
    assert settings["target_modules"] == LORA.targets
    assert settings["base_model_name_or_path"] == str(folder / KINDS[config])
    tensors = load_file(place / "adapter_model.safetensors")
    down = "base_model.model.model.layers.1.mlp.down_proj"  # 47 -> 33
    assert tensors[f"{down}.lora_A.weight"].shape == (3, 47)
    assert tensors[f"{down}.lora_B.weight"].shape == (33, 3)
    assert sorted(path.name for path in place.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("config", KINDS)
def test_new_processes_that_load_a_checkpoint_go_on_bit_for_bit(
    world_2: list[Any], resumed: list[Any], config: str
) -> None:
    for before, after in zip(world_2, resumed, strict=True):
        saved, found = before["lora"][config], after["lora"][config]
        assert all(torch.equal(found["loaded"][k], saved["weights"][k]) for k in saved["weights"])
        assert not all(torch.equal(found["fresh"][k], saved["weights"][k]) for k in saved["weights"])
        assert found["losses"] == saved["later"]["losses"] and len(found["losses"]) > 2
        assert all(torch.equal(found["weights"][k], v) for k, v in saved["later"]["weights"].items())


def test_a_checkpoint_holds_no_frozen_weight(world_2: list[Any], folder: Path) -> None:
    # Under stage 2 one file has the whole of it.
    (file,) = (folder / "lora-2-stage2").rglob("mp_rank_00_model_states.pt")
    held = torch.load(file, weights_only=False)["module"]
    assert held and all(".lora_" in name for name in held)


@pytest.mark.slow
def test_a_checkpoint_goes_on_with_another_number_of_ranks(world_2: list[Any], folder: Path) -> None:
    (found,) = launch("tests.dist.adapters:one_rank_goes_on", 1, folder)
    for config in KINDS:
        saved = world_2[0]["lora"][config]
        for name, weight in saved["later"]["weights"].items():
            assert torch.equal(found[config]["loaded"][name], saved["weights"][name])
            torch.testing.assert_close(found[config]["weights"][name], weight, rtol=0, atol=2e-6)
