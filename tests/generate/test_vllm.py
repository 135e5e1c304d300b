"""The vLLM engine, against a stand-in for the library: vLLM itself needs a GPU."""

import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from chainforge.core.errors import InputError
from chainforge.core.jsonl import example
from chainforge.generate.local import encode
from chainforge.generate.sampling import open_engine
from chainforge.generate.settings import Draw, SamplingArgs


@pytest.fixture
def vllm(monkeypatch):
    """A module with what of vLLM is used: it answers every prompt with its seed."""

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
