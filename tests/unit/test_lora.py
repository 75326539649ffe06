"""The arithmetic of adapters, where they may be put, and whose names they leave alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grpo_ds.actor.head import TokenLogProbs
from grpo_ds.config import LoraConfig, RecipeError
from grpo_ds.lora import LoraLinear, adapters_of, adapters_off, add_adapters, find_targets, merge, merge_slice
from grpo_ds.recipe import read_recipe
from grpo_ds.runlog import settings_that_must_match
from grpo_ds.shards import list_shards
from tests.models import tiny_qwen3

LORA = LoraConfig(rank=2, alpha=6.0, targets=["q_proj", "down_proj"])
SIZES = {
    "vocab_size": 13,
    "hidden_size": 8,
    "intermediate_size": 11,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
}


def small_model(**other: Any) -> Any:
    return tiny_qwen3(seed=0, tied=True, **SIZES, **other)


def trained(model: Any, scale: float = 0.3) -> Any:
    """The model with adapters whose B is not zero."""
    add_adapters(model, LORA, seed=1)
    random = torch.Generator().manual_seed(2)
    for layer in adapters_of(model).values():
        layer.lora_B.data += scale * torch.randn(layer.lora_B.shape, generator=random)
    return model


def layer_of(dtype: torch.dtype, bias: bool = True, scale: float = 0.3) -> LoraLinear:
    torch.manual_seed(0)
    layer: Any = nn.Linear(5, 4, bias=bias).to(dtype)
    LoraLinear.adapt(layer, 2, 6.0, seed=1)
    layer.lora_B.data += (scale * torch.randn(4, 2)).to(dtype)
    adapted: LoraLinear = layer
    return adapted


# ---- arithmetic ----


def test_the_merged_weight_by_hand() -> None:
    w, a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [10.0]])
    # 0.5 x [[1 x 1, 1 x 2], [10 x 1, 10 x 2]] on top
    assert merge(w, a, b, 0.5).tolist() == [[1.5, 3.0], [8.0, 14.0]]


def test_a_piece_that_begins_within_a_row_and_ends_behind_the_weight_by_hand() -> None:
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [2.0], [3.0]])
    # Elements 3, 4, 5 of a (3, 2) weight of ones, and one of padding: + 10 x (2 x 2, 3 x 1, 3 x 2).
    part = torch.tensor([1.0, 1.0, 1.0, 9.0])
    assert merge_slice(part, 3, a, b, 10.0).tolist() == [41.0, 31.0, 61.0, 9.0]
    padding = torch.tensor([7.0, 8.0])
    assert merge_slice(padding, 6, a, b, 10.0).tolist() == [7.0, 8.0]
    assert part.tolist() == [1.0, 1.0, 1.0, 9.0], "the weight itself stays"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 7, 40])
def test_the_pieces_of_all_ranks_are_the_merged_weight(world: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    w, a, b = (torch.randn(shape, generator=random).to(dtype) for shape in ((7, 5), (3, 5), (7, 3)))
    length = -(-35 // world)
    padded = torch.cat([w.flatten(), torch.full((world * length - 35,), 99.0, dtype=dtype)])
    parts = [merge_slice(part, k * length, a, b, 0.7) for k, part in enumerate(padded.split(length))]
    assert all(part.dtype == dtype and part.numel() == length for part in parts)
    found = torch.cat(parts)
    wanted = (w.double() + 0.7 * b.double() @ a.double()).flatten()
    torch.testing.assert_close(found[:35].double(), wanted, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    assert (found[35:] == 99.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_bit_for_bit_with_the_weight_that_engines_get(dtype: torch.dtype) -> None:
    layer, x = layer_of(dtype), torch.randn(3, 2, 5).to(dtype)
    published = merge_slice(layer.weight.detach().flatten(), 0, layer.lora_A, layer.lora_B, layer.lora_scale)
    wanted = x @ published.view(4, 5).t() + layer.bias
    assert torch.equal(layer(x), wanted)


def test_what_is_rounded_away_in_the_merged_weight_is_not_in_the_forward_pass_either() -> None:
    # 1e-4 of a weight of 1 is below half a step (2**-8) of bfloat16; a side branch x A B would add it.
    layer = layer_of(torch.bfloat16, bias=False, scale=0.0)
    layer.weight.data.fill_(1.0)
    layer.lora_A.data.fill_(1.0)
    layer.lora_B.data.fill_(1e-4 / layer.lora_scale / 2)
    x = torch.full((1, 5), 2.0**-6, dtype=torch.bfloat16)
    with adapters_off(layer):
        base = layer(x)
    assert torch.equal(layer(x), base)


def test_gradients_are_those_of_autograd_on_the_formula() -> None:
    layer, x = layer_of(torch.float32), torch.randn(3, 2, 5, requires_grad=True)
    layer.weight.requires_grad_(False)
    up = torch.randn(3, 2, 4)
    inputs = (x, layer.lora_A, layer.lora_B, layer.bias)
    found = torch.autograd.grad((layer(x) * up).sum(), inputs)
    formula = x @ (layer.weight + 3.0 * layer.lora_B @ layer.lora_A).t() + layer.bias
    wanted = torch.autograd.grad((formula * up).sum(), inputs)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_frozen_head_gets_no_gradient_and_passes_the_same_one_on() -> None:
    hidden, targets = torch.randn(6, 8), torch.arange(6)
    gradients: list[Any] = []
    for frozen in (False, True):
        model = small_model()
        model.requires_grad_(not frozen)
        head = TokenLogProbs(model, temperature=0.7, chunk=4).head
        x = hidden.clone().requires_grad_()
        head(x, targets)[0].sum().backward()
        gradients.append(x.grad)
        assert (head.weight.grad is None) == frozen
    assert torch.equal(gradients[0], gradients[1])


# ---- in a model ----


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(2, 9)[None], use_cache=False).logits
    return found


def test_adapters_begin_without_effect_are_the_same_everywhere_and_alone_are_trained() -> None:
    plain, model, other = small_model(), small_model(), small_model()
    add_adapters(model, LORA, seed=1)
    add_adapters(other, LORA, seed=1)
    assert torch.equal(logits(model), logits(plain))
    learns = {name for name, param in model.named_parameters() if param.requires_grad}
    stems = [f"model.layers.{k}.{name}" for k in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")]
    assert learns == {f"{stem}.{kind}" for stem in stems for kind in ("lora_A", "lora_B")}
    assert set(adapters_of(model)) == set(stems)
    a = dict(model.named_parameters())
    assert all(torch.equal(a[name], param) for name, param in other.named_parameters())
    first, second = (a[f"{stem}.lora_A"] for stem in stems[::2])
    assert not torch.equal(first, second) and float(first.detach().abs().max()) <= 8**-0.5


def test_rank_0_leaves_the_model_as_it_is() -> None:
    model = small_model()
    add_adapters(model, LoraConfig(), seed=1)
    assert not adapters_of(model) and all(param.requires_grad for param in model.parameters())


def test_adapters_are_off_within_the_context_only_also_when_it_fails() -> None:
    base, model = logits(small_model()), trained(small_model())
    on = logits(model)
    assert float((on - base).abs().max()) > 1e-2
    with pytest.raises(ZeroDivisionError), adapters_off(model):
        with adapters_off(model):
            pass
        assert torch.equal(logits(model), base)
        raise ZeroDivisionError
    assert torch.equal(logits(model), on)


def test_gradients_reach_the_first_layer_and_recomputing_activations_does_not_change_them() -> None:
    found = []
    for recompute in (False, True):
        model = trained(small_model())
        if recompute:
            model.gradient_checkpointing_enable()
        model.train()
        model(torch.arange(2, 9)[None], use_cache=False).logits.log_softmax(-1)[..., 3].sum().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*found, strict=True):
        assert float(one.abs().max()) > 0
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


# ---- the shards ----


def test_shards_have_the_names_of_the_base_and_hold_the_merged_weights() -> None:
    plain, model = small_model(), trained(small_model())
    wrapped = TokenLogProbs(model, temperature=1.0, chunk=4)
    before = {s.name: s.param.detach().clone() for s in list_shards(TokenLogProbs(plain, temperature=1.0, chunk=4), 3)}
    found = {s.name: torch.cat([s.local(rank) for rank in range(3)]).view(s.shape) for s in list_shards(wrapped, 3)}
    assert found.keys() == before.keys() and "lm_head.weight" not in found, "the tied head once"
    plain.load_state_dict({**found, "lm_head.weight": found["model.embed_tokens.weight"]})
    torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=1e-5)
    for name, weight in found.items():
        changed = name.split(".")[-2] in LORA.targets
        assert torch.equal(weight, before[name]) != changed


class Partitioned(nn.Parameter):
    """As DeepSpeed's: nothing in it until all ranks have put it together."""

    def hold(self, calls: list[str]) -> Partitioned:
        self.ds_tensor, self.full, self.calls = None, self.data, calls
        self.data = torch.empty(0)
        return self

    def all_gather(self, param_list: list[Partitioned]) -> None:
        self.calls.append(f"gather {len(param_list)}")
        for param in param_list:
            param.data = param.full

    def partition(self, param_list: list[Partitioned], has_been_updated: bool) -> None:
        self.calls.append(f"partition {has_been_updated}")
        for param in param_list:
            param.data = torch.empty(0)


