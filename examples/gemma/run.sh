#!/usr/bin/env bash
# The case study from the model to the endpoint. Finished steps are skipped: after an interruption, run it again.
#
#   DATA=<folder> examples/gemma/run.sh            # hours on two cores; README.md says what DATA holds
#   DATA=<folder> examples/gemma/run.sh --short    # a tenth of the data, one seed: what `make test-real` runs
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
: "${DATA:?set DATA to the folder of the public data, see $here/README.md}"
export RUNS=${RUNS:-runs}
export GEMMA=${GEMMA:-$RUNS/gemma270m} MINILM=${MINILM:-$RUNS/minilm}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY=PASSIVE
bin=${BIN:-.venv/bin}
short=${1:-} audited=60
[ -z "$short" ] || audited=10
mkdir -p "$RUNS"

step() { printf '\n== %s\n' "$*"; }
once() { # once FILE COMMAND...: run it unless FILE is there
    if [ -e "$1" ]; then echo "   $1: there already"; else "${@:2}"; fi
}

step "Models and data"
"$bin/python" "$here/fetch.py" gemma "$GEMMA"
"$bin/python" "$here/fetch.py" minilm "$MINILM"
once "$RUNS/gemma-data/report.csv" "$bin/python" "$here/prepare.py" "$DATA" "$RUNS/gemma-data" ${short:+"$short"}

step "What is trained on"
"$bin/prefvec" data check --config "$here/train.yaml"
"$bin/prefvec" data show "$RUNS/gemma-data/harmless.jsonl" --base "$GEMMA" --chat-template transcript -n 2

step "Fine-tuning, and five DPO runs"
"$bin/prefvec" train --config "$here/train.yaml"
BASE=$("$bin/python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["base"])' "$RUNS/gemma/training.json")
export BASE
if [ -z "$short" ]; then
    step "The helpful vector again, with another seed"
    once "$RUNS/gemma-again/training.json" "$bin/prefvec" train --config "$here/again.yaml"
fi

step "Scorers, and what they are worth"
for preference in helpful harmless; do
    export PREFERENCE=$preference
    once "$RUNS/reward-$preference" "$bin/prefvec" train-scorer --config "$here/reward.yaml"
done
harm=$RUNS/gemma-data/harm.csv
once "$RUNS/harm" "$bin/prefvec" robustness train --data "$harm" --config "$here/harm.yaml" --out "$RUNS/harm"
# An audit that fails ends with exit code 1: that is a result, and stands in the reports.
once "$RUNS/harm/audit.json" "$bin/prefvec" robustness audit "$RUNS/harm" --data "$harm" --config "$here/ladder.yaml" --inputs "$audited" || [ -e "$RUNS/harm/audit.json" ]

step "Every setting on prompts that were never used"
once "$RUNS/gemma-measured/evaluation.json" "$bin/prefvec" eval --config "$here/measure.yaml"
if [ -z "$short" ]; then
    once "$RUNS/gemma-seeds/evaluation.json" "$bin/prefvec" eval --config "$here/seeds.yaml"
fi

step "A search"
once "$RUNS/gemma-search/report.html" "$bin/prefvec" search --config "$here/search.yaml"

step "An endpoint with two dials"
port=${PORT:-8000}
"$bin/prefvec" serve --config "$here/serve.yaml" --port "$port" &
server=$!
trap 'kill "$server" 2> /dev/null || true' EXIT
until curl --silent --fail --output /dev/null "http://127.0.0.1:$port/v1/models"; do
    kill -0 "$server" # it has ended: stop here
    sleep 2
done
"$here/ask.sh" "http://127.0.0.1:$port" > "$RUNS/gemma-answers.jsonl"
kill "$server" && wait "$server"
trap - EXIT
echo "   $RUNS/gemma-answers.jsonl: $(wc -l < "$RUNS/gemma-answers.jsonl") answers"

step "The merged model, and the same as an adapter"
set -- --base "$BASE" --registry "$RUNS/gemma/registry" --set helpful@1=1.0 --set harmless@1=0.5
once "$RUNS/gemma-merged" "$bin/prefvec" export "$@" --out "$RUNS/gemma-merged"
once "$RUNS/gemma-adapter" "$bin/prefvec" export "$@" --adapter --out "$RUNS/gemma-adapter"

step "All figures"
"$bin/python" "$here/tables.py" "$RUNS" > "$RUNS/gemma.md"
echo "   $RUNS/gemma.md, $RUNS/gemma-measured/report.html, $RUNS/gemma-search/report.html"
