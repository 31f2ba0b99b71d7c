#!/usr/bin/env bash
# Runs a preset for several seeds; submission.json, a table and a report are made from the logs:
#   ./run_3seed.sh [PRESET]             default: best where a GPU is, else cpu_demo
#   ./run_3seed.sh --overwrite [PRESET] runs finished seeds again; without it they are kept
#   SEEDS="42" ./run_3seed.sh           other seeds (default "42 0 1234")
#   RUN_ID=second ./run_3seed.sh        runs beside the first ones, in runs/PRESET/second/
#   CHECKPOINT_EVERY_SECONDS=60 ...     a killed run goes on with the same command
#   ALLOW_NO_FA4=1 ...                  on a GPU, goes on where FlashAttention-4 does not install
# Any setting in the environment holds for all seeds (python train_gpt.py --help lists them).
# Makes .venv and installs requirements.txt if need be, builds the demo data if the preset wants it.
# One folder a seed, runs/PRESET/seedN/, with log.txt, final_model.pt, artifact and packed program;
# runs/PRESET/ gets submission.json and report.html. On a CPU OMP_NUM_THREADS is 1 unless it is set:
# more threads wait for each other, and on a busy machine that costs several times the run.
set -euo pipefail
cd "$(dirname "$0")"
trap 'echo "run_3seed.sh: interrupted; finished seeds are kept, the same command runs the rest" >&2; exit 130' INT

overwrite=0 preset=${PRESET:-}
for word in "$@"; do
  case $word in
    -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "$0"; exit 0 ;;
    --overwrite) overwrite=1 ;;
    -*) echo "error: $word: no such option; ./run_3seed.sh --help lists them" >&2; exit 2 ;;
    *) preset=$word ;;
  esac
done
gpus=0
if command -v nvidia-smi > /dev/null; then gpus=$(nvidia-smi -L 2> /dev/null | grep -c '^GPU' || true); fi
if [ -z "$preset" ]; then preset=$([ "$gpus" -gt 0 ] && echo best || echo cpu_demo); fi
preset=$(basename "$preset" .env)
if [ ! -f "presets/$preset.env" ]; then
  near=$(basename -s .env presets/*.env | python3 -c 'import difflib, sys
near = difflib.get_close_matches(sys.argv[1], sys.stdin.read().split(), 1)
print(f"; did you mean {near[0]}?" if near else "")' "$preset" 2> /dev/null || true)
  echo "error: no preset presets/$preset.env$near; there are: $(basename -s .env presets/*.env | xargs)" >&2
  exit 2
fi

made=""
if [ -z "${VIRTUAL_ENV:-}" ]; then
  [ -x .venv/bin/python ] || python3 -m venv .venv
  PATH="$PWD/.venv/bin:$PATH" made=1
fi
echo "== installing the pinned requirements"
python -m pip install -q --disable-pip-version-check -r requirements.txt -r requirements-report.txt
if [ "$gpus" -gt 0 ]; then
  if ! python -m pip install -q --disable-pip-version-check -r requirements-gpu.txt; then
    if [ "${ALLOW_NO_FA4:-0}" != 1 ]; then
      echo "error: FlashAttention-4 did not install (see above); without it attention is slower." \
        "ALLOW_NO_FA4=1 ./run_3seed.sh goes on with PyTorch's own" >&2
      exit 2
    fi
    echo "FlashAttention-4 did not install; attention falls back to PyTorch's own (ALLOW_NO_FA4=1)"
  fi
elif [ -z "${OMP_NUM_THREADS:-}" ]; then
  export OMP_NUM_THREADS=1
  echo "== OMP_NUM_THREADS=1 (of $(nproc 2> /dev/null || echo several) usable processors); set it for more"
fi

demo=data/demo
if grep -q "^DATA_DIR=$demo" "presets/$preset.env" && ! compgen -G "$demo/datasets/*/manifest.json" > /dev/null; then
  echo "== building the demo data from Python's own documentation"
  python prepare_caseops_data.py --demo "$demo" --train-tokenizer --vocab-size 1024 --val-docs 32 --out "$demo"
fi

processes=1
for n in 2 4 8; do if [ "$gpus" -ge "$n" ]; then processes=$n; fi; done
launch=(python)
if [ "$processes" -gt 1 ]; then launch=(torchrun --standalone "--nproc_per_node=$processes"); fi
top=runs/$preset${RUN_ID:+/$RUN_ID}
logs=()

# seed SEED: one run, unless it is finished
seed() {
  local folder=$top/seed$1 every=${CHECKPOINT_EVERY_SECONDS:-0}
  local log=$folder/log.txt
  mkdir -p "$folder"
  logs+=("$log")
  if [ "$overwrite" = 1 ]; then
    if [ -e "$log" ]; then echo "== $preset, seed $1: runs again (--overwrite), $log is replaced"; fi
    rm -f "$log" "$folder"/checkpoint.pt "$folder"/checkpoint.ttt.*.pt
  elif grep -qs '^{"result": .*"complete": true' "$log"; then
    echo "== $preset, seed $1: finished before, $log is kept (--overwrite or another RUN_ID runs it again)"
    return
  elif [ -e "$folder/checkpoint.pt" ] && [ -e "$log" ]; then
    echo "== $preset, seed $1: unfinished, goes on from $folder/checkpoint.pt"
    if [ "$every" = 0 ]; then every=60; fi   # where it is 0 nothing is resumed
  elif [ -e "$log" ]; then
    echo "== $preset, seed $1: unfinished and without a checkpoint, begins anew"
    rm -f "$log" "$folder"/checkpoint.ttt.*.pt
  fi
  echo "== $preset, seed $1, $processes process(es): $log"
  PRESET=$preset SEED=$1 RUN_ID=log ARTIFACT_DIR=$folder CHECKPOINT_EVERY_SECONDS=$every \
    "${launch[@]}" train_gpt.py
}

for number in ${SEEDS:-42 0 1234}; do seed "$number"; done
# a few seeds fewer, or a preset that ends early, still give a table: findings are listed, not hidden
python submission.py --draft --program train_gpt.py --out "$top/submission.json" \
  --report "$top/report.html" "${logs[@]}"

last=$(dirname "${logs[0]}")
cat << END
== what there is now
report:   $top/report.html
figures:  $top/submission.json
logs:     ${logs[*]}
artifact: $last/final_model.int6.ptz and $last/final_program.py, likewise for the other seeds
== what can be done next${made:+, after  source .venv/bin/activate}
score the artifact again:  TTT_EVAL_ONLY=1 ARTIFACT_DIR=$last python $last/final_program.py
prove the score legal:     python train_gpt.py audit $last
check figures on logs:     python submission.py --audit $top/submission.json ${logs[*]}
END
