#!/usr/bin/env bash
# Runs a command as two "nodes": two network namespaces joined by a veth pair, torchrun's variables set.
# usage: two_nodes.sh COMMAND...   Exit 77: namespaces cannot be made here.
set -u
a=ddpm-a-$$ b=ddpm-b-$$
cleanup() { ip netns del $a 2>/dev/null; ip netns del $b 2>/dev/null; }
trap cleanup EXIT
command -v ip >/dev/null || { echo "no ip command" >&2; exit 77; }
ip netns add $a && ip netns add $b || exit 77
ip link add va$$ netns $a type veth peer name vb$$ netns $b || exit 77
for node in a b; do
  ns=ddpm-$node-$$
  ip -n $ns addr add 10.77.0.$([ $node = a ] && echo 1 || echo 2)/24 dev v$node$$
  ip -n $ns link set v$node$$ up
  ip -n $ns link set lo up
done
export MASTER_ADDR=10.77.0.1 MASTER_PORT=29577 WORLD_SIZE=2 LOCAL_RANK=0 TORCHELASTIC_RUN_ID=two
GLOO_SOCKET_IFNAME=vb$$ RANK=1 GROUP_RANK=1 NODE_RANK=1 ip netns exec $b "$@" &
GLOO_SOCKET_IFNAME=va$$ RANK=0 GROUP_RANK=0 NODE_RANK=0 ip netns exec $a "$@"
first=$?
wait $!
exit $((first | $?))
