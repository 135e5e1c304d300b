import pytest
import torch
from transformers import GenerationConfig

from chainforge.core.errors import InputError
from chainforge.core.records import example
from chainforge.data.sampling import SamplingArgs, encode, generate


@pytest.fixture(scope="module")
def model(tiny_model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model)


@pytest.fixture
def rows():
    return [
        example([{"role": "user", "content": f"What is {10**n} + {n}?"}], "?", task="sums")
        for n in (3, 0, 12, 7, 1, 20)
    ]


def flat(batches):
    return sorted((row for batch in batches for row in batch), key=lambda r: (r["index"], r["sample"]))  # fmt: skip


def sampling(**settings):
    return SamplingArgs(
        **{"num_samples": 4, "max_new_tokens": 24, "generation_batch_size": 8} | settings
    )


def test_every_sample_of_every_prompt_comes_once(model, tokenizer, rows):
    batches = list(generate(model, tokenizer, rows, sampling(), seed=0))
    assert [len(batch) for batch in batches] == [8, 8, 8]
    made = flat(batches)
    assert [(row["index"], row["sample"]) for row in made] == [
        (index, sample) for index in range(6) for sample in range(4)
    ]
    for row in made:
        assert set(row) == {"index", "sample", "completion", "tokens", "finish_reason", "seed"}
        assert 1 <= row["tokens"] <= 24
        assert row["finish_reason"] == "stop" or row["tokens"] == 24
    lengths = [len(prompt) for prompt in encode(tokenizer, rows)]
    order = [lengths[row["index"]] for batch in batches for row in batch]
    assert order == sorted(order)


def test_the_same_seed_gives_the_same_rows(model, tokenizer, rows):
    def texts(seed):
        return [
            row["completion"] for row in flat(generate(model, tokenizer, rows, sampling(), seed))
        ]

    torch.manual_seed(1)
    first = texts(0)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert texts(0) == first != texts(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_cut_run_goes_on_with_the_same_rows(model, tokenizer, rows):
    whole = list(generate(model, tokenizer, rows, sampling(), seed=5))
    there = {(rows[row["index"]]["id"], row["sample"]) for row in [*whole[0], *whole[1][:3]]}
    rest = list(generate(model, tokenizer, rows, sampling(), seed=5, done=there))
    assert rest == [whole[1][3:], whole[2]]
    everything = {(row["id"], sample) for row in rows for sample in range(4)}
    assert list(generate(model, tokenizer, rows, sampling(), seed=5, done=everything)) == []


def test_greedy_is_what_the_model_says_alone_and_unpadded(model, tokenizer, rows):
    args = sampling(num_samples=1, temperature=0.0, generation_batch_size=6)
    made = flat(generate(model, tokenizer, rows, args, seed=0))
    for row, prompt in zip(made, encode(tokenizer, rows), strict=True):
        with torch.inference_mode():
            ids = torch.tensor([prompt])
            for _ in range(row["tokens"]):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        alone = ids[0, len(prompt) :].tolist()
        ended = alone[-1] == tokenizer.eos_token_id
        assert ended == (row["finish_reason"] == "stop")
        assert tokenizer.decode(alone[:-1] if ended else alone) == row["completion"]


def test_nothing_is_inherited_from_the_models_own_configuration(model, tokenizer, rows):
    plain = flat(generate(model, tokenizer, rows, sampling(), seed=0))
    model.generation_config.update(repetition_penalty=5.0, top_k=1, temperature=0.1, min_p=0.9)
    try:
        assert flat(generate(model, tokenizer, rows, sampling(), seed=0)) == plain
    finally:
        model.generation_config = type(model.generation_config)()


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-6}])
def test_the_narrowest_sampling_is_greedy(model, tokenizer, rows, settings):
    greedy = sampling(num_samples=1, temperature=0.0, generation_batch_size=6)
    narrow = sampling(num_samples=1, generation_batch_size=6, **settings)
    one, other = (
        [row["completion"] for row in flat(generate(model, tokenizer, rows, args, seed=0))]
        for args in (greedy, narrow)
    )
    assert one == other


