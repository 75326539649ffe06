"""Prompt data: a file or hub data set becomes an endless, stateless stream of tokenised prompts.

Rows follow TRL's conventions: column `prompt` is a string or a list of {"role", "content"} messages, all other
columns go to the reward functions by name. verl's layout is read, too: `reward_model: {ground_truth: ...}` is offered
as column `ground_truth`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import statistics
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grpo_ds.config import DataConfig, RecipeError
from grpo_ds.types import Prompt

_SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True, slots=True)
class RowTable:
    """The rows of one data source, before tokenisation."""

    key: str
    """Recipe key that named the source, for messages."""
    source: str
    """The file or hub name, for messages."""
    prompts: tuple[str | list[dict[str, str]], ...]
    """Prompt of each row."""
    columns: tuple[dict[str, Any], ...]
    """All other columns of each row."""

    def __len__(self) -> int:
        return len(self.prompts)


def load_rows(which: Literal["train", "heldout"], data: DataConfig, base_dirs: Sequence[Path]) -> RowTable:
    """Reads what `data.train` or `data.heldout` names: a .jsonl, .json (a list of objects) or .parquet file, looked up in
    each of `base_dirs` (~ is the home folder); otherwise a hub data set, or a folder laid out like one.

    Raises RecipeError naming the key, the source and the row.
    """
    key, named = f"data.{which}", data.train if which == "train" else str(data.heldout)
    path = os.path.expanduser(named)
    found = next((base / path for base in base_dirs if (base / path).exists()), None)
    if found is not None and found.is_file():
        source, rows = str(found), _read_file(found, key)
    elif Path(path).suffix in _SUFFIXES or path.startswith(("/", ".")):
        tried = ", ".join(str(base / path) for base in base_dirs)
        raise RecipeError(f"{key}: there is no file {named!r} (tried {tried}); correct the path")
    else:
        split_key, split = (
            ("data.split", data.split) if which == "train" else ("data.heldout_split", data.heldout_split)
        )
        source, rows = named, _read_data_set(str(found or named), data.config, split, key, split_key)
    if not rows:
        raise RecipeError(f"{key}: {source} has no rows; name a data set with at least one prompt")
    parsed = [_parse_row(row, data.columns, f"{key}: {source}, row {number}") for number, row in enumerate(rows)]
    return RowTable(key, source, tuple(prompt for prompt, _ in parsed), tuple(columns for _, columns in parsed))


def _read_file(path: Path, key: str) -> list[Any]:
    if path.suffix not in _SUFFIXES:
        raise RecipeError(f"{key}: {path} is none of {', '.join(_SUFFIXES)}; convert it")
    try:
        if path.suffix == ".parquet":
            return _parquet_rows(path, key)
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{key}: {path} is not UTF-8 text (byte {error.start}); convert it") from error
    except OSError as error:
        raise RecipeError(f"{key}: {path} cannot be read: {error.strerror or error}; correct the file") from error
    return list(_json_lines(text, path, key)) if path.suffix == ".jsonl" else _json_list(text, path, key)


def _parquet_rows(path: Path, key: str) -> list[Any]:
    import pyarrow.parquet  # slow to import, and not needed for other files

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise RecipeError(
            f"{key}: {path} is no Parquet file that can be read: {' '.join(str(error).split())[:200]}; write it again"
        ) from error


def _json_lines(text: str, path: Path, key: str) -> Iterator[Any]:
    # Not splitlines(): it also splits at characters that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise RecipeError(
                    f"{key}: {path}:{number} is not JSON ({error.msg} at column {error.colno}); correct the line"
                ) from error


def _json_list(text: str, path: Path, key: str) -> list[Any]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecipeError(f"{key}: {path}:{error.lineno} is not JSON ({error.msg}); correct the file") from error
    if not isinstance(rows, list):
        raise RecipeError(f"{key}: {path} holds a JSON {type(rows).__name__}; a list of objects is needed")
    return rows


def _read_data_set(name: str, config: str | None, split: str, key: str, split_key: str) -> list[Any]:
    import datasets  # slow to import, and not needed for local files

    try:
        return list(datasets.load_dataset(name, config, split=split))
    except Exception as error:
        raise RecipeError(
            f"{key}: no file {name!r} exists, and as a hub data set ({split_key}: {split}, data.config: "
            f"{config or 'null'}) it cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())[:300]}; "
            "correct the name or download the data"
        ) from error


def _parse_row(row: Any, renames: Mapping[str, str], where: str) -> tuple[str | list[dict[str, str]], dict[str, Any]]:
    if not isinstance(row, dict):
        raise RecipeError(f"{where} is a JSON {type(row).__name__}; each row must be an object")
    theirs = {"prompt": "prompt", **renames}
    for ours, name in theirs.items():
        if name not in row:
            raise RecipeError(
                f"{where} has no column {name!r} (found: {', '.join(row) or 'none'}); "
                f"add it, or name the right column with data.columns: {{{ours}: ...}}"
            )
    taken = set(theirs.values())
    columns = {name: value for name, value in row.items() if name not in taken}
    columns |= {ours: row[name] for ours, name in renames.items() if ours != "prompt"}
    reward_model = columns.get("reward_model")
    if isinstance(reward_model, dict) and "ground_truth" in reward_model:
        columns.setdefault("ground_truth", reward_model["ground_truth"])
    for name, value in columns.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise RecipeError(f"{where}, column {name!r}: {error}; remove or convert the column") from error
    return _checked_prompt(row[theirs["prompt"]], where), columns


def _checked_prompt(prompt: Any, where: str) -> str | list[dict[str, str]]:
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list) or not prompt:
        raise RecipeError(f"{where}: the prompt is {prompt!r:.80}; it must be a string or a list of messages")
    for message in prompt:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise RecipeError(f"{where}: {message!r:.80} is no message; each needs `role` and `content`, both text")
    return prompt


class PromptStream:
    """The tokenised prompts in an endless order: epoch after epoch, each a new permutation of the rows.

    `tokenizer` is a Hugging Face tokenizer. Messages, and strings when `data.system_prompt` or `data.chat_template`
    turn the template on, are written by its chat template with the generation prompt; that text contains every
    special token already and gets no further ones. A raw string gets the tokenizer's default special tokens, except a
    second begin token and a closing end token.
    Raises RecipeError for rows that cannot be used.
    """

    def __init__(self, rows: RowTable, tokenizer: Any, data: DataConfig, seed: int) -> None:
        if data.system_prompt is not None and data.chat_template is False:
            raise RecipeError("data.system_prompt needs the chat template; remove data.chat_template: false")
        self._table, self._data, self._seed, self._tokenizer = rows, data, seed, tokenizer
        token_ids = self._tokenise()
        self._rows = [row for row, ids in enumerate(token_ids) if len(ids) <= data.max_prompt_tokens]
        """Row of the data file at each position of the unshuffled order."""
        self.dropped = len(token_ids) - len(self._rows)
        """Rows left out because of data.max_prompt_tokens."""
        if self.dropped and data.overlong_prompts == "error":
            row = next(row for row, ids in enumerate(token_ids) if len(ids) > data.max_prompt_tokens)
            raise RecipeError(
                f"{self._where(row)} has {len(token_ids[row])} prompt tokens, above data.max_prompt_tokens "
                f"({data.max_prompt_tokens}), as {self.dropped} rows in all; raise the limit or set "
                "data.overlong_prompts: drop"
            )
        if not self._rows:
            raise RecipeError(
                f"{rows.key}: all {self.dropped} rows of {rows.source} exceed data.max_prompt_tokens "
                f"({data.max_prompt_tokens}); raise the limit"
            )
        self._token_ids = [token_ids[row] for row in self._rows]
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        """Prompts of one epoch."""
        return len(self._rows)

    @property
    def fingerprint(self) -> str:
        """Hash of all prompts' token ids in file order; a resumed run must find the same."""
        digest = hashlib.sha256()
        for ids in self._token_ids:
            digest.update(f"{len(ids)}:{','.join(map(str, ids))};".encode())
        return digest.hexdigest()

    def take(self, start: int, count: int) -> list[Prompt]:
        """The prompts with index start .. start + count - 1; depends on nothing but the data, the seed and these."""
        return [self._prompt(index) for index in range(start, start + count)]

    def report(self) -> str:
        """What a person should look at before a run: counts, prompt lengths in tokens, and one prompt as sent."""
        lengths = [len(ids) for ids in self._token_ids]
        return (
            f"{self._table.key}: {self._table.source}: {len(self)} prompts, {self.dropped} dropped as too long; "
            f"prompt tokens min {min(lengths)}, median {statistics.median(lengths):g}, max {max(lengths)}\n"
            f"first prompt as the engine gets it: {self._tokenizer.decode(self._token_ids[0])!r}"
        )

    def _prompt(self, index: int) -> Prompt:
        epoch, position = divmod(index, len(self))
        kept = self._epoch_order(epoch)[position]
        row = self._rows[kept]
        return Prompt(
            index=index,
            row=row,
            token_ids=self._token_ids[kept],
            text=self._table.prompts[row],
            columns=self._table.columns[row],
        )

    def _epoch_order(self, epoch: int) -> Sequence[int]:
        if not self._data.shuffle:
            return range(len(self))
        if self._order[0] != epoch:
            self._order = (epoch, epoch_permutation(len(self), self._seed, epoch))
        return self._order[1]

    def _where(self, row: int) -> str:
        return f"{self._table.key}: {self._table.source}, row {row}"

    def _tokenise(self) -> list[tuple[int, ...]]:
        templated = [self._uses_template(row) for row in range(len(self._table))]
        token_ids: list[tuple[int, ...]] = [()] * len(templated)
        for kind in (True, False):
            chosen = [row for row, uses in enumerate(templated) if uses is kind]
            if chosen:
                texts = [self._render(row) if kind else str(self._table.prompts[row]) for row in chosen]
                for row, ids in zip(chosen, self._encode(texts, special=not kind), strict=True):
                    token_ids[row] = tuple(ids)
        empty = next((row for row, ids in enumerate(token_ids) if not ids), None)
        if empty is not None:
            raise RecipeError(f"{self._where(empty)} has a prompt without tokens; remove the row")
        return token_ids

    def _uses_template(self, row: int) -> bool:
        messages = not isinstance(self._table.prompts[row], str)
        if messages and self._data.chat_template is False:
            raise RecipeError(f"{self._where(row)} holds messages, which need data.chat_template: null or true")
        return messages or self._data.system_prompt is not None or bool(self._data.chat_template)

    def _render(self, row: int) -> str:
        if not getattr(self._tokenizer, "chat_template", None):
            raise RecipeError(
                f"{self._where(row)} needs a chat template, and the model's tokenizer has none; use prompts that are "
                "strings without data.system_prompt and data.chat_template, or a model with a template"
            )
        prompt = self._table.prompts[row]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if self._data.system_prompt is not None:
            if messages[0]["role"] == "system":
                raise RecipeError(f"{self._where(row)} begins with a system message; remove it or data.system_prompt")
            messages.insert(0, {"role": "system", "content": self._data.system_prompt})
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _encode(self, texts: list[str], special: bool) -> list[list[int]]:
        encoded: list[list[int]] = self._tokenizer(texts, add_special_tokens=special)["input_ids"]
        if not special:
            return encoded
        plain: list[list[int]] = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        for position, (ids, bare) in enumerate(zip(encoded, plain, strict=True)):
            # A text that is written with its BOS token already must not get a second one.
            if bare and bos is not None and bare[0] == bos:
                encoded[position] = ids = bare
            # Responses are sampled after the prompt, so a tokenizer that closes the text would spoil every one.
            if eos is not None and len(ids) > len(bare) and ids[-1] == eos and bare[-1:] != [eos]:
                encoded[position] = ids[:-1]
        return encoded


def epoch_permutation(count: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(count) that depends on the arguments alone.

    Sorted by the draws of `random.Random(str).random()`, which Python promises not to change between versions, unlike
    `shuffle`; so a run resumed under a newer Python goes on in the same order.
    """
    draws = random.Random(f"grpo_ds {seed} {epoch}")
    keys = array("d", (draws.random() for _ in range(count)))
    return sorted(range(count), key=keys.__getitem__)
