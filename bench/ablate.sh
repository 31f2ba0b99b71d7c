#!/usr/bin/env bash
# One technique at a time against the base: same data, same seeds, same device.
#   bench/ablate.sh [PRESET]                      default: pr1855 where a GPU is, else cpu_demo
#   ONLY="tilt awq_lite" SEEDS="42 0 1234" bench/ablate.sh cpu_demo
#   ITERATIONS=60 bench/ablate.sh cpu_demo        any setting in the environment holds for all runs
#   JOBS=4 bench/ablate.sh      so many runs at a time: seconds say nothing then, and training must
#                               end by ITERATIONS, with MAX_WALLCLOCK_SECONDS=0
#   FUSED=data_fused   adds the same documents prepared with --fuse-markers; pr1855 adds best;
#                      ONLY=none runs the base alone
# Techniques of training are trained; those of quantisation start from the base's weights, those of
# evaluation from its artifact, so that nothing else differs. Folders: OUT/TECHNIQUE/seedN (OUT is
# runs/ablate-PRESET); a run whose score is there is not repeated. The table is ablate_table.py's.
set -euo pipefail
case ${1:-} in
  -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "$0"; exit 0 ;;
  -*) echo "error: $1: no such option; bench/ablate.sh --help says how it is called" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/.."

gpus=0
if command -v nvidia-smi > /dev/null; then gpus=$(nvidia-smi -L 2> /dev/null | grep -c '^GPU' || true); fi
preset=${1:-$([ "$gpus" -gt 0 ] && echo pr1855 || echo cpu_demo)}
out=${OUT:-runs/ablate-$preset}
# what the techniques below are settings of
export QUANTISER=${QUANTISER:-uniform} TTT_STREAM=${TTT_STREAM:-0}
lengths=$(PRESET=$preset python -c '
import os, sys, train_gpt as t
try:
    cfg = t.Config.from_env(os.environ)
    print(cfg.train_seq_len, cfg.ttt_eval_seq_len)
except t.UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)')
read -r length context <<< "$lengths"

techniques="
slope03       train LEAKY_RELU_SLOPE=0.3
gated_xsa     train GATED_XSA=1
asym          train ASYM_LOGIT_RESCALE=1
schedule      train TRAIN_SEQ_SCHEDULE=$((length / 4))@0.1,$((length / 2))@0.7,$length@1.0 SEQ_CHANGE_WARMUP_STEPS=${RISE:-32}
qk525         train QK_GAIN_INIT=5.25
matrix_lr28   train MATRIX_LR=0.028
awq_lite      quant AWQ_LITE_ENABLED=1
lqer_gain     quant LQER_GAIN_SELECT=1
lqer_top1     quant LQER_TOP_K=1
lqer_2_32_4   quant LQER_RANK=2 LQER_ASYM_GROUP=32 LQER_TOP_K=4
damp005       quant GPTQ_DAMP_FACTOR=0.005
no_qv         eval  TTT_MASK=no_qv
local_lr75    eval  TTT_LOCAL_LR_MULT=0.75
context125    eval  TTT_EVAL_SEQ_LEN=$((context * 5 / 4))
context150    eval  TTT_EVAL_SEQ_LEN=$((context * 3 / 2))
short_chunks  eval  TTT_SHORT_SCORE_FIRST_ENABLED=1 TTT_SHORT_SCORE_FIRST_STEPS=256:8,2000:24
one_phase     eval  PHASED_TTT_NUM_PHASES=1
phase_adamw   eval  GLOBAL_TTT_OPTIMIZER=adamw GLOBAL_TTT_LR=0.0001
tilt          eval  NGRAM_TILT_ENABLED=1
mixer         eval  NGRAM_MIXER=exact
slot          eval  SLOT_ENABLED=1
"
if [ -n "${TOKENIZER_PATH:-}" ]; then
  techniques+="tilt_words    eval  NGRAM_TILT_ENABLED=1 WITHIN_BOOST=0.75 WORD_BOOST=0.75 AGREE_ADD_BOOST=0.5
"
fi
if [ "$preset" = pr1855 ]; then
  techniques+="best          train PRESET=best QUANTISER=tcq TTT_STREAM=1 \
SEQ_CHANGE_WARMUP_STEPS=${RISE:-32}
"
fi
if [ -n "${FUSED:-}" ]; then
  techniques+="fused         train DATA_PATH= DATA_DIR=$FUSED TOKENIZER_PATH=
"
fi

for name in ${ONLY:-}; do
  if [ "$name" != none ] && ! grep -q "^$name " <<< "$techniques"; then
    echo "error: ONLY=$name: no such technique for $preset; the list is in $0" >&2; exit 2
  fi
done

processes=1
for n in 2 4 8; do if [ "$gpus" -ge "$n" ]; then processes=$n; fi; done
launch=(python)
if [ "$processes" -gt 1 ]; then launch=(torchrun --standalone "--nproc_per_node=$processes"); fi

# program FOLDER LOG SEED NAME=value ...
program() {
  local folder=$1 log=$2 seed=$3
  shift 3
  mkdir -p "$folder"
  if [ "$log" = log ] && grep -qs '^total_eval_time:' "$folder/log.txt"; then return; fi
  rm -f "$folder/$log.txt"
  env PRESET="$preset" "$@" SEED="$seed" RUN_ID="$log" ARTIFACT_DIR="$folder" \
    "${launch[@]}" train_gpt.py > /dev/null
}

# technique FOLDER BASE SEED KIND NAME=value ...
technique() {
  local folder=$1 base=$2 seed=$3 kind=$4
  shift 4
  mkdir -p "$folder"
  case $kind in
    train) if [ ! -f "$folder/final_model.pt" ]; then
             program "$folder" train "$seed" "$@" PREQUANT_ONLY=1
           fi ;;
    quant) ln -f "$base/final_model.pt" "$folder/" ;;
    eval) ln -f "$base/final_model.int6.ptz" "$folder/" ;;
  esac
  if [ "$kind" = eval ]; then set -- "$@" TTT_EVAL_ONLY=1; else set -- "$@" QUANTIZE_ONLY=1; fi
  program "$folder" log "$seed" "$@"
}

# room: wait until fewer than JOBS runs are under way; done_all: for all, and stop if one failed
runs=()
room() { while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-1}" ]; do sleep 0.2; done; }
done_all() {
  local run failed=0
  for run in "${runs[@]}"; do wait "$run" || failed=1; done
  runs=()
  if [ "$failed" = 1 ]; then echo "error: a run failed, see above; the same command goes on" >&2; exit 1; fi
}

for seed in ${SEEDS:-42 0 1234}; do
  room
  technique "$out/base/seed$seed" - "$seed" train &
  runs+=($!)
done
done_all
for seed in ${SEEDS:-42 0 1234}; do
  while read -r name kind settings; do
    if [ -z "$name" ] || [[ -n "${ONLY:-}" && " $ONLY " != *" $name "* ]]; then continue; fi
    room
    echo "== $name, seed $seed" >&2
    # shellcheck disable=SC2086  # settings are words
    technique "$out/$name/seed$seed" "$out/base/seed$seed" "$seed" "$kind" $settings < /dev/null &
    runs+=($!)
  done <<< "$techniques"
done
done_all
python bench/ablate_table.py "$out"
