"""The demo builder, on a very short run, and the demo files that ship with the repository."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_ds.demo import (
    IGNORED_LABEL,
    DemoSettings,
    Sum,
    accuracy,
    build,
    build_model,
    build_tokenizer,
    encode_batch,
    main,
    split_sums,
    with_slips,
)

SHIPPED = Path(__file__).parents[2] / "recipes" / "demo"
SIZE_LIMIT = 4_000_000


def read_sums(path: Path) -> list[Sum]:
    """The file's rows; fails when a row has other columns, or an answer that is not its prompt's sum."""
    sums = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        left, right = row["prompt"].removesuffix("=").split("+")
        item = Sum(int(left), int(right))
        assert row == {"prompt": item.prompt, "answer": item.answer}
        sums.append(item)
    return sums


def unordered(sums: list[Sum]) -> set[frozenset[int]]:
    return {frozenset((item.left, item.right)) for item in sums}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    build(out, DemoSettings(steps=3, batch=16, train_rows=100, heldout_rows=20))
    return out


def test_a_prompt_and_its_answer_are_written_as_a_sum() -> None:
    assert (Sum(27, 58).prompt, Sum(27, 58).answer) == ("27+58=", "85")


def test_training_and_held_out_sums_together_are_all_pairs_less_the_mirror_images_of_held_out_ones() -> None:
    training, heldout = split_sums(DemoSettings())
    assert len(heldout) == len(unordered(heldout)) == 256
    assert not unordered(training) & unordered(heldout)
    mirrored = sum(item.left != item.right for item in heldout)
    assert len(set(training)) == len(training) == 90 * 90 - 256 - mirrored


def test_the_split_depends_on_the_seed_only() -> None:
    assert split_sums(DemoSettings(seed=1)) == split_sums(DemoSettings(seed=1))
    assert split_sums(DemoSettings(seed=1)) != split_sums(DemoSettings(seed=2))


def test_slips_replace_digits_at_the_stated_rate_and_never_by_themselves() -> None:
    rng = random.Random(0)
    assert with_slips("185", 0.0, rng) == "185"
    assert all(new != old for new, old in zip(with_slips("185" * 50, 1.0, rng), "185" * 50, strict=True))
    slipped = with_slips("7" * 10_000, 0.4, rng)
    # Binomial(10000, 0.4) has standard deviation 49; 200 is four of them.
    assert abs(sum(digit != "7" for digit in slipped) - 4000) < 200


def test_only_the_answer_and_the_end_token_are_learned() -> None:
    tokenizer = build_tokenizer()
    ids, labels = encode_batch([Sum(10, 11), Sum(60, 70)], tokenizer, 0.0, random.Random(0))
    assert [tokenizer.decode(row) for row in ids] == ["10+11=21<eos><pad>", "60+70=130<eos>"]
    assert (labels[:, :6] == IGNORED_LABEL).all()
    assert tokenizer.decode(labels[0, 6:9]) == "21<eos>" and labels[0, 9] == IGNORED_LABEL
    assert tokenizer.decode(labels[1, 6:]) == "130<eos>"


def test_the_tokenizer_adds_nothing_and_marks_foreign_characters() -> None:
    tokenizer = build_tokenizer()
    assert len(tokenizer) == 32
    assert len(tokenizer("27+58=")["input_ids"]) == 6
    assert tokenizer.unk_token_id in tokenizer("2$3")["input_ids"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "27+58="}], tokenize=False) == "27+58="


def test_a_short_run_writes_a_folder_that_the_auto_classes_load(short_run: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(short_run / "model")
    tokenizer = AutoTokenizer.from_pretrained(short_run / "model")
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.dtype == torch.float32
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tokenizer.decode(tokenizer("27+58=")["input_ids"]) == "27+58="
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert (short_run / "model" / "model.safetensors").stat().st_size <= SIZE_LIMIT


def test_a_short_run_writes_disjoint_rows(short_run: Path) -> None:
    train, heldout = read_sums(short_run / "train.jsonl"), read_sums(short_run / "heldout.jsonl")
    assert (len(train), len(heldout)) == (100, 20)
    assert not unordered(train) & unordered(heldout)


def test_the_same_seed_builds_the_same_model_and_training_changes_it(short_run: Path, tmp_path: Path) -> None:
    build(tmp_path, DemoSettings(steps=3, batch=16, train_rows=100, heldout_rows=20))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    first = AutoModelForCausalLM.from_pretrained(short_run / "model").state_dict()
    untrained = build_model(build_tokenizer(), seed=0).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], untrained["model.embed_tokens.weight"])


def test_the_command_line_refuses_zero_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--steps", "0"])
    assert "--steps is 0" in capsys.readouterr().err


def test_the_shipped_model_is_small() -> None:
    model = AutoModelForCausalLM.from_pretrained(SHIPPED / "model")
    assert (SHIPPED / "model" / "model.safetensors").stat().st_size <= SIZE_LIMIT
    assert 700_000 < sum(parameter.numel() for parameter in model.parameters()) < 1_000_000


def test_the_shipped_rows_are_disjoint_and_survive_the_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / "model")
    train, heldout = read_sums(SHIPPED / "train.jsonl"), read_sums(SHIPPED / "heldout.jsonl")
    assert (len(set(train)), len(set(heldout))) == (len(train), len(heldout)) == (3000, 256)
    assert not unordered(train) & unordered(heldout)
    texts = [text for item in train + heldout for text in (item.prompt, item.answer)]
    assert tokenizer.batch_decode(tokenizer(texts)["input_ids"]) == texts


def test_the_shipped_model_knows_sums_but_samples_them_wrong() -> None:
    model = AutoModelForCausalLM.from_pretrained(SHIPPED / "model")
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / "model")
    heldout = read_sums(SHIPPED / "heldout.jsonl")
    torch.manual_seed(0)
    assert 0.25 <= accuracy(model, tokenizer, heldout, sampled=True, samples=4) <= 0.42
    assert accuracy(model, tokenizer, heldout, sampled=False) >= 0.7
