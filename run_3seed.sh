#!/usr/bin/env bash
# Runs a preset for several seeds and writes submission.json from the logs:
#   ./run_3seed.sh [PRESET]             default: best where a GPU is, else cpu_demo
#   SEEDS="42" ./run_3seed.sh           other seeds (default "42 0 1234")
# Makes .venv and installs requirements.txt if need be, builds the demo data if the preset wants it.
# One folder a seed, runs/PRESET/seedN/, with log.txt, final_model.pt, artifact and packed program;
# runs/PRESET/report.html shows them all. CHECKPOINT_EVERY_SECONDS=60 lets a killed run go on.
set -euo pipefail
cd "$(dirname "$0")"

gpus=0
if command -v nvidia-smi > /dev/null; then gpus=$(nvidia-smi -L 2> /dev/null | grep -c '^GPU' || true); fi
preset=${1:-$([ "$gpus" -gt 0 ] && echo best || echo cpu_demo)}
preset=$(basename "$preset" .env)
if [ ! -f "presets/$preset.env" ]; then
  echo "error: no preset presets/$preset.env; there are: $(basename -s .env presets/*.env | xargs)" >&2
  exit 2
fi

if [ -z "${VIRTUAL_ENV:-}" ]; then
  [ -x .venv/bin/python ] || python3 -m venv .venv
  PATH="$PWD/.venv/bin:$PATH"
fi
echo "== installing the pinned requirements"
python -m pip install -q --disable-pip-version-check -r requirements.txt -r requirements-report.txt
if [ "$gpus" -gt 0 ]; then
  python -m pip install -q --disable-pip-version-check -r requirements-gpu.txt ||
    echo "FlashAttention-4 did not install; attention falls back to PyTorch's own"
fi

demo=data/demo
if grep -q "^DATA_DIR=$demo" "presets/$preset.env" && ! compgen -G "$demo/datasets/*/manifest.json" > /dev/null; then
  echo "== building the demo data from Python's own documentation"
  python prepare_caseops_data.py --demo "$demo" --train-tokenizer --vocab-size 1024 --val-docs 32 --out "$demo"
fi

processes=1
for n in 2 4 8; do if [ "$gpus" -ge "$n" ]; then processes=$n; fi; done
logs=()
for seed in ${SEEDS:-42 0 1234}; do
  folder=runs/$preset/seed$seed
  mkdir -p "$folder"
  [ -e "$folder/checkpoint.pt" ] || rm -f "$folder/log.txt"   # a killed run goes on in its log
  echo "== $preset, seed $seed, $processes process(es): $folder/log.txt"
  launch=(python)
  if [ "$processes" -gt 1 ]; then launch=(torchrun --standalone "--nproc_per_node=$processes"); fi
  PRESET=$preset SEED=$seed RUN_ID=log ARTIFACT_DIR=$folder "${launch[@]}" train_gpt.py
  logs+=("$folder/log.txt")
done
# a few seeds fewer, or a preset that ends early, still give a table: findings are listed, not hidden
python submission.py --draft --program train_gpt.py --report "runs/$preset/report.html" "${logs[@]}"
