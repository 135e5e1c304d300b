import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from chainforge.core.errors import InputError
from chainforge.core.jsonl import example
from chainforge.generate.local import LocalEngine, choose, encode
from chainforge.generate.sampling import open_engine
from chainforge.generate.settings import Draw, SamplingArgs, seed_of


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


def batches_of(model, tokenizer, rows, args, seed=0, samples=None):
    """What the engine hands over, batch by batch; `samples` are the draws to make, or all."""
    args.check()
    chosen = samples or [(row, one) for row in rows for one in range(args.num_samples)]
    draws = [Draw(row, one, seed_of(seed, row["id"], one)) for row, one in chosen]
    batches = []
    LocalEngine(model, tokenizer, args).sample(draws, batches.append)
    return batches


def flat(*given, **more):
    """Everything in the order of the rows: `(row id, sample)` and what was made."""
    order = {row["id"]: number for number, row in enumerate(given[2])}
    made = [drawn for batch in batches_of(*given, **more) for drawn in batch]
    made.sort(key=lambda drawn: (order[drawn[0].row["id"]], drawn[0].sample))
    return [{"id": draw.row["id"], "sample": draw.sample} | answer for draw, answer in made]


def sampling(**settings):
    return SamplingArgs(
        **{"num_samples": 4, "max_new_tokens": 24, "generation_batch_size": 8} | settings
    )


def test_every_draw_is_made_once(model, tokenizer, rows):
    batches = batches_of(model, tokenizer, rows, sampling())
    assert len(batches) >= 3
    assert sum(map(len, batches)) == 24
    made = flat(model, tokenizer, rows, sampling())
    assert [(row["id"], row["sample"]) for row in made] == [
        (row["id"], sample) for row in rows for sample in range(4)
    ]
    for row in made:
        columns = {"id", "sample", "completion", "tokens", "finish_reason"}
        assert set(row) - {"chat_token"} == columns
        # Decoding hides a special token among the others, the column names it.
        assert row.get("chat_token") in (None, "<|endoftext|>", "<|im_start|>")
        assert 1 <= row["tokens"] <= 24
        assert row["finish_reason"] == "stop" or row["tokens"] == 24


