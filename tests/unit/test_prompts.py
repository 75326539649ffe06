"""Prompt files, tokenisation and the stateless order, with a tiny word-level tokenizer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from grpo_ds.config import DataConfig, RecipeError
from grpo_ds.prompts import PromptStream, RowTable, epoch_permutation, load_rows

WORDS = ["<pad>", "<s>", "</s>", "user:", "system:", "assistant:", "a", "b", "c", "d", "e", "f", "g", "h"]
ID = {word: number for number, word in enumerate(WORDS)}
TEMPLATE = (
    "<s> {% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def make_tokenizer(template: str | None = TEMPLATE, close: bool = False) -> Any:
    core = Tokenizer(WordLevel(ID, unk_token="<pad>"))
    core.pre_tokenizer = WhitespaceSplit()
    single = "<s> $A </s>" if close else "<s> $A"
    core.post_processor = TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = template
    return tokenizer


def ids(text: str) -> tuple[int, ...]:
    return tuple(ID[word] for word in text.split())


def table(*prompts: Any) -> RowTable:
    return RowTable("data.train", "x.jsonl", tuple(prompts), tuple({"answer": n} for n in range(len(prompts))))


def stream(*prompts: Any, seed: int = 0, tokenizer: Any = None, **settings: Any) -> PromptStream:
    data = DataConfig(train="x.jsonl", **settings)
    return PromptStream(table(*prompts), tokenizer or make_tokenizer(), data, seed)


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path: Path, **settings: Any) -> RowTable:
    return load_rows("train", DataConfig(train=path.name, **settings), [path.parent / "nowhere", path.parent])


def test_jsonl_rows_keep_their_columns(tmp_path: Path) -> None:
    rows = load(write(tmp_path / "x.jsonl", {"prompt": "a b", "answer": 3}, {"prompt": "c", "answer": 4}))
    assert rows.prompts == ("a b", "c")
    assert rows.columns == ({"answer": 3}, {"answer": 4})


def test_a_unicode_line_separator_inside_a_string_does_not_split_a_row(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a\u2028b"}\n', encoding="utf-8")
    assert load(path).prompts == ("a\u2028b",)


def test_json_and_parquet_give_the_same_rows_as_jsonl(tmp_path: Path) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": "a"}], "answer": "1"},
        {"prompt": [{"role": "user", "content": "b"}], "answer": "2"},
    ]
    lines = load(write(tmp_path / "x.jsonl", *rows))
    (tmp_path / "x.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    for name in ("x.json", "x.parquet"):
        other = load(tmp_path / name)
        assert (other.prompts, other.columns) == (lines.prompts, lines.columns)


def test_the_column_map_renames_theirs_to_ours(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {"question": "a", "gold": 1, "extra": 2})
    rows = load(path, columns={"prompt": "question", "answer": "gold"})
    assert rows.prompts == ("a",)
    assert rows.columns == ({"answer": 1, "extra": 2},)


def test_verl_rows_offer_the_ground_truth_as_a_column(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {"prompt": "a", "reward_model": {"style": "rule", "ground_truth": "42"}})
    assert load(path).columns[0]["ground_truth"] == "42"


def test_a_missing_file_is_named_with_the_recipe_key(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.train: there is no file 'gone\.jsonl' .*correct the path"):
        load(tmp_path / "gone.jsonl")


def test_a_hub_data_set_has_a_configuration_and_a_split_for_each_use(tmp_path: Path) -> None:
    # A folder laid out like a data set of the hub, with two configurations, is read in the same way.
    write(tmp_path / "gsm" / "main" / "train.jsonl", {"question": "a", "answer": "1"})
    write(tmp_path / "gsm" / "main" / "test.jsonl", {"question": "b", "answer": "2"})
    write(tmp_path / "gsm" / "other" / "train.jsonl", {"question": "c", "answer": "3"})
    files = "configs:\n"
    for config in ("main", "other"):
        files += f"- config_name: {config}\n  data_files:\n  - {{split: train, path: {config}/train.jsonl}}\n"
        files += "  - {split: test, path: main/test.jsonl}\n"
    (tmp_path / "gsm" / "README.md").write_text(f"---\n{files}---\n")
    data = DataConfig(train="gsm", heldout="gsm", config="main", heldout_split="test", columns={"prompt": "question"})
    assert load_rows("train", data, [tmp_path]).prompts == ("a",)
    assert load_rows("heldout", data, [tmp_path]).prompts == ("b",)
    assert load_rows("train", replace(data, config="other"), [tmp_path]).prompts == ("c",)
    with pytest.raises(RecipeError, match=r"data\.heldout: .*data\.heldout_split: test, data\.config: null.*'main'"):
        load_rows("heldout", replace(data, config=None), [tmp_path])


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "x.jsonl", {"prompt": "a"})
    assert load_rows("train", DataConfig(train="~/x.jsonl"), [tmp_path / "nowhere"]).prompts == ("a",)
    with pytest.raises(RecipeError, match=r"there is no file '~/y\.jsonl' \(tried .*/y\.jsonl\)"):
        load_rows("train", DataConfig(train="~/y.jsonl"), [tmp_path])


def test_a_file_that_is_cut_off_or_is_something_else_is_named(tmp_path: Path) -> None:
    whole = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"] * 100}), whole)
    content = whole.read_bytes()
    damaged = content[:20] + b"\xff" * 40 + content[60:]
    for bad in (b"", b"hello", content[: len(content) // 2], damaged):
        whole.write_bytes(bad)
        with pytest.raises(
            RecipeError, match=r"data\.train: .*x\.parquet (is no Parquet file that )?can(not)? be read: "
        ) as e:
            load(whole)
        assert "\n" not in str(e.value)
    (tmp_path / "y.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match=r"y\.jsonl is not UTF-8 text \(byte 0\)"):
        load(tmp_path / "y.jsonl")


def test_a_row_without_the_prompt_column_is_named_with_the_columns_found(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {"prompt": "a"}, {"question": "b", "answer": 1})
    with pytest.raises(RecipeError, match=r"x\.jsonl, row 1 has no column 'prompt' \(found: question, answer\)"):
        load(path)


def test_a_malformed_line_is_named_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": \n')
    with pytest.raises(RecipeError, match=r"x\.jsonl:3 is not JSON"):
        load(path)


@pytest.mark.parametrize("prompt", [3, [], None, [{"role": "user"}], [{"role": "user", "content": 5}], ["a"]])
def test_a_prompt_that_is_no_text_and_no_messages_is_refused(tmp_path: Path, prompt: Any) -> None:
    with pytest.raises(RecipeError, match="row 0"):
        load(write(tmp_path / "x.jsonl", {"prompt": prompt}))


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has no rows"):
        load(write(tmp_path / "x.jsonl"))


def test_a_column_that_is_no_json_value_is_refused(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "image": [b"\x00"]}), tmp_path / "x.parquet")
    with pytest.raises(RecipeError, match=r"row 0, column 'image'.*remove or convert"):
        load(tmp_path / "x.parquet")


def test_a_raw_string_gets_the_default_special_tokens_and_never_two_begin_tokens() -> None:
    prompts = stream("a b", "<s> a b", shuffle=False).take(0, 2)
    assert [p.token_ids for p in prompts] == [ids("<s> a b")] * 2


def test_a_tokenizer_that_closes_texts_does_not_close_prompts() -> None:
    prompts = stream("a b", "a </s>", shuffle=False, tokenizer=make_tokenizer(close=True)).take(0, 2)
    assert prompts[0].token_ids == ids("<s> a b")
    assert prompts[1].token_ids[:3] == ids("<s> a </s>")


def test_messages_get_the_template_with_the_generation_prompt_and_one_begin_token() -> None:
    message = [{"role": "user", "content": "a b"}]
    (prompt,) = stream(message).take(0, 1)
    assert prompt.token_ids == ids("<s> user: a b assistant:")
    assert prompt.text == message
    assert prompt.columns == {"answer": 0}


def test_a_system_prompt_turns_the_template_on_for_strings_and_rewards_still_see_the_string() -> None:
    (prompt,) = stream("a", system_prompt="b c").take(0, 1)
    assert prompt.token_ids == ids("<s> system: b c user: a assistant:")
    assert prompt.text == "a"


def test_chat_template_true_wraps_strings() -> None:
    assert stream("a", chat_template=True).take(0, 1)[0].token_ids == ids("<s> user: a assistant:")


def test_templates_that_are_missing_or_contradict_are_refused() -> None:
    message = [{"role": "user", "content": "a"}]
    with pytest.raises(RecipeError, match=r"row 0 needs a chat template"):
        stream(message, tokenizer=make_tokenizer(template=None))
    with pytest.raises(RecipeError, match=r"data\.system_prompt needs the chat template"):
        stream("a", system_prompt="b", chat_template=False)
    with pytest.raises(RecipeError, match=r"row 0 holds messages"):
        stream(message, chat_template=False)
    with pytest.raises(RecipeError, match=r"row 0 begins with a system message"):
        stream([{"role": "system", "content": "a"}, *message], system_prompt="b")


def test_overlong_rows_are_refused_by_name_and_length() -> None:
    with pytest.raises(RecipeError, match=r"row 1 has 4 prompt tokens, above data\.max_prompt_tokens \(3\)"):
        stream("a", "a b c", max_prompt_tokens=3)


def test_overlong_rows_are_dropped_and_counted_and_the_others_keep_their_row_numbers() -> None:
    prompts = stream("a b c", "a b", "a b c d", "c d", max_prompt_tokens=3, overlong_prompts="drop", shuffle=False)
    assert (len(prompts), prompts.dropped) == (2, 2)
    assert [(p.row, p.token_ids, p.columns["answer"]) for p in prompts.take(0, 2)] == [
        (1, ids("<s> a b"), 1),
        (3, ids("<s> c d"), 3),
    ]


def test_dropping_every_row_is_refused() -> None:
    with pytest.raises(RecipeError, match="all 2 rows"):
        stream("a b", "c d", max_prompt_tokens=2, overlong_prompts="drop")


def test_a_prompt_without_tokens_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(RecipeError, match="row 1 has a prompt without tokens"):
        stream("a", "", tokenizer=tokenizer)


def test_the_stream_is_stateless_and_every_epoch_is_a_permutation() -> None:
    words = WORDS[6:13]
    prompts = stream(*words)
    whole = prompts.take(0, 21)
    assert [p.index for p in whole] == list(range(21))
    for epoch in range(3):
        assert sorted(p.row for p in whole[7 * epoch : 7 * epoch + 7]) == list(range(7))
    fresh = stream(*words)
    assert fresh.take(12, 5) == whole[12:17]  # across an epoch's edge, asked for first
    assert fresh.take(0, 3) == whole[:3]
    assert len({tuple(p.row for p in whole[7 * e : 7 * e + 7]) for e in range(3)}) == 3


def test_the_order_depends_on_the_seed_and_is_the_file_order_without_shuffle() -> None:
    words = WORDS[6:14]
    assert [p.row for p in stream(*words, seed=1).take(0, 8)] != [p.row for p in stream(*words, seed=2).take(0, 8)]
    assert [p.row for p in stream(*words, shuffle=False).take(6, 4)] == [6, 7, 0, 1]


def test_the_permutation_never_changes_between_releases() -> None:
    assert epoch_permutation(8, seed=0, epoch=0) == [3, 2, 4, 0, 5, 1, 7, 6]


def test_the_fingerprint_changes_with_any_token_row_order_or_boundary_and_not_with_the_seed() -> None:
    base = stream("a b", "c").fingerprint
    assert stream("a b", "c", seed=5).fingerprint == base
    others = [stream("a b", "d"), stream("c", "a b"), stream("a", "b c"), stream("a b", "c", "c")]
    assert base not in {other.fingerprint for other in others}


def test_the_report_names_counts_lengths_and_one_prompt() -> None:
    report = stream("a", "a b", "a b c d", "a b c d e", max_prompt_tokens=5, overlong_prompts="drop").report()
    assert "3 prompts, 1 dropped" in report
    assert "min 2, median 3, max 5" in report
    assert "<s> a" in report
