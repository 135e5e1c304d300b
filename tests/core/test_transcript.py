import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainforge.core.errors import InputError
from chainforge.core.transcript import (
    PRESETS,
    Transcript,
    chat_mark,
    is_blank,
    read,
    special_ids,
    tags_of,
    write,
)

R1 = "<reasoning_process>{}</reasoning_process>\n<summary>{}</summary>"
part = st.text(min_size=1).map(str.strip).filter(lambda text: not is_blank(text))


@pytest.mark.parametrize("preset", PRESETS)
@given(reasoning=part, answer=part)
def test_write_and_read_are_inverses(preset, reasoning, answer):
    if any(tag in reasoning or tag in answer for tag in tags_of(preset).all):
        with pytest.raises(InputError):
            write(reasoning, answer, preset)
    else:
        assert read(write(reasoning, answer, preset), preset) == Transcript(reasoning, answer)


_R, _S = "<reasoning_process>r", "</reasoning_process>"
NO_TRANSCRIPTS = [
    "", "2", R1.format("", "2"), R1.format("r", " "), "so: " + R1.format("r", "2"),
    R1.format("r", "2") + " done", R1.format("r", "2") * 2, R1.format("r <summary>", "2"),
    _R + _S, f"{_R}{_S}\n<summary>2", f"<summary>2</summary>\n{_R}{_S}",
    f"{_R}\n<summary>2</summary>{_S}", f"{_R}{_S} and <summary>2</summary>",
]  # fmt: skip
NO_THOUGHTS = ["<think></think>4", "<think>r</think>", "4", "<think>r</think>4</think>"]


@pytest.mark.parametrize("text", NO_TRANSCRIPTS + NO_THOUGHTS)
def test_strict_reading_refuses(text):
    assert read(text, "think" if text in NO_THOUGHTS else "r1-cold-start") is None


INVISIBLE = "\u200b\u00ad\u202e\u00a0\u3000\u2028\x00\u034f\u115f\u3164\u2800\ufe0f\U000e0020"


@pytest.mark.parametrize("text", INVISIBLE, ids=ascii)
@pytest.mark.parametrize("preset", PRESETS)
def test_what_nobody_sees_is_empty(text, preset):
    template = tags_of(preset).template
    assert read(template.format(reasoning=text, answer="2"), preset) is None
    assert read(template.format(reasoning="1 + 1", answer=text), preset) is None
    for parts in ((text, "2"), ("1 + 1", text)):
        with pytest.raises(InputError, match="is empty"):
            write(*parts, preset)
    seen = template.format(reasoning=f"{text}1", answer=f"2{text}")
    assert read(seen, preset) == Transcript(f"{text}1".strip(), f"2{text}".strip())


def test_an_unknown_preset_names_those_there_are():
    with pytest.raises(InputError, match="r1-cold-start, think"):
        write("r", "a", "xml")


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