class Speller(torch.nn.Module):
    """A model that writes the text of a prompt's number, which it can know from its cache alone."""

    def __init__(self, config, prompt, texts):
        super().__init__()
        self.config, self.device = config, torch.device("cpu")
        self.generation_config = GenerationConfig()
        self.texts, self.length = texts, len(prompt)
        self.where = next(n for n, token in enumerate(prompt) if token in texts) - len(prompt)
        self.sizes = []

    def forward(self, input_ids, position_ids, past_key_values, **_):
        self.sizes.append(len(input_ids))
        first = past_key_values.get_seq_length() == 0
        marks = input_ids[:, self.where if first else -1].float()[:, None, None, None]
        keys, _ = past_key_values.update(marks, marks, 0)
        logits = torch.zeros(len(input_ids), 1, 400)
        for line, (mark, place) in enumerate(
            zip(keys[:, 0, 0, 0].tolist(), position_ids[:, -1].tolist(), strict=True)
        ):
            text = self.texts[int(mark)]
            logits[line, 0, text[min(place - self.length + 1, len(text) - 1)]] = 50.0
        return type("Output", (), {"logits": logits})


def test_finished_lines_leave_the_batch_and_tags_stay(model, tokenizer):
    end = tokenizer.eos_token
    texts = [
        "<reasoning_process>a</reasoning_process>\n<summary>1</summary>" + end,
        "b" + end,
        "<think>\nlonger than that\n</think>\n\n3, and then some more text to the end" + end,
        "no end at all, " * 9,
        end,
    ]
    rows = [example([{"role": "user", "content": f"Text {n}"}], "?", task="t") for n in range(5)]
    digits = tokenizer.convert_tokens_to_ids([str(n) for n in range(5)])
    written = dict(zip(digits, tokenizer(texts)["input_ids"], strict=True))
    speller = Speller(model.config, encode(tokenizer, rows)[0], written)
    args = sampling(num_samples=2, max_new_tokens=100, generation_batch_size=10)
    made = flat(generate(speller, tokenizer, rows, args, seed=0))
    for row in made:
        if row["index"] == 3:
            assert (row["finish_reason"], row["tokens"]) == ("length", 100)
            assert texts[3].startswith(row["completion"])
        else:
            tokens = len(written[digits[row["index"]]])
            assert (row["finish_reason"], row["tokens"]) == ("stop", tokens)
            assert row["completion"] + end == texts[row["index"]]
    assert speller.sizes[0] == 10
    assert speller.sizes[-1] == 2
    assert speller.sizes == sorted(speller.sizes, reverse=True)


def test_a_model_may_name_further_ends(model, tokenizer, rows):
    own = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = list(range(model.config.vocab_size))
    try:
        made = flat(generate(model, tokenizer, rows, sampling(), seed=0))
    finally:
        model.generation_config.eos_token_id = own
    assert {(row["completion"], row["finish_reason"], row["tokens"]) for row in made} == {
        ("", "stop", 1)
    }


def test_training_mode_is_kept(model, tokenizer, rows):
    model.train()
    list(generate(model, tokenizer, rows[:1], sampling(), seed=0))
    assert model.training
    model.eval()


def test_completions_end_where_the_context_does(model, tokenizer):
    rows = [example([{"role": "user", "content": "a " * 490}], "?", task="t")]
    (length,) = map(len, encode(tokenizer, rows))
    args = sampling(num_samples=8, max_new_tokens=100)
    made = flat(generate(model, tokenizer, rows, args, seed=0))
    assert 480 < length < 512
    assert max(row["tokens"] for row in made) <= 512 - length


def test_a_prompt_beyond_the_context_is_named(model, tokenizer, rows):
    rows.append(example([{"role": "user", "content": "a " * 900}], "?", task="t"))
    with pytest.raises(InputError, match=f"row {rows[-1]['id']}: its prompt has .* context is 512"):
        next(generate(model, tokenizer, rows, sampling(), seed=0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "num_samples: expected 1"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected 1"),
        ({"generation_batch_size": 0}, "generation_batch_size: expected 1"),
        ({"temperature": -1.0}, "temperature: expected 0"),
        ({"temperature": 0.0}, "same completion 4 times"),
        ({"top_p": 0.0}, "top_p: expected above 0"),
        ({"top_p": 1.5}, "top_p: expected above 0"),
        ({"top_k": -1}, "top_k: expected 0"),
    ],
)
def test_bad_settings(model, tokenizer, rows, settings, message):
    with pytest.raises(InputError, match=message):
        next(generate(model, tokenizer, rows, sampling(**settings), seed=0))


def test_without_template_or_rows(model, tokenizer, rows):
    with pytest.raises(InputError, match="no prompts"):
        next(generate(model, tokenizer, [], sampling(), seed=0))
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(InputError, match="no chat template"):
            next(generate(model, tokenizer, rows, sampling(), seed=0))
    finally:
        tokenizer.chat_template = template
