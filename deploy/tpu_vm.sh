#!/usr/bin/env bash
# A batch job on a TPU slice without a cluster: every host does its share of the parts, by itself.
#   tpu_vm.sh create   ask for the slice; it comes when there is one
#   tpu_vm.sh run      install, and answer what is unanswered; again after a preemption
#   tpu_vm.sh delete   give it back
# A model that one host's chips can't hold is divided over all: DIVIDED=all (then all hosts work on the same rows).
set -euo pipefail
NAME=${NAME:-captions} ZONE=${ZONE:-us-west4-a} TYPE=${TYPE:-v5litepod-16} RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
CHIPS_PER_HOST=${CHIPS_PER_HOST:-4} HOSTS=${HOSTS:-4} DIVIDED=${DIVIDED:-host}
INPUT=${INPUT:-gs://my-bucket/pictures} OUTPUT=${OUTPUT:-gs://my-bucket/captions}
MODEL=${MODEL:-llava-hf/llava-1.5-7b-hf} PROMPT=${PROMPT:-Describe this picture in one sentence.}

case ${1:-} in
create)
    gcloud compute tpus queued-resources create "$NAME" --node-id "$NAME" --zone "$ZONE" \
        --accelerator-type "$TYPE" --runtime-version "$RUNTIME" --spot
    ;;
run)
    if [ "$DIVIDED" = all ]; then
        share="--processes auto --tensor-parallel-size $((CHIPS_PER_HOST * HOSTS))"
    else
        share="--worker \$WORKER/$HOSTS --tensor-parallel-size $CHIPS_PER_HOST"
    fi
    printf -v job 'aphrodite-jax batch %q -o %q --model %q --prompt %q' "$INPUT" "$OUTPUT" "$MODEL" "$PROMPT"
    gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker all --command "
        set -e
        python3 -m pip install -q 'aphrodite-jax[tpu,batch]' gcsfs
        WORKER=\$(curl -s -H 'Metadata-Flavor: Google' \
            http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number)
        $job --dtype bfloat16 --max-num-seqs 64 --max-tokens 64 --max-failures 10000 $share"
    ;;
delete)
    gcloud compute tpus queued-resources delete "$NAME" --zone "$ZONE" --force --quiet
    ;;
*)
    sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
