import pytest
from stages import changed, rows

from chainforge.core.errors import InputError
from chainforge.training.templates import check_lengths, check_template, check_whole, learnt


def test_a_good_template_passes(tokenizer):
    check_template(tokenizer, "r1-cold-start", "tiny")
    check_template(tokenizer, "think", "tiny")


def test_templates_that_break_the_transcript_are_found(tokenizer):
    template = tokenizer.chat_template
    prefills = template.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    eats = template.replace("m['content']", "m['content'].split('</think>')[-1]")
    doubles = template.replace("m['content']", "m['content'] + m['content']")
    dates = template.replace("'<|im_start|>' +", "messages | length ~ '<|im_start|>' +")
    cases = [
        (None, "has no chat template"),
        (prefills, "itself writes <think>"),
        (eats, "keeps <think> 0 times"),
        (doubles, "keeps <think> 2 times"),
        (dates, "renders a prompt otherwise"),
    ]
    for broken, words in cases:
        with pytest.raises(InputError, match=words):
            check_template(changed(tokenizer, chat_template=broken), "think", "tiny")


def test_tags_that_are_special_tokens_are_found(tokenizer):
    broken = changed(tokenizer)
    broken.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    with pytest.raises(InputError, match="the tags are lost in decoding"):
        check_template(broken, "think", "tiny")


def test_rows_that_do_not_fit_are_named(tokenizer):
    check_lengths(rows(2), tokenizer, 200)
    check_lengths(rows(2), tokenizer, None)
    with pytest.raises(
        InputError, match="max_length: 2 of 2 rows have more than 20 tokens .*row 0"
    ):
        check_lengths(rows(2), tokenizer, 20)


@pytest.mark.parametrize("assistant_only", [False, True])
def test_what_carries_loss_is_what_trl_trains_on(tiny_model, tokenizer, tmp_path, assistant_only):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from trl.chat_template_utils import qwen2_5_chat_template

    known = changed(tokenizer, chat_template=qwen2_5_chat_template)  # which TRL has a variant of
    trainer = SFTTrainer(
        tiny_model,
        SFTConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, assistant_only_loss=assistant_only
        ),
        train_dataset=Dataset.from_list(rows(2)),
        processing_class=known,
    )
    for row, prepared in zip(rows(2), trainer.train_dataset, strict=True):
        ids, loss = learnt(known, row, assistant_only=assistant_only)
        assert ids == prepared["input_ids"]
        assert loss == [label != -100 for label in prepared["labels"]]
        assert 0 < sum(loss) < len(loss)


def test_a_long_row_among_short_looking_ones_is_found_by_its_tokens(
    tokenizer, tiny_model, tmp_path
):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    def pair(said):
        ask = [{"role": "user", "content": "?"}]
        return {"prompt": ask, "completion": [{"role": "assistant", "content": said}]}

    tags = pair("</reasoning_process>" * 20)  # 400 characters, 20 tokens
    made = Dataset.from_list([tags] * 70 + [pair("7" * 90)])
    check_lengths(made, tokenizer, 80)
    for longest, fits in ((80, False), (300, True)):
        trainer = SFTTrainer(
            model=tiny_model,
            args=SFTConfig(output_dir=str(tmp_path), max_length=longest, use_cpu=True, bf16=False),
            train_dataset=made,
            processing_class=tokenizer,
        )
        if fits:
            check_whole(trainer, made)
        else:
            with pytest.raises(InputError, match="1 of 71 rows have more than 80 .*row 70"):
                check_whole(trainer, made)
