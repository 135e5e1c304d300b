"""What many tests need: a tiny tokenizer and a tiny Qwen2, made here, so that nothing is fetched."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Two test processes with two threads each would wait for one another on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest

hypothesis.settings.register_profile("any machine", deadline=None)  # a busy one fails nothing
hypothesis.settings.load_profile("any machine")


def pytest_addoption(parser):
    parser.addoption(
        "--every-step",
        action="store_true",
        help="Kill runs at every step and in every file (10 minutes), not at a few of them.",
    )


def pytest_collection_modifyitems(items):
    # A file runs in one process: the longest first, or one would work alone for minutes at the end.
    longest = ("test_quickstart.py", "test_two_processes.py")
    items.sort(key=lambda item: item.path.name not in longest)


def pytest_collection_finish():
    # accelerate collects garbage after each training: not through all that is imported by now.
    gc.collect()
    gc.freeze()


TAGS = [f"<{end}{tag}>" for tag in ("reasoning_process", "summary", "think") for end in ("", "/")]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer():
    """Byte-level, single digits, ChatML, the tags as ordinary added tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "State the final answer to the arithmetic problem: 1 + 2 ="
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHATML
    return fast


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


def make_model(path, tokenizer, seed=0, **changes):
    """Save a random 2-layer Qwen2 with its tokenizer; return its path."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        # at 0.02 the logits are near uniform and LoRA learns nothing
        "initializer_range": 0.3,
    } | changes
    config = Qwen2Config(intermediate_size=2 * settings["hidden_size"], **settings)
    Qwen2ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tokenizer):
    """The path of a model whose samples vary enough for RL to have a signal."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny", tokenizer)


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory, tokenizer):
    """As `tiny_model`, but 64 wide: blocks of 4-bit weights are that long, within a row."""
    path = tmp_path_factory.mktemp("models") / "wide"
    return make_model(path, tokenizer, hidden_size=64, initializer_range=0.2)


@pytest.fixture(scope="session")
def padded_models(tmp_path_factory, tokenizer):
    """Paths by role and rows: embeddings padded beyond the 306 tokens, as those of Qwen2.5 are.

    The student's head is tied to its embeddings, the teacher's is not.
    """
    folder, paths = tmp_path_factory.mktemp("padded"), {}
    for seed, role in enumerate(("student", "teacher")):
        for rows in (320, 384):
            shape = {"vocab_size": rows, "tie_word_embeddings": role == "student"}
            path = folder / f"{role}-{rows}"
            paths[role, rows] = make_model(path, tokenizer, seed, **shape)
    return paths


@pytest.fixture(autouse=True)
def _no_rows_held_back():
    """Forget bad rows that an earlier test read outside a stage; the next stage would write them."""
    from chainforge.data import rows

    rows._early.set(())
