#!/usr/bin/env bash
# Ask a checkpoint about a picture. MODEL_PATH is a directory in the published layout;
# left empty, the tiny model that ships with this package answers.
MODEL_PATH=""
PROMPT="caption en"
IMAGE_FILE_PATH="paligemma/assets/pictures/scene.png"
MAX_TOKENS_TO_GENERATE=100
TEMPERATURE=0.8
TOP_P=0.9
DO_SAMPLE="False"
ONLY_CPU="False"

cd "$(dirname "$0")" || exit 1
PYTHON=.venv/bin/python
[ -x "$PYTHON" ] || PYTHON=python3

exec "$PYTHON" inference.py \
    ${MODEL_PATH:+--model_path "$MODEL_PATH"} \
    --prompt "$PROMPT" \
    --image_file_path "$IMAGE_FILE_PATH" \
    --max_tokens_to_generate "$MAX_TOKENS_TO_GENERATE" \
    --temperature "$TEMPERATURE" \
    --top_p "$TOP_P" \
    --do_sample "$DO_SAMPLE" \
    --only_cpu "$ONLY_CPU"
