#!/bin/busybox sh
# First program of a lab host: from nothing to the machine's own files as root, read-only over 9p, then the second stage.
# Its settings come as words on the kernel's command line, which the kernel hands to it as variables:
#   lab_state     the lab's directory, the same path inside and outside; writable
#   lab_programs  directory of our programs; shown even where a tmpfs would hide it
# Whatever fails ends the host with a line that says so: `lab up` sees its QEMU end.

/bin/busybox mkdir -p /proc /sys /dev /root /origin
/bin/busybox --install -s /bin
export PATH=/bin

fail() {
    echo "lab host: FAILED: $*"
    poweroff -f
}

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
exec < /dev/console > /dev/console 2>&1

while read -r module options; do
    # shellcheck disable=SC2086 # options are words
    insmod "/modules/$module" $options || fail "module $module"
done < /modules/order

# What is written outside must be seen here: nothing is cached beyond what is open.
share="trans=virtio,version=9p2000.L,msize=512000,access=client,cache=none"
mount -t 9p -o "ro,$share" hostroot /root || fail "the machine's root"
mount --bind /root /origin || fail "a second view of the root"
for place in run tmp var/tmp; do
    mount -t tmpfs -o mode=1777 "$place" "/root/$place" || fail "tmpfs on $place"
done
chmod 755 /root/run
if [ ! -d "/root$lab_programs" ]; then
    mkdir -p "/root$lab_programs"
    mount --bind "/origin$lab_programs" "/root$lab_programs" || fail "the programs"
fi
mkdir -p "/root$lab_state"
mount -t 9p -o "rw,$share" labstate "/root$lab_state" || fail "the lab's directory"
mkdir -p /root/run/lab
cp /bin/busybox /stage2.sh /root/run/lab/ || fail "the second stage"
for place in proc sys dev; do
    mount --move "/$place" "/root/$place" || fail "moving $place"
done
exec switch_root /root /bin/sh /run/lab/stage2.sh
