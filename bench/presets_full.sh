#!/usr/bin/env bash
# Every preset through the whole pipeline, one GPU a run, side by side; then one table.
#   DATA_PATH=data/shards bench/presets_full.sh
#   DATA_PATH_SP1024=FOLDER TOKENIZER_PATH_SP1024=MODEL ...  plain-text SP1024 shards for #1430's
#                                presets, which are left out without them
#   ONLY="best pr2118"           these presets alone
#   SECONDS_EACH=60              of training; LIMIT_EACH=900: of a whole run, which then counts as failed
#   JOBS=4                       runs at a time; default: one a GPU (1 without GPUs)
#   CUDA_VISIBLE_DEVICES=2,3     these GPUs alone
#   EXTRA="MODEL_DIM=64 ..."     settings of all runs (on a CPU: small ones), after the preset's
# Folders: OUT/PRESET (OUT is runs/presets); a run that ended well is not repeated. A run that fails
# does not stop the others. OUT/table.md is written anew whenever a run ends (presets_table.py).
set -euo pipefail
cd "$(dirname "$0")/.."

gpus=0
if command -v nvidia-smi > /dev/null; then gpus=$(nvidia-smi -L 2> /dev/null | grep -c '^GPU' || true); fi
IFS=, read -ra cards <<< "${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((gpus - 1)))}"
if [ "$gpus" -gt 0 ]; then gpus=${#cards[@]}; fi
jobs=${JOBS:-$((gpus > 0 ? gpus : 1))}
out=${OUT:-runs/presets}
presets=${ONLY:-pr1787 pr1855 pr1934 pr2014 pr2060 pr2118 pr2140 pr1430_causal pr1430_as_run best}
: "${DATA_PATH:?the folder with the shards, whose validation set is scored, is not set}"
sp1024=${DATA_PATH_SP1024:-} sp1024_tokenizer=${TOKENIZER_PATH_SP1024:-}
unset DATA_PATH_SP1024 TOKENIZER_PATH_SP1024  # no settings: the program would refuse them
mkdir -p "$out"

# a line a preset: its name, compressor and whether its data are CaseOps
# shellcheck disable=SC2086  # presets are words
plan=$(env -u DATA_PATH -u PRESET python -c '
import sys, train_gpt as t
try:
    for name in sys.argv[1:]:
        cfg = t.Config.from_env({"PRESET": name}, t.Path())
        print(name, cfg.compressor, int(cfg.caseops_enabled))
except t.UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)' $presets)

# run PRESET COMPRESSOR CASEOPS GPU
run() {
  local preset=$1 folder=$out/$1 code=0 settings=() begun=$SECONDS
  if [ "$(cat "$folder/status" 2> /dev/null)" = 0 ]; then echo "== $preset: is there" >&2; return; fi
  rm -rf "$folder"
  mkdir -p "$folder"
  if [ "$2" = pergroup ] && ! command -v lrzip > /dev/null; then
    echo "== $preset: no lrzip here: COMPRESSOR=brotli, a few more bytes" >&2
    settings+=(COMPRESSOR=brotli)
  fi
  if [ "$3" = 0 ]; then
    settings+=("DATA_PATH=$sp1024")
    if [ -n "$sp1024_tokenizer" ]; then
      settings+=("TOKENIZER_PATH=$sp1024_tokenizer")
    fi
  fi
  if [ "$gpus" -gt 0 ]; then settings+=("CUDA_VISIBLE_DEVICES=${cards[$4]}"); fi
  echo "== $preset begins$([ "$gpus" -gt 0 ] && echo " on GPU ${cards[$4]}")" >&2
  # shellcheck disable=SC2086  # settings are words
  env MAX_WALLCLOCK_SECONDS="${SECONDS_EACH:-60}" TRAIN_LOG_EVERY="${TRAIN_LOG_EVERY:-5}" \
    "${settings[@]}" ${EXTRA:-} PRESET="$preset" RUN_ID=log ARTIFACT_DIR="$folder" \
    timeout "${LIMIT_EACH:-900}" python train_gpt.py > "$folder/out.txt" 2>&1 < /dev/null || code=$?
  echo "$code" > "$folder/status"
  echo "== $preset: exit status $code after $((SECONDS - begun)) s" >&2
}

# A free slot is a line in a pipe; slot s runs on GPU s mod their number.
pipe=$(mktemp -u)
mkfifo "$pipe"
exec 3<> "$pipe"
rm "$pipe"
for ((slot = 0; slot < jobs; slot++)); do echo "$slot" >&3; done
while read -r preset compressor caseops; do
  if [ "$caseops" = 0 ] && [ -z "$sp1024" ]; then
    echo "== $preset: left out, it needs plain-text SP1024 shards: set DATA_PATH_SP1024" >&2
    mkdir -p "$out/$preset"
    echo skipped > "$out/$preset/status"
    continue
  fi
  read -r slot <&3
  {
    run "$preset" "$compressor" "$caseops" $((gpus > 0 ? slot % gpus : 0))
    echo "$slot" >&3
    python bench/presets_table.py "$out" > "$out/.$preset.md" && mv "$out/.$preset.md" "$out/table.md"
  } &
done <<< "$plan"
wait
python bench/presets_table.py "$out" | tee "$out/table.md"
