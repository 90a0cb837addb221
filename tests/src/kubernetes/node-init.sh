#!/bin/bash
# The first process of a node: the test bed starts it in namespaces of its own (network, mount, PID, UTS, IPC, cgroup).
# It lays out the node's file system and runs containerd, kubelet and kube-proxy; when it ends, all of them and every
# container end with it.
#
# NODE: its name. NODE_DIR: its files, which it keeps under /mnt. PROGRAMS: the directory of the Kubernetes programs.
set -euo pipefail
fail() { echo "$*" >&2; exit 1; }

hostname "$NODE"
# Nothing mounted from here on shows outside; within the node it is shared, as the kubelet's volumes need it.
mount --make-rprivate /
mount --make-rshared /
mount --bind "$NODE_DIR" /mnt
cd /mnt

# This network namespace's /sys, this cgroup namespace's /sys/fs/cgroup, and a BPF file system of the node's own.
mapfile -t controllers < <(awk -F: '$2 != "" {print $2}' /proc/self/cgroup)
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /sys/fs/cgroup
for controller in "${controllers[@]}"; do
    mkdir -p "/sys/fs/cgroup/${controller#name=}"
    mount -t cgroup -o "$controller" cgroup "/sys/fs/cgroup/${controller#name=}"
done
mkdir /sys/fs/cgroup/unified
mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified
mount -t bpf bpf /sys/fs/bpf

# The machine's directories stay as they are: what the node makes in them lies above.
for top in etc opt var; do
    mkdir -p "overlay/$top/upper" "overlay/$top/work"
    mount -t overlay overlay -o "lowerdir=/$top,upperdir=/mnt/overlay/$top/upper,workdir=/mnt/overlay/$top/work" "/$top"
done
# Those that DaemonSets find by hostPath, and those that hold overlays themselves.
for dir in /var/lib/kubelet /var/lib/containerd /var/lib/cni /var/log/pods /var/log/containers /etc/cni/net.d /opt/cni/bin; do
    mkdir -p "$dir" "/mnt/root$dir"
    mount --bind "/mnt/root$dir" "$dir"
    mount --make-rshared "$dir"
done
cp -a /usr/lib/cni/. /opt/cni/bin/ # a copy: installers of plugins write there
mount -t tmpfs tmpfs /run
mkdir -p /run/netns /run/containerd /run/lock

# The kubelet sets these for the whole machine: it finds files that hold what it wants, and changes nothing.
mkdir -p sysctls
while read -r path value; do
    echo "$value" >"sysctls/${path//\//.}"
    mount --bind "sysctls/${path//\//.}" "/proc/sys/$path"
done <<'LIST'
vm/overcommit_memory 1
vm/panic_on_oom 0
kernel/panic 10
kernel/panic_on_oops 1
kernel/keys/root_maxkeys 1000000
kernel/keys/root_maxbytes 25000000
LIST
echo 1 >/proc/sys/net/ipv4/ip_forward # this network namespace's

# start NAME COMMAND...: a daemon with its log beside the others.
start() {
    local name=$1
    shift
    "$@" </dev/null >"/mnt/$name.log" 2>&1 &
}
start containerd containerd --config /mnt/containerd.toml
for _ in $(seq 300); do ctr --timeout 1s version >/dev/null 2>&1 && break; sleep 0.1; done
for image in /mnt/images/*.tar; do
    ctr --namespace k8s.io images import "$image" >>/mnt/images.log 2>&1 || fail "$image cannot be imported"
done
# In a cgroup of its own, as service managers start it.
service=/sys/fs/cgroup/unified/system.slice/kubelet.service
mkdir -p "$service"
start kubelet bash -c 'echo $$ >"$0/cgroup.procs"; exec "$@"' "$service" \
    "$PROGRAMS/kubelet" --config /mnt/kubelet.yaml --kubeconfig /mnt/kubelet.kubeconfig --node-ip "$NODE_ADDRESS" --v 2
start kube-proxy "$PROGRAMS/kube-proxy" --config /mnt/kube-proxy.yaml
wait
