#!/usr/bin/env bash
# Two regions on one Linux machine, with a real slow link between them: two network namespaces of two workers each, and
# a virtual cable whose ends send at most $RATE. Trains examples/train_char_lm.py across them with torchrun, as two
# machines would. Needs root, for the namespaces only; they are gone when it ends, and nothing else is touched.
#
#   sudo env PATH="$PATH" examples/regions_on_one_machine.sh               # HALoS
#   sudo env PATH="$PATH" examples/regions_on_one_machine.sh ddp           # DDP, or another strategy of Lightning's
#   sudo env PATH="$PATH" RATE=200mbit examples/regions_on_one_machine.sh halos --max-steps 400 --local-steps 8
set -euo pipefail

strategy=${1:-halos}
options=("${@:2}")
rate=${RATE:-50mbit}     # of the cable, in each direction, as tc understands it
limit=${LIMIT:-600}      # seconds until the run is ended
python=${PYTHON:-python} # one that has lightning-halos
script=$(dirname "$(realpath "$0")")/train_char_lm.py

regions=("us-$$" "eu-$$")
addresses=(10.77.0.1 10.77.0.2)

clean_up() {
  for region in "${regions[@]}"; do
    ip netns pids "$region" 2>/dev/null | xargs --no-run-if-empty kill -KILL || true
    ip netns delete "$region" 2>/dev/null || true
  done
}
trap clean_up EXIT

for region in "${regions[@]}"; do ip netns add "$region"; done
ip link add wan netns "${regions[0]}" type veth peer name wan netns "${regions[1]}"
for index in 0 1; do
  ip -netns "${regions[index]}" address add "${addresses[index]}/24" dev wan
  ip -netns "${regions[index]}" link set lo up
  ip -netns "${regions[index]}" link set wan up
  tc -netns "${regions[index]}" qdisc add dev wan root tbf rate "$rate" burst 64kb latency 100ms
done

for index in 0 1; do
  HALOS_REGION=${regions[index]%-*} OMP_NUM_THREADS=1 \
    ip netns exec "${regions[index]}" timeout "$limit" "$python" -m torch.distributed.run \
    --nnodes 2 --node-rank "$index" --nproc-per-node 2 --master-addr "${addresses[0]}" --master-port 29500 \
    "$script" --strategy "$strategy" --num-nodes 2 --devices 2 --pace 0 --batch-size 16 "${options[@]}" &
done
wait -n # whoever ends first: an error there ends the run
wait -n
