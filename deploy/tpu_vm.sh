#!/usr/bin/env bash
# A batch job on a TPU slice without a cluster: every host has a copy of the model and does its share of the parts.
#   tpu_vm.sh create   ask for the slice; it comes when there is one
#   tpu_vm.sh run      install, and answer what is unanswered; again after a preemption
#   tpu_vm.sh delete   give it back
# A model that one host's chips can't hold is divided over all: DIVIDED=all (then all hosts work on the same rows). With
# CACHE=gs://my-bucket/xla compiled programs outlive the machines.
set -euo pipefail
NAME=${NAME:-captions} ZONE=${ZONE:-us-west4-a} TYPE=${TYPE:-v5litepod-16} RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
CHIPS_PER_HOST=${CHIPS_PER_HOST:-4} HOSTS=${HOSTS:-4} DIVIDED=${DIVIDED:-host}
INPUT=${INPUT:-gs://my-bucket/pictures} OUTPUT=${OUTPUT:-gs://my-bucket/captions}
PYTHON=${PYTHON:-python3.11} SOURCE=${SOURCE:-git+https://github.com/aphrodite-jax/aphrodite_jax}
MODEL=${MODEL:-llava-hf/llava-1.5-7b-hf} PROMPT=${PROMPT:-Describe this picture in one sentence.}

case ${1:-} in
create)
    gcloud compute tpus queued-resources create "$NAME" --node-id "$NAME" --zone "$ZONE" \
        --accelerator-type "$TYPE" --runtime-version "$RUNTIME" --spot
    ;;
run)
    chips=$CHIPS_PER_HOST
    [ "$DIVIDED" != all ] || chips=$((CHIPS_PER_HOST * HOSTS))
    printf -v job 'aphrodite-jax batch %q -o %q --model %q --prompt %q' "$INPUT" "$OUTPUT" "$MODEL" "$PROMPT"
    gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker all --command "
        set -e
        [ -d aphrodite ] || $PYTHON -m venv aphrodite
        . aphrodite/bin/activate
        pip install -q 'aphrodite-jax[tpu,batch] @ $SOURCE' gcsfs
        ${CACHE:+export JAX_COMPILATION_CACHE_DIR=$CACHE}
        $job --dtype bfloat16 --max-num-seqs 64 --max-tokens 64 --max-failures 10000 --processes auto \
            --tensor-parallel-size $chips --preprocess-workers 16"
    ;;
delete)
    gcloud compute tpus queued-resources delete "$NAME" --zone "$ZONE" --force --quiet
    ;;
*)
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
