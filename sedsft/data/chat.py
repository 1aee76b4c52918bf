"""Chat templates: conversations to token ids, with a mask of the tokens that the assistant is trained to write.

A mask comes from the template's own `{% generation %}` blocks where it has them, else from rendering the conversation turn by
turn. Templates write their own start-of-text token, so none is added.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from sedsft.data import BadRow, DataRowsError, TokenizerError
from sedsft.data.values import Malformed
from sedsft.records import Example, Prompt, Row

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class EncodedPrompts:
    """Tokenized prompts; `dropped` are the lines of rows whose prompt was too long."""

    prompts: tuple[Prompt, ...]
    dropped: tuple[int, ...]


class Refused(Malformed):
    """The reason why one conversation cannot be encoded."""


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Tokenizer of a local model folder.

    The pad token may be the end token: which tokens carry a loss is told by the mask, never by a token's id.

    Raises:
        TokenizerError: none there, not a fast one, or without chat template, pad token or end token.
    """
    if not Path(path).is_dir():
        raise TokenizerError(f"expected a model folder, got {path}, which is none")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # the parser of a damaged tokenizer.json raises Exception itself
        raise TokenizerError(f"expected a tokenizer in {path}, got: {error}") from error
    if not tokenizer.is_fast:
        raise TokenizerError(
            f"expected a fast tokenizer (tokenizer.json) in {path}, got {type(tokenizer).__name__}; convert it"
        )
    if not isinstance(tokenizer.chat_template, str):
        raise TokenizerError(
            f"expected a tokenizer with one chat template in {path}, got none; start from an instruction-tuned model or put a "
            "chat_template.jinja into the folder"
        )
    for kind in ("pad", "eos"):
        if getattr(tokenizer, f"{kind}_token_id") is None:
            raise TokenizerError(f"expected a tokenizer with {kind}_token in {path}, got none; set it in tokenizer_config.json")
    return tokenizer


class ChatEncoder:
    """Token ids and loss masks of conversations, one at a time; what follows the last trained token is left out.

    Trained are the assistant's turns, each with its end token and not with the line break behind it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._find_turns = _turns_by_blocks if _GENERATION_BLOCK.search(str(tokenizer.chat_template)) else _turns_by_prefixes
        self._end_ids = _end_ids(tokenizer)

    def example(self, row: Row) -> Example:
        """The whole conversation, however long.

        Raises:
            Refused: the template refuses it, or a turn has no token to train.
        """
        text, spans = self._find_turns(row, self._tokenizer)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = encoded["input_ids"]
        trained = [_trained_tokens(ids, encoded["offset_mapping"], span, self._end_ids) for span in spans]
        length = max(end for _, end in trained)
        trained_T = np.zeros(length, dtype=np.bool_)
        for start, end in trained:
            trained_T[start:end] = True
        return Example(np.array(ids[:length], dtype=np.int32), trained_T, row.line, row.file)


def encode_prompts(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int) -> EncodedPrompts:
    """Token ids of conversations up to the point where the assistant begins; `text` is the rendered prompt.

    Raises:
        DataRowsError: rows that the template refuses or that have no gold answer; also when no row is short enough.
    """
    prompts: list[Prompt] = []
    too_long: list[BadRow] = []
    bad: list[BadRow] = []
    for row in rows:
        try:
            text = _render(tokenizer, row.messages, prompt=True)
            if row.answer is None:
                raise Refused("empty_gold", "expected a gold answer, got none")
        except Refused as reason:
            bad.append(BadRow(row.line, str(reason), row.file, kind=reason.kind))
            continue
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) > max_prompt_tokens:
            too_long.append(BadRow(row.line, f"{len(ids)} tokens", row.file, kind="too_long"))
        else:
            prompts.append(Prompt(tuple(ids), text, row.answer, row.line, row.data_source))
    if bad:
        raise DataRowsError("prompts that the chat template can render", bad, "mend or remove these rows")
    if too_long and not prompts:
        raise DataRowsError(f"prompts of at most {max_prompt_tokens} tokens", too_long, "raise the limit of prompt tokens")
    return EncodedPrompts(tuple(prompts), tuple(row.line for row in too_long))


def _turns_by_blocks(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[Span]]:
    """The conversation as text, and the characters that the template's generation blocks wrote."""
    try:
        [text], [spans] = render_jinja_template(
            conversations=[list(row.messages)],
            chat_template=tokenizer.chat_template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except (TemplateError, TypeError) as error:
        raise Refused("template_refused", f"the chat template refuses it: {error}") from error
    turns = sum(turn["role"] == "assistant" for turn in row.messages)
    if len(spans) != turns:
        raise Refused("unclear_turns", f"expected one generation block per assistant turn, got {len(spans)} for {turns}")
    return text, spans


def _turns_by_prefixes(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[Span]]:
    """The conversation as text, and the characters between prompt and end of each assistant turn."""
    text = _render(tokenizer, row.messages, prompt=False)
    spans = []
    for index, turn in enumerate(row.messages):
        if turn["role"] != "assistant":
            continue
        before = _render(tokenizer, row.messages[:index], prompt=True)
        through = _render(tokenizer, row.messages[: index + 1], prompt=False)
        if not (text.startswith(through) and through.startswith(before)):
            raise Refused(
                "unclear_turns",
                f"the chat template renders turn {index + 1} differently inside the whole conversation, so its tokens cannot "
                "be told; use a template with {% generation %} blocks or rows with one assistant turn",
            )
        spans.append((len(before), len(through)))
    return text, spans


def _trained_tokens(ids: Sequence[int], offsets: Sequence[Span], span: Span, end_ids: frozenset[int]) -> Span:
    """The tokens within a turn's characters, from the first to the last end token.

    An end token right behind the characters counts, since some templates close the generation block before it.
    """
    offsets_T2 = np.array(offsets)
    starts_T, ends_T = offsets_T2[:, 0], offsets_T2[:, 1]
    inside = np.flatnonzero((starts_T >= span[0]) & (ends_T <= span[1]) & (ends_T > starts_T))
    if not inside.size:
        raise Refused("no_trained_token", "expected tokens in every assistant turn, got none")
    first, last = int(inside[0]), int(inside[-1])
    if last + 1 < len(ids) and ids[last] not in end_ids and starts_T[last + 1] == span[1] and ids[last + 1] in end_ids:
        last += 1
    for position in range(last, first, -1):
        if ids[position] in end_ids:
            return first, position + 1
    raise Refused(
        "no_end_token",
        "the chat template writes no end token after the assistant's turn, so the model would never learn to stop",
    )


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], prompt: bool) -> str:
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
    except (TemplateError, TypeError) as error:
        raise Refused("template_refused", f"the chat template refuses it: {error}") from error
    return str(text)


def _end_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that can end a turn: the end token, and the special tokens that some models end turns with instead."""
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    others = {tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    return frozenset((special - others) | {tokenizer.eos_token_id})