def test_the_same_seed_gives_the_same_rows(model, tokenizer, rows):
    def texts(seed):
        return [row["completion"] for row in flat(model, tokenizer, rows, sampling(), seed)]

    torch.manual_seed(1)
    first = texts(0)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert texts(0) == first != texts(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_sample_does_not_depend_on_what_it_is_drawn_beside(model, tokenizer, rows):
    whole = {(row["id"], row["sample"]): row for row in flat(model, tokenizer, rows, sampling())}
    some = [(rows[3], 2), (rows[0], 3), (rows[0], 0), (rows[5], 1), (rows[4], 1)]
    for size in (1, 2, 8):
        args = sampling(generation_batch_size=size)
        for row in flat(model, tokenizer, rows, args, samples=some):
            assert row == whole[row["id"], row["sample"]]


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = torch.tensor([0.5, 0.0, 0.2, 0.3]).log().expand(40_000, 4)
    uniform = torch.rand(40_000, 1, generator=torch.Generator().manual_seed(3))
    counts = choose(logits, uniform, sampling()).bincount(minlength=4)
    assert counts[1] == 0
    assert torch.allclose(counts / 40_000, torch.tensor([0.5, 0.0, 0.2, 0.3]), atol=0.01)
    edges = torch.tensor([[0.0], [1 - 2**-24]])
    assert choose(logits[:2], edges, sampling()).tolist() == [0, 3]


def test_greedy_is_what_the_model_says_alone_and_unpadded(model, tokenizer, rows):
    args = sampling(num_samples=1, temperature=0.0, generation_batch_size=6)
    made = flat(model, tokenizer, rows, args)
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
    plain = flat(model, tokenizer, rows, sampling())
    model.generation_config.update(repetition_penalty=5.0, top_k=1, temperature=0.1, min_p=0.9)
    try:
        assert flat(model, tokenizer, rows, sampling()) == plain
    finally:
        model.generation_config = type(model.generation_config)()


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-6}])
def test_the_narrowest_sampling_is_greedy(model, tokenizer, rows, settings):
    greedy = sampling(num_samples=1, temperature=0.0, generation_batch_size=6)
    narrow = sampling(num_samples=1, generation_batch_size=6, **settings)
    one, other = (
        [row["completion"] for row in flat(model, tokenizer, rows, args)]
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
        self.sizes, self.prefills = [], []

    def forward(self, input_ids, position_ids, past_key_values, **_):
        first = past_key_values.get_seq_length() == 0
        (self.prefills if first else self.sizes).append(len(input_ids))
        if first:
            marks = input_ids[:, self.where, None].expand_as(input_ids).float()
        else:
            marks = past_key_values.layers[0].keys[:, 0, -1:, 0]
        for layer in range(self.config.num_hidden_layers):
            keys, _ = past_key_values.update(*[marks[:, None, :, None]] * 2, layer)
        logits = torch.zeros(len(input_ids), 1, 400)
        for line, (mark, place) in enumerate(
            zip(keys[:, 0, -1, 0].tolist(), position_ids[:, -1].tolist(), strict=True)
        ):
            text = self.texts[int(mark)]
            logits[line, 0, text[min(place - self.length + 1, len(text) - 1)]] = 50.0
        return type("Output", (), {"logits": logits})


@pytest.mark.parametrize("size", [10, 4, 1])
def test_finished_lines_leave_new_ones_come_and_tags_stay(model, tokenizer, size):
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
    args = sampling(num_samples=2, max_new_tokens=100, generation_batch_size=size)
    for row in flat(speller, tokenizer, rows, args):
        index = [one["id"] for one in rows].index(row["id"])
        if index == 3:
            assert (row["finish_reason"], row["tokens"]) == ("length", 100)
            assert texts[3].startswith(row["completion"])
        else:
            tokens = len(written[digits[index]])
            assert (row["finish_reason"], row["tokens"]) == ("stop", tokens)
            assert row["completion"] + end == texts[index]
    assert max(speller.sizes) <= size
    assert speller.sizes[-1] <= 2
    if size == 10:  # one pass over each prompt, and then only fewer lines
        assert speller.prefills == [5]
        assert speller.sizes == sorted(speller.sizes, reverse=True)
        assert speller.sizes[0] == 10
    if size == 4:  # filled up while there is something to fill it with
        assert len(speller.prefills) > 2
        first_long = speller.sizes.index(min(speller.sizes))
        assert min(speller.sizes[:first_long]) >= 2


def test_a_model_may_name_further_ends(model, tokenizer, rows):
    own = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = list(range(model.config.vocab_size))
    try:
        made = flat(model, tokenizer, rows, sampling())
    finally:
        model.generation_config.eos_token_id = own
    assert {(row["completion"], row["finish_reason"], row["tokens"]) for row in made} == {
        ("", "stop", 1)
    }


def test_completions_end_where_the_context_does(model, tokenizer):
    rows = [example([{"role": "user", "content": "a " * 490}], "?", task="t")]
    (length,) = map(len, encode(tokenizer, rows))
    args = sampling(num_samples=8, max_new_tokens=100)
    made = flat(model, tokenizer, rows, args)
    assert 480 < length < 512
    assert max(row["tokens"] for row in made) <= 512 - length


def test_a_prompt_beyond_the_context_is_named(model, tokenizer, rows):
    rows.append(example([{"role": "user", "content": "a " * 900}], "?", task="t"))
    with pytest.raises(InputError, match=f"row {rows[-1]['id']}: its prompt has .* context is 512"):
        flat(model, tokenizer, rows, sampling())


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
        flat(model, tokenizer, rows, sampling(**settings))


def test_without_template_or_rows(model, tokenizer, rows):
    with pytest.raises(InputError, match="no prompts"):
        encode(tokenizer, [])
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(InputError, match="no chat template"):
            flat(model, tokenizer, rows, sampling())
    finally:
        tokenizer.chat_template = template


@pytest.fixture
def vllm(monkeypatch):
    """What of vLLM is used, which itself needs a GPU: it answers every prompt with its seed."""

    class LLM:
        def __init__(self, **options):
            module.options = options

        def generate(self, prompts, parameters, use_tqdm):
            module.asked += zip(prompts, parameters, strict=True)
            outputs = [SimpleNamespace(text=str(p.seed), token_ids=[7, 2], finish_reason="stop")
                       for p in parameters]  # fmt: skip
            return [SimpleNamespace(outputs=[one]) for one in outputs]

    module = ModuleType("vllm")
    module.asked, module.LLM = [], LLM
    module.SamplingParams = lambda **settings: SimpleNamespace(**settings)
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


def test_every_draw_is_made_with_explicit_parameters_and_its_own_seed(vllm, tokenizer):
    args = SamplingArgs(engine="vllm", temperature=0.6, engine_options={"tensor_parallel_size": 2})
    rows = [example([{"role": "user", "content": "1 +"}], "?", task="t"),
            example([{"role": "user", "content": "2 +"}], "?", task="t")]  # fmt: skip
    taken = []
    draws = [Draw(row, n, 10 * n) for n in range(2) for row in rows]
    open_engine(args, "some/model", tokenizer, dtype="bfloat16", directory=Path()).sample(
        draws, taken.extend
    )
    assert [draw for draw, _ in taken] == draws
    assert taken[2][1] == {"completion": "10", "tokens": 2, "finish_reason": "stop"}
    prompt, parameters = vllm.asked[0]
    assert prompt["prompt_token_ids"] == encode(tokenizer, rows)[0]
    assert (parameters.temperature, parameters.top_k, parameters.repetition_penalty) == (0.6, -1, 1)
    assert vllm.options["model"] == "some/model"
    assert vllm.options["generation_config"] == "vllm"
    assert vllm.options["tensor_parallel_size"] == 2


def test_it_stops_where_the_models_own_generation_config_says(
    vllm, tokenizer, tiny_model, tmp_path
):
    """The rest of that file, such as its temperature, is left alone."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 0], "temperature": 0.1}')
    rows = [example([{"role": "user", "content": "1 +"}], "?", task="t")]
    engine = open_engine(SamplingArgs(engine="vllm"), str(model), tokenizer, directory=Path())
    engine.sample([Draw(rows[0], 0, 1)], lambda batch: None)
    _, parameters = vllm.asked[0]
    assert (parameters.stop_token_ids, parameters.temperature) == ([0, 2], 1)


def test_several_processes_are_vllms_own_business(vllm, tokenizer, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="leave `launch` out"):
        open_engine(SamplingArgs(engine="vllm"), "m", tokenizer, directory=Path())


def test_without_the_library_it_says_what_to_do(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match="vLLM is not installed here"):
        open_engine(SamplingArgs(engine="vllm"), "m", tokenizer, directory=Path())
