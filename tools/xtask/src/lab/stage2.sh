#!/bin/sh
# Second program of a lab host, on the machine's own files: what a daemon of ours expects of a host, then a way in.
# Beside what the first stage knows:
#   lab_host, lab_ip4, lab_ip6   who this is
#   lab_fabric4, lab_fabric6     the client's addresses
#   lab_machines4, lab_machines6 networks of machines
#   lab_uplink, lab_mtu          name and packet size of the interface
#   lab_modules                  directory with the `lib/modules` of this kernel
#   lab_dropbear                 the ssh server

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
lab=/run/lab

fail() {
    echo "lab host: FAILED: $*"
    "$lab/busybox" poweroff -f
}

mkdir -p /dev/pts /dev/shm /run/lock "$lab/home/.ssh"
mount -t devpts -o mode=620,ptmxmode=666 devpts /dev/pts || fail "terminals"
mount -t tmpfs -o mode=1777 shm /dev/shm || fail "shared memory"
mount -t cgroup2 cgroup2 /sys/fs/cgroup || fail "control groups"
# So that the kernel finds what it asks for later; a machine without the directory does without.
[ -d /lib/modules ] && mount --bind "$lab_modules" /lib/modules
hostname "$lab_host" 2>/dev/null || "$lab/busybox" hostname "$lab_host"

# Disk of this host: what it keeps needs mmap and O_DIRECT, which 9p does not give.
mkdir -p "$lab_state/$lab_host"
mount -t ext4 -o noatime,discard /dev/vda "$lab_state/$lab_host" || fail "the disk"

ip link set lo up &&
    ip link set eth0 name "$lab_uplink" mtu "$lab_mtu" &&
    ip addr add "$lab_ip4/24" dev "$lab_uplink" &&
    ip addr add "$lab_ip6/64" dev "$lab_uplink" nodad &&
    ip link set "$lab_uplink" up &&
    ip route add "$lab_machines4" dev "$lab_uplink" &&
    ip route add "$lab_machines6" dev "$lab_uplink" &&
    ip route add default via "$lab_fabric4" dev "$lab_uplink" &&
    ip -6 route add default via "$lab_fabric6" dev "$lab_uplink" || fail "the network"

# The way in: root, by the lab's own key only. Nothing of the machine's own ssh set-up is used or seen.
sed "s#^\(root:[^:]*:0:0:[^:]*\):[^:]*:#\1:$lab/home:#" /etc/passwd > "$lab/passwd"
mount --bind "$lab/passwd" /etc/passwd || fail "the home of root"
cp "$lab_state/ssh/client.pub" "$lab/home/.ssh/authorized_keys" && cp "$lab_state/ssh/server" "$lab/server" &&
    chmod -R go= "$lab/home" "$lab/server" || fail "the keys"
ulimit -n 65536
ulimit -l unlimited

while :; do
    "$lab_dropbear" -F -E -s -j -k -p "$lab_ip4:22" -r "$lab/server" -P "$lab/dropbear.pid"
    echo "lab host: the ssh server ended ($?)"
    "$lab/busybox" sleep 1
done &

# A server does not tell that it listens: the kernel does (port 22 in state LISTEN).
until grep -q ':0016 [0-9A-F:]* 0A ' /proc/net/tcp; do
    "$lab/busybox" sleep 0.1
done
echo "lab host: READY"
# As the first process it takes in orphans, and this collects them.
while :; do
    wait
done
