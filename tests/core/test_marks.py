import pytest

from chainforge.core.transcript import PRESETS, chat_mark, special_ids

MARKS = [
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>", "<|user|>",
    "<|reserved_special_token_12|>", "<|END_OF_TURN_TOKEN|>", "<|turn>", "<turn|>", "<|channel>",
    "<end_of_turn>", "<start_of_turn>", "<｜end▁of▁sentence｜>", "<｜User｜>", "</s>", "<s>", "<bos>",
    "[INST]", "[/INST]", "<<SYS>>", "[gMASK]", "<end_of_utterance>", "<|return|>", "<|message|>",
]  # fmt: skip
TEXTS = [
    "so $|x| < 3$ and 0<|x|<2, |a|>|b|", "a <b> and <i>", "list[int], [INSTALL]", "x < s > t",
    "<ψ|φ>", "if a<b|c>d", "<|>", "f: <x|y>", *(tag for p in PRESETS.values() for tag in p.all),
]  # fmt: skip


@pytest.mark.parametrize("mark", MARKS)
def test_marks_of_chat_templates_are_found(mark):
    assert chat_mark(f"It is 4.{mark}\nuser") == mark


@pytest.mark.parametrize("text", TEXTS)
def test_ordinary_text_has_none(text):
    assert chat_mark(text) is None


def test_a_tokenizers_own_tokens_count(tokenizer):
    assert sorted(special_ids(tokenizer).values()) == ["<|endoftext|>", "<|im_end|>",
                                                       "<|im_start|>"]  # fmt: skip
    assert chat_mark("It is 4. EOT", ["EOT"]) == "EOT"


@pytest.mark.parametrize("piece", ["<|a", "<｜a", "<a", "[/", "<|" + "a" * 50])
def test_long_texts_take_no_quadratic_time(piece):
    assert chat_mark(piece * (1_000_000 // len(piece))) is None
