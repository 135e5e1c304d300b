import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from chainforge.core.errors import InputError
from chainforge.core.process import stage_directory, working_in
from chainforge.data.sources import example
from chainforge.generate.local import LocalEngine, choose, drawn, encode
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
    made = [one for batch in batches_of(*given, **more) for one in batch]
    made.sort(key=lambda one: (order[one[0].row["id"]], one[0].sample))
    return [{"id": draw.row["id"], "sample": draw.sample} | answer for draw, answer in made]


def sampling(**settings):
    return SamplingArgs(
        **{"num_samples": 4, "max_new_tokens": 24, "generation_batch_size": 8} | settings
    )


def test_every_draw_is_made_once(model, tokenizer, rows):
    args = sampling(max_new_tokens=100)
    assert len(batches_of(model, tokenizer, rows, args)) >= 3
    made = flat(model, tokenizer, rows, args)
    assert [(row["id"], row["sample"]) for row in made] == [
        (row["id"], sample) for row in rows for sample in range(4)
    ]
    # Lines end at different times, and others take their places.
    assert len({row["tokens"] for row in made}) > 3
    for row in made:
        # Decoding hides a special token among the others, the column names it.
        assert row.get("chat_token") in (None, "<|endoftext|>", "<|im_start|>")
        assert 1 <= row["tokens"] <= 100
        assert row["finish_reason"] == "stop" or row["tokens"] == 100


@pytest.mark.parametrize(
    ("ids", "end", "found"),
    [
        ([8, 9, 1, 2], "stop", None),
        ([8, 1, 9, 2], "stop", "<end>"),
        ([8, 9, 1], "length", "<end>"),
        ([2], "stop", None),
    ],
)
def test_special_tokens_that_end_a_turn_together_are_no_chat_tokens(ids, end, found):
    assert drawn({1: "<end>", 2: "<eos>"}, "text", ids, end).get("chat_token") == found


def test_what_takes_the_completions_knows_the_open_stage(model, tokenizer, rows, tmp_path):
    """A judge keeps its verdicts there, so that none is paid twice."""
    args, seen = sampling(num_samples=1), set()
    draws = [Draw(row, 0, 1) for row in rows]
    with working_in(tmp_path):
        LocalEngine(model, tokenizer, args).sample(draws, lambda _: seen.add(stage_directory.get()))
    assert seen == {tmp_path}


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
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}):
        args = sampling(num_samples=1, generation_batch_size=6, **narrow)
        assert flat(model, tokenizer, rows, args) == made
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


def test_a_model_may_name_further_ends(model, tokenizer, rows, monkeypatch):
    ends = list(range(model.config.vocab_size))
    monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
    for row in flat(model, tokenizer, rows, sampling()):
        assert (row["completion"], row["finish_reason"], row["tokens"]) == ("", "stop", 1)


def test_completions_end_where_the_context_does(model, tokenizer):
    rows = [example([{"role": "user", "content": "a " * 490}], "?", task="t")]
    (length,) = map(len, encode(tokenizer, rows))
    made = flat(model, tokenizer, rows, sampling(num_samples=8, max_new_tokens=100))
    assert 480 < length < 512
    assert max(row["tokens"] for row in made) <= 512 - length
    rows.append(example([{"role": "user", "content": "a " * 900}], "?", task="t"))
    with pytest.raises(InputError, match=f"row {rows[-1]['id']}: its prompt has .* context is 512"):
        flat(model, tokenizer, rows, sampling())


def test_a_tokenizer_without_a_template_is_refused(model, tokenizer, rows, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(InputError, match="no chat template"):
        flat(model, tokenizer, rows, sampling())


@pytest.fixture
def vllm(monkeypatch):
    """What of vLLM is used, as its build for the CPU: it answers every prompt with its seed."""

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
    module.platforms = SimpleNamespace(current_platform=SimpleNamespace(is_cpu=lambda: True))
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


def test_vllm_gets_explicit_parameters_a_seed_each_and_the_models_ends(
    vllm, tokenizer, tiny_model, tmp_path, rows
):
    """The rest of the model's generation_config.json, such as its temperature, is left alone."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 0], "temperature": 0.1}')
    args = SamplingArgs(engine="vllm", temperature=0.6, engine_options={"tensor_parallel_size": 2})
    draws, taken = [Draw(row, n, 10 * n) for n in range(2) for row in rows[:2]], []
    engine = open_engine(args, str(model), tokenizer, dtype="bfloat16", directory=Path())
    engine.sample(draws, taken.extend)
    assert [draw for draw, _ in taken] == draws
    assert taken[2][1] == {"completion": "10", "tokens": 2, "finish_reason": "stop"}
    prompt, parameters = vllm.asked[0]
    assert prompt["prompt_token_ids"] == encode(tokenizer, rows)[0]
    assert (parameters.temperature, parameters.top_k, parameters.repetition_penalty) == (0.6, -1, 1)
    assert parameters.stop_token_ids == [0, 2]
    wanted = {"model": str(model), "generation_config": "vllm", "tensor_parallel_size": 2}
    wanted |= {"dtype": "bfloat16", "enable_chunked_prefill": False}  # or seeds fail on the CPU
    assert vllm.options.items() >= wanted.items()
    open_engine(args, str(model), tokenizer, dtype="auto", directory=Path())
    assert vllm.options["dtype"] == "float32"  # as saved


def test_where_vllm_cannot_run_it_says_what_to_do(vllm, tokenizer, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="leave `launch` out"):
        open_engine(SamplingArgs(engine="vllm"), "m", tokenizer, directory=Path())
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match="vLLM is not installed here"):
        open_engine(SamplingArgs(engine="vllm"), "m", tokenizer, directory=Path())
