"""Masks by hand: the assistant's tokens and its end token, nothing else, whichever way they are found."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from sedsft.data import BadRow, DataRowsError, TokenizerError
from sedsft.data.chat import encode_prompts, load_tokenizer
from sedsft.data.encoding import encode_sft
from sedsft.records import Row
from sedsft.tasks.tiny_model import countdown_tokenizer

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_WITH_BLOCKS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(template: str | None, **special: str) -> PreTrainedTokenizerFast:
    """One token per byte; adds a start token when it is asked for special tokens, as Llama's does."""
    alphabet = ByteLevel.alphabet()
    tokenizer = Tokenizer(BPE({character: index for index, character in enumerate(sorted(alphabet))}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<pad>"])
    tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $0", special_tokens=[("<|im_start|>", 256)])
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<pad>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **names)


def row(*contents: str, line: int = 1, system: str | None = None) -> Row:
    """Turns of user and assistant in turn."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    head = [{"role": "system", "content": system}] if system else []
    return Row((*head, *turns), None, line)


def lines(rows: Sequence[BadRow]) -> tuple[int, ...]:
    return tuple(row.line for row in rows)


@pytest.mark.parametrize("template", [SMOLLM2, CHATML_WITH_BLOCKS], ids=["prefixes", "blocks"])
def test_only_the_assistants_tokens_and_end_tokens_are_trained(template: str) -> None:
    tokenizer = byte_tokenizer(template)
    [example] = encode_sft([row("What is 2+2?", "It is 4 é", "\nand  3+3?", "6")], tokenizer, 400, "error").examples
    trained = [int(i) for i in example.input_ids_T[example.trained_T]]
    assert tokenizer.decode(trained) == "It is 4 é<|im_end|>6<|im_end|>"
    whole = tokenizer.decode(example.input_ids_T.tolist())
    assert whole.endswith("<|im_start|>user\n\nand  3+3?<|im_end|>\n<|im_start|>assistant\n6<|im_end|>")
    assert whole.count("<|im_start|>") == (5 if template is SMOLLM2 else 4)
    assert example.trained_T[-1]


@pytest.mark.parametrize("template", [SMOLLM2, CHATML_WITH_BLOCKS], ids=["prefixes", "blocks"])
def test_a_prompt_is_the_same_tokens_as_the_start_of_its_training_row(template: str) -> None:
    tokenizer = byte_tokenizer(template)
    asked = Row(({"role": "user", "content": "2+2?"},), "4", 3)
    [prompt] = encode_prompts([asked], tokenizer, 200).prompts
    [example] = encode_sft([row("2+2?", "4", system=None)], tokenizer, 200, "error").examples
    first = int(example.trained_T.argmax())
    assert prompt.prompt_ids == tuple(example.input_ids_T[:first])
    assert (prompt.answer, prompt.line) == ("4", 3)
    assert prompt.text.endswith("2+2?<|im_end|>\n<|im_start|>assistant\n")


def test_the_end_token_is_trained_when_it_is_the_pad_token_too() -> None:
    tokenizer = byte_tokenizer(SMOLLM2, pad_token="<|im_end|>")
    [example] = encode_sft([row("q", "a")], tokenizer, 200, "error").examples
    assert int(example.input_ids_T[-1]) == tokenizer.pad_token_id
    assert example.trained_T.tolist()[-2:] == [True, True]
    assert int(example.trained_T.sum()) == 2


def test_countdown_rows() -> None:
    tokenizer = countdown_tokenizer()
    [example] = encode_sft([row("3 7 2>8", "7+3=10,10-2=8")], tokenizer, 64, "error").examples
    assert tokenizer.convert_ids_to_tokens(example.input_ids_T.tolist()) == (
        ["<bos>", "3", "7", "2", ">", "8", ":", "7", "+", "3", "=", "10", ",", "10", "-", "2", "=", "8", "<eos>"]
    )
    assert example.trained_T.tolist() == [False] * 7 + [True] * 12
    [prompt] = encode_prompts([Row(({"role": "user", "content": "3 7 2>8"},), "3 7 2>8", 1)], tokenizer, 7).prompts
    assert prompt.prompt_ids == tuple(example.input_ids_T[:7])
    assert prompt.text == "<bos>3 7 2>8:"


def test_a_template_that_refuses_a_turn_names_the_rows() -> None:
    rows = [row("3 7 2>8", "7+3=10,10-2=8"), row("3 7 2>8", "7+3=10,10-2=8", system="Be brief", line=2)]
    with pytest.raises(DataRowsError, match="line 2: the chat template refuses it: expected user and assistant turns only"):
        encode_sft(rows, countdown_tokenizer(), 64, "error")
    with pytest.raises(DataRowsError, match="expected user and assistant turns only"):
        encode_prompts([Row(rows[1].messages[:2], "3 7 2>8", 2)], countdown_tokenizer(), 64)


def test_rows_that_would_be_cut_are_listed_or_dropped() -> None:
    tokenizer = countdown_tokenizer()
    rows = [row("3 7 2>8", "7+3=10,10-2=8"), row("3 7 2 5>24", "7*3=21,5-2=3,21+3=24", line=2)]
    assert [len(e.input_ids_T) for e in encode_sft(rows, tokenizer, 26, "error").examples] == [19, 26]
    with pytest.raises(DataRowsError, match="\n  line 2: 26 tokens, of which"):
        encode_sft(rows, tokenizer, 25, "error")
    encoded = encode_sft(rows, tokenizer, 25, "drop")
    assert ([e.line for e in encoded.examples], lines(encoded.dropped), lines(encoded.cut)) == ([1], (2,), ())
    with pytest.raises(DataRowsError, match="got 2 bad rows"):
        encode_sft(rows, tokenizer, 10, "drop")


def test_long_rows_are_cut_behind_their_last_trained_token() -> None:
    tokenizer = countdown_tokenizer()
    rows = [row("3 7 2>8", "7+3=10,10-2=8"), row("3 7 2 5>24", "7*3=21,5-2=3,21+3=24", line=2)]
    whole = encode_sft(rows, tokenizer, 26, "cut")
    assert ([len(e.input_ids_T) for e in whole.examples], lines(whole.dropped), lines(whole.cut)) == ([19, 26], (), ())
    encoded = encode_sft(rows, tokenizer, 20, "cut")
    assert ([len(e.input_ids_T) for e in encoded.examples], lines(encoded.dropped), lines(encoded.cut)) == ([19, 20], (), (2,))
    assert encoded.examples[1].input_ids_T.tolist() == whole.examples[1].input_ids_T[:20].tolist()
    assert encoded.examples[1].trained_T.tolist() == whole.examples[1].trained_T[:20].tolist()


def test_a_cut_inside_a_later_question_ends_the_row_with_the_answer_before() -> None:
    tokenizer = byte_tokenizer(CHATML_WITH_BLOCKS)
    talk = row("q", "a", "and then?", "b")
    start = len(encode_sft([row("q", "a")], tokenizer, 200, "error").examples[0].input_ids_T)
    encoded = encode_sft([talk], tokenizer, start + 5, "cut")
    [example] = encoded.examples
    assert (len(example.input_ids_T), lines(encoded.cut)) == (start, (1,))
    assert tokenizer.decode(example.input_ids_T[example.trained_T].tolist()) == "a<|im_end|>"


def test_rows_that_a_cut_leaves_without_trained_token_are_dropped() -> None:
    tokenizer = countdown_tokenizer()
    rows = [row("3 7 2>8", "7+3=10,10-2=8"), row("3 7 2 5>24", "7*3=21,5-2=3,21+3=24", line=2)]
    # The prompts have 7 and 8 tokens.
    encoded = encode_sft(rows, tokenizer, 8, "cut")
    assert ([(e.line, int(e.trained_T.sum())) for e in encoded.examples], lines(encoded.dropped), lines(encoded.cut)) == (
        [(1, 1)],
        (2,),
        (1,),
    )
    with pytest.raises(DataRowsError, match=r"(?s)got 2 bad rows; raise max_length or.* line 1: 19 tokens, no trained token"):
        encode_sft(rows, tokenizer, 7, "cut")


def test_long_prompts_are_dropped_and_told() -> None:
    rows = [Row(({"role": "user", "content": text},), text, i) for i, text in enumerate(["3 7 2>8", "3 7 2 5>24"], start=1)]
    encoded = encode_prompts(rows, countdown_tokenizer(), 7)
    assert ([p.line for p in encoded.prompts], encoded.dropped) == ([1], (2,))
    with pytest.raises(DataRowsError, match="at most 6 tokens"):
        encode_prompts(rows, countdown_tokenizer(), 6)


def test_templates_whose_masks_cannot_be_told_are_refused() -> None:
    only_last = SMOLLM2.replace("message['content'] +", "(message['content'] if loop.last else '-') +")
    with pytest.raises(DataRowsError, match="renders turn 2 differently inside the whole conversation"):
        encode_sft([row("q", "a", "r", "b")], byte_tokenizer(only_last), 200, "error")
    endless = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
    with pytest.raises(DataRowsError, match="writes no end token"):
        encode_sft([row("q", "ab")], byte_tokenizer(endless), 200, "error")
    unmarked = CHATML_WITH_BLOCKS.replace("== 'assistant'", "== 'model'")
    with pytest.raises(DataRowsError, match="turn, got 0 for 1"):
        encode_sft([row("q", "a")], byte_tokenizer(unmarked), 200, "error")


def test_load_tokenizer_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="expected a model folder"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(TokenizerError, match="expected a tokenizer in"):
        load_tokenizer(tmp_path)
    byte_tokenizer(SMOLLM2).save_pretrained(tmp_path / "damaged")
    (tmp_path / "damaged" / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": 3}}')
    with pytest.raises(TokenizerError, match=r"expected a tokenizer in .*damaged"):
        load_tokenizer(tmp_path / "damaged")
    byte_tokenizer(None).save_pretrained(tmp_path / "no-template")
    with pytest.raises(TokenizerError, match="with one chat template"):
        load_tokenizer(tmp_path / "no-template")
    for kind in ("pad", "eos"):
        broken = byte_tokenizer(SMOLLM2)
        setattr(broken, f"{kind}_token", None)
        broken.save_pretrained(tmp_path / kind)
        with pytest.raises(TokenizerError, match=f"with {kind}_token"):
            load_tokenizer(tmp_path / kind)
    byte_tokenizer(SMOLLM2).save_pretrained(tmp_path / "whole")
    assert load_tokenizer(tmp_path / "whole").chat_template == SMOLLM2
