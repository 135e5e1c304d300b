import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from chainforge.core.errors import InputError
from chainforge.train.layout import Layout
from chainforge.train.matrix import (
    LAYOUTS,
    MATRIX,
    METHODS,
    cell_of,
    check_supported,
    method_of,
    refusals,
    table,
)
from chainforge.train.settings import settings_of

README = Path(__file__).parents[2] / "docs/distributed.md"
LORA = {"use_peft": True}
QLORA = LORA | {"load_in_4bit": True, "dtype": "bfloat16"}
VLLM = {"use_vllm": True}


def refused(settings, kind, recipe="grpo", **layout):
    return list(refusals(settings_of(recipe, settings), Layout(kind, 8, **layout)))


def test_the_table_is_whole():
    assert set(MATRIX) == {(method, layout) for method in METHODS for layout in LAYOUTS}
    for cells in MATRIX.values():
        for cell in cells:
            assert cell.note or cell.state != "refused"


def test_the_readme_has_the_table():
    found = re.search(r"<!-- matrix -->\n(.*?)\n<!-- /matrix -->", README.read_text(), re.DOTALL)
    assert found
    assert found[1].strip() == table().strip()


@pytest.mark.parametrize(
    ("settings", "method"), [({}, "full"), (LORA, "LoRA"), (QLORA, "QLoRA")], ids=str
)
def test_a_recipe_finds_its_cell(settings, method):
    found = settings_of("sft", settings)
    assert method_of(found) == method
    assert cell_of(found, Layout("ddp", 2)) == MATRIX[method, "ddp"][0]
    with_vllm = settings_of("grpo", settings | VLLM)
    assert cell_of(with_vllm, Layout("ddp", 2)) == MATRIX[method, "ddp"][1]
    assert cell_of(found, Layout("fsdp1", 2)) is None


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        (QLORA, "fsdp2", "FSDP 2 cannot shard 4-bit weights"),
        (QLORA | VLLM, "single", "does not merge into the 4-bit"),
        (QLORA, "zero3", "`bnb_4bit_quant_storage: bfloat16`"),
        ({"load_in_4bit": True}, "single", "quantised weights cannot be trained"),
        (LORA | {"load_in_4bit": True, "load_in_8bit": True}, "single", "not both"),
        (LORA | {"load_in_8bit": True}, "zero3", "ZeRO-3 cannot shard bytes"),
        (VLLM | {"use_cpu": True}, "single", "feeds vLLM on GPUs only"),
        ({"use_cpu": True}, "fsdp2", "runs as plain DDP on the CPU"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(settings, kind, words):
    assert any(words in reason for reason in refused(settings, kind))


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, "zero3"),
        (LORA, "fsdp2"),
        (LORA | VLLM, "ddp"),
        (QLORA, "ddp"),
        (QLORA | {"bnb_4bit_quant_storage": "bfloat16"}, "zero3"),
        (QLORA, "fsdp1"),  # not in the table: nothing is known against it
    ],
)
def test_what_may_work_is_let_through(settings, kind):
    assert refused(settings, kind) == []


def test_a_layout_that_leaves_no_model_is_refused():
    assert any("16bit_model" in reason for reason in refused({}, "zero3", whole_model=False))


def configs(**settings):
    world = settings.pop("world_size", 2)
    return SimpleNamespace(**settings_of("sft", settings), world_size=world)


def test_a_recipe_is_refused_where_it_was_launched():
    ddp = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    fsdp = ddp | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    check_supported("sft", configs(use_peft=True), environment=fsdp)
    with pytest.raises(InputError, match="cannot shard 4-bit"):
        check_supported("sft", configs(**QLORA), environment=fsdp)
    check_supported("sft", configs(world_size=2), environment=ddp)
    with pytest.raises(InputError, match="2 processes were launched, but each would train alone"):
        check_supported("sft", configs(world_size=1), environment=ddp)