def test_only_the_adapter_is_put_together_and_it_is_given_back() -> None:
    layer: Any = layer_of(torch.float32, bias=False)
    wanted = merge(layer.weight.detach(), layer.lora_A.detach(), layer.lora_B.detach(), layer.lora_scale).flatten()
    calls: list[str] = []
    weight = layer.weight
    for name in ("lora_A", "lora_B"):
        setattr(layer, name, Partitioned(getattr(layer, name).data).hold(calls))
    weight.ds_numel, weight.ds_shape, weight.ds_tensor = 20, (4, 5), weight.detach().flatten()[7:14].clone()
    weight.data = torch.empty(0)
    (shard,) = list_shards(layer, 3)
    torch.testing.assert_close(shard.local(1), wanted[7:14])
    assert calls == ["gather 2", "partition False"]
    assert layer.lora_A.numel() == 0 and weight.numel() == 0


# ---- refusals ----


def test_a_target_that_no_layer_has_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(RecipeError) as error:
        find_targets(small_model(), ["q_proj", "qkv_proj", "lm_head"])
    assert str(error.value) == (
        "model.lora.targets: Qwen3ForCausalLM has no linear layer named lm_head, qkv_proj: choose from down_proj, "
        "gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )


def test_a_layer_that_shares_its_weight_is_refused() -> None:
    model = small_model()
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    with pytest.raises(RecipeError, match=r"layers\.0\.self_attn\.q_proj shares its weight with another layer"):
        find_targets(model, ["q_proj"])


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("rank=-1", "rank must not be negative"),
        ("alpha=0", "alpha must be positive"),
        ("targets=[]", "targets is empty: name at least one"),
    ],
)
def test_impossible_settings_are_refused(option: str, says: str) -> None:
    with pytest.raises(RecipeError, match=f"model.lora.{says}"):
        read_recipe(["--recipe", "quickstart", f"--model.lora.{option}"])


def test_a_resumed_run_keeps_its_adapters() -> None:
    first, other = (
        settings_that_must_match(
            read_recipe(["--recipe", "lora", f"--model.lora.rank={rank}"])[0], "rows", greedy_baseline=False
        )
        for rank in (8, 4)
    )
    saved = json.loads(json.dumps(first))
    assert saved == first, "a checkpoint holds it as JSON"
    assert saved["model.lora"] != other["model.lora"]
