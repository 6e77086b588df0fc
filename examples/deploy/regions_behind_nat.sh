#!/usr/bin/env bash
# A star of jobs on one Linux machine, in a network as strict as real ones: a global server of which one port is open,
# and two regions of two workers each, behind a NAT each. Both regions have the same private address, so nobody can
# reach them, and they cannot reach each other. Their links send at most $RATE. Trains examples/train_char_lm.py.
#
#   sudo env PATH="$PATH" examples/deploy/regions_behind_nat.sh
#   sudo env PATH="$PATH" RATE=200mbit examples/deploy/regions_behind_nat.sh --max-steps 400 --local-steps 8
#
# Needs root, `ip`, `tc` and `iptables`, for network namespaces only; they are gone when it ends, and nothing else is
# touched. Keys, logs and the run are in $OUTPUT.
set -euo pipefail

rate=${RATE:-50mbit}      # of each region, in each direction, as tc understands it
limit=${LIMIT:-600}       # seconds until the run is ended
python=${PYTHON:-python}  # one that has lightning-halos
output=${OUTPUT:-$(mktemp --directory)}
script=$(dirname "$(dirname "$(realpath "$0")")")/train_char_lm.py
names=(us eu)
server=server-$$
halos() { "$python" -m lightning_halos.cli "$@"; }

clean_up() {
  for place in "$server" "us-$$" "eu-$$" "nat-us-$$" "nat-eu-$$"; do
    ip netns pids "$place" 2>/dev/null | xargs --no-run-if-empty kill -KILL || true
    ip netns delete "$place" 2>/dev/null || true
  done
}
trap clean_up EXIT

# The internet is a bridge in the server's namespace, with addresses that are reserved for documentation.
ip netns add "$server"
ip -netns "$server" link set lo up
ip -netns "$server" link add internet type bridge
ip -netns "$server" address add 203.0.113.1/24 dev internet
ip -netns "$server" link set internet up
ip netns exec "$server" iptables --policy INPUT DROP
ip netns exec "$server" iptables --append INPUT --in-interface lo --jump ACCEPT
ip netns exec "$server" iptables --append INPUT --protocol tcp --dport 29600 --jump ACCEPT

for index in 0 1; do
  region=${names[index]}-$$ nat=nat-${names[index]}-$$
  ip netns add "$region"
  ip netns add "$nat"
  ip link add inside netns "$nat" type veth peer name eth0 netns "$region"
  ip link add outside netns "$nat" type veth peer name "to-${names[index]}" netns "$server"
  ip -netns "$server" link set "to-${names[index]}" master internet up
  ip -netns "$nat" address add 192.168.0.1/24 dev inside
  ip -netns "$nat" address add "203.0.113.$((index + 2))/24" dev outside
  ip -netns "$region" address add 192.168.0.2/24 dev eth0
  for device in lo inside outside; do ip -netns "$nat" link set "$device" up; done
  for device in lo eth0; do ip -netns "$region" link set "$device" up; done
  ip -netns "$region" route add default via 192.168.0.1
  ip netns exec "$nat" sh -c 'echo 1 > /proc/sys/net/ipv4/ip_forward'
  ip netns exec "$nat" iptables --table nat --append POSTROUTING --out-interface outside --jump MASQUERADE
  ip netns exec "$nat" iptables --policy INPUT DROP
  ip netns exec "$nat" iptables --policy FORWARD DROP
  ip netns exec "$nat" iptables --append FORWARD --in-interface inside --jump ACCEPT
  ip netns exec "$nat" iptables --append FORWARD --match conntrack --ctstate ESTABLISHED --jump ACCEPT
  tc -netns "$nat" qdisc add dev outside root tbf rate "$rate" burst 64kb latency 100ms
  tc -netns "$nat" qdisc add dev inside root tbf rate "$rate" burst 64kb latency 100ms
done

mkdir --parents "$output"
halos keys init "$output/keys" --host 203.0.113.1
for name in "${names[@]}"; do halos keys region "$output/keys" "$name"; done

export OMP_NUM_THREADS=1
processes=()
ip netns exec "$server" timeout "$limit" "$python" -m lightning_halos.cli serve --listen 0.0.0.0:29600 \
  --keys "$output/keys/server.pem" --directory "$output/run" --min-regions 2 &
processes+=($!)
for name in "${names[@]}"; do
  HALOS_SERVER=203.0.113.1:29600 HALOS_KEYS=$output/keys/$name.pem \
    ip netns exec "$name-$$" timeout "$limit" "$python" "$script" \
    --strategy halos --devices 2 --pace 0 --batch-size 16 --output "$output/$name" "$@" &
  processes+=($!)
done
for process in "${processes[@]}"; do wait "$process"; done # with the exit code of each
