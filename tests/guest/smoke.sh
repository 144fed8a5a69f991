#!/bin/bash
# Boots the guest in QEMU in a network namespace of its own and tries the contract of README.md.
# Needs: root (or user namespaces with access to /dev/net/tun), qemu-system-x86_64, iproute2. Uses KVM if it can, else emulation.
# Everything runs in an unnamed namespace and below one process group with a time limit, so nothing is left behind.
#   ./smoke.sh                          build and run
#   GUEST=path/to/elf ./smoke.sh        run that one
#   ACCEL=tcg ./smoke.sh                without KVM
set -u
cd "$(dirname "$0")"

if [ "${1:-}" != inner ]; then
    if [ -z "${GUEST:-}" ]; then
        cargo build --release --quiet || exit 1
        GUEST=${CARGO_TARGET_DIR:-target}/release/mashine-guest
    fi
    GUEST=$(realpath "$GUEST") || exit 1
    export GUEST
    user=(); [ "$(id -u)" = 0 ] || user=(--map-root-user)
    exec timeout --kill-after=5 120 unshare "${user[@]}" --net "$0" inner
fi

work=$(mktemp -d) || exit 1
qemu=
cleanup() { [ -n "$qemu" ] && kill "$qemu" 2>/dev/null; rm -rf "$work"; }
trap cleanup EXIT
trap 'exit 130' INT TERM

checks=0
fail() { echo "FAIL: $*"; echo "--- serial"; cat "$work/serial"; exit 1; }
check() { # check WHAT TEXT PATTERN: the extended regular expression must match
    grep -Eq -- "$3" <<<"$2" || fail "$1: got '$2', wanted '$3'"
    checks=$((checks + 1)); echo "ok    $1"
}
field() { grep -Eo "\"$2\":[^,}]*" <<<"$1" | head -1 | cut -d: -f2; }

# ---- the host side of the tap is the guest's gateway, as on a real host
ip link set lo up
ip tuntap add tap0 mode tap vnet_hdr || fail "no tap device"
ip link set tap0 address 02:6d:61:73:68:01 up
ip addr add 198.19.255.254/32 dev tap0
ip addr add fe80::1/64 dev tap0 nodad
ip addr add 2001:db8:6d61:ffff::1/128 dev lo nodad
ip route add 198.19.0.2/32 dev tap0
ip -6 route add 2001:db8:6d61::2/128 dev tap0
address="mashine.ip4=198.19.0.2/16 mashine.gw4=198.19.255.254 mashine.ip6=2001:db8:6d61::2/64 mashine.gw6=fe80::1"
V4=198.19.0.2 V6=2001:db8:6d61::2

if [ -w /dev/kvm ] && [ "${ACCEL:-kvm}" = kvm ]; then
    machine=microvm,acpi=off,x-option-roms=off,pic=off,pit=off,rtc=off,isa-serial=on,auto-kernel-cmdline=on
    accel=(-accel kvm -cpu host,-arch-capabilities)
else
    echo "note: no /dev/kvm (or ACCEL=${ACCEL:-kvm}), emulating"
    machine=microvm,acpi=off,x-option-roms=off,rtc=off,isa-serial=on,auto-kernel-cmdline=on
    accel=(-accel tcg -cpu max)
fi

boot() { # boot VCPUS APPEND [QEMU OPTION...]
    local vcpus=$1 append=$2; shift 2
    : >"$work/serial"
    qemu-system-x86_64 -M "$machine" "${accel[@]}" -global virtio-mmio.force-legacy=false -m 128 -smp "$vcpus" \
        -kernel "$GUEST" -append "$append" -nodefaults -no-user-config -display none \
        -chardev "file,id=s,path=$work/serial" -serial chardev:s -device isa-debug-exit,iobase=0x501,iosize=1 "$@" &
    qemu=$!
}
await() { # await PATTERN: a serial line, at most 20 s. A file gives no event, hence the polling.
    for _ in $(seq 200); do grep -q "$1" "$work/serial" && return; sleep 0.1; done
    fail "no '$1' on the serial line"
}
ended() { wait "$qemu"; local code=$?; qemu=; [ $code = "$1" ] || fail "exit status $code, wanted $1"; }

ask() { # ask ADDRESS COMMAND
    exec 3<>"/dev/tcp/$1/9" || fail "cannot connect to $1"
    printf '%s\n' "$2" >&3
    IFS= read -r -t 30 reply <&3 || fail "no reply to '$2'"
    exec 3>&-
    echo "$reply"
}
echoes() { # echoes ADDRESS: four connections at once, interleaved
    local fds=() fd i
    for i in 1 2 3 4; do exec {fd}<>"/dev/tcp/$1/7" || fail "cannot connect to $1"; fds+=("$fd"); done
    for i in $(seq 25); do
        for fd in "${fds[@]}"; do printf 'line %d on %d\n' "$i" "$fd" >&"$fd"; done
        for fd in "${fds[@]}"; do
            IFS= read -r -t 5 reply <&"$fd" && [ "$reply" = "line $i on $fd" ] || fail "echo from $1: '$reply'"
        done
    done
    for fd in "${fds[@]}"; do exec {fd}>&-; done
    checks=$((checks + 1)); echo "ok    echo $1"
}

# ---- everything, with two vCPUs
truncate -s 8M "$work/disk"
boot 2 "$address mashine.id=m-smoke mashine.vcpus=2 mashine.populate=1" \
    -netdev tap,id=n,ifname=tap0,script=no,downscript=no,vhost=off -device virtio-net-device,netdev=n,mac=02:6d:61:00:00:02 \
    -device virtio-rng-device -drive "file=$work/disk,format=raw,if=none,id=d" -device virtio-blk-device,drive=d
await 'populated pages='
check "first byte" "$(head -c 1 "$work/serial")" '^M$'
check "ready line" "$(cat "$work/serial")" 'mashine-guest: ready ram=[0-9]+ vcpus=2 id=m-smoke ip4=198.19.0.2 ip6=2001:db8:6d61::2$'
echoes $V4
echoes $V6
for a in $V4 $V6; do check "ping $a" "$(ask $a ping)" '^\{"ok":true,"pong":true,"uptime_us":[0-9]+\}$'; done
status=$(ask $V4 status)
check "status" "$status" '"id":"m-smoke".*"vcpus":2.*"clock_backwards":0.*"populated":true.*"rng_ok":true,"blk_ok":true'
check "state" "$(ask $V4 state)" '"checked":[0-9]+,"wrong":0,"first_wrong":null,"vector_errors":0,"clock_backwards":0'
check "bad command" "$(ask $V4 nonsense)" '^\{"ok":false,"error":"unknown command"\}$'
check "long line" "$(ask $V4 "$(printf 'x%.0s' $(seq 300))")" '"error":"line too long"'
pages=$(field "$status" pages)
check "verify" "$(ask $V4 verify)" "\"pages\":$pages,\"unwritten\":0,\"wrong\":0,\"first_wrong\":null,.*\"sum_ok\":true"

for kind in bit stale foreign; do
    case $kind in bit) word=corrupt ;; *) word=$kind ;; esac
    check "corrupt $kind" "$(ask $V4 "corrupt kind=$kind page=77")" '^\{"ok":true'
    check "is seen" "$(ask $V6 verify)" "\"wrong\":1,\"first_wrong\":77,.*\"$word\":1"
    check "heals" "$(ask $V4 populate)" "\"pages\":$pages"
done
check "verify again" "$(ask $V4 verify)" '"wrong":0,.*"sum_ok":true'

check "spin" "$(ask $V4 'mode spin')" '"mode":"spin"'
check "dirty" "$(ask $V4 'dirty rate=20000 entropy=50')" '"rate":20000,"ws":0,"entropy":50'
before=$(ask $V4 status); sleep 1; after=$(ask $V4 status)
written=$(($(field "$after" pages_written) - $(field "$before" pages_written)))
elapsed=$(($(field "$after" uptime_us) - $(field "$before" uptime_us)))
rate=$((written * 1000000 / elapsed))
[ $rate -gt 17000 ] && [ $rate -lt 23000 ] || fail "dirty rate $rate, wanted 20000"
checks=$((checks + 1)); echo "ok    dirty rate $rate"
check "verify while dirtying" "$(ask $V4 verify)" '"wrong":0,.*"sum_ok":true'
check "gap" "$(ask $V4 'gap reset')" '"gap_us_max":[0-9]+,.*"above":\{"100us":[0-9]+'
check "idle" "$(ask $V4 'mode idle')" '"mode":"idle"'
echoes $V4

check "disk fill" "$(ask $V4 'blk fill')" '"blocks":2048,.*"errors":0'
check "disk flush" "$(ask $V4 'blk flush')" '"errors":0'
check "disk verify" "$(ask $V4 'blk verify')" '"blocks":2048,"unwritten":0,"wrong":0,'
dd if="$work/disk" of="$work/disk" bs=4k skip=9 seek=11 count=1 conv=notrunc status=none
check "wrong block is seen" "$(ask $V4 'blk verify')" '"wrong":1,"first_wrong":11'
check "state still" "$(ask $V4 state)" '"wrong":0,"first_wrong":null,"vector_errors":0,"clock_backwards":0'
check "boot id stays" "$(field "$(ask $V4 status)" boot_id)" "^$(field "$status" boot_id)\$"
check "shutdown" "$(ask $V4 shutdown)" '^\{"ok":true\}$'
ended 99
check "off line" "$(tail -1 "$work/serial")" '^mashine-guest: off$'

# ---- a panic
boot 1 "$address" -netdev tap,id=n,ifname=tap0,script=no,downscript=no,vhost=off -device virtio-net-device,netdev=n
await 'ready ram='
check "panic" "$(ask $V6 panic)" '^\{"ok":true\}$'
ended 101
check "panic line" "$(tail -1 "$work/serial")" '^mashine-guest: panic: asked for'

# ---- load from the command line alone, no devices
boot 1 "mashine.populate=1 mashine.dirty=1000 mashine.ws=x mashine.mode=spin"
await 'populated pages='
check "no network" "$(cat "$work/serial")" 'ready .* ip4=- ip6=- no-network'
check "bad word" "$(cat "$work/serial")" '1 words of the command line make no sense'
kill "$qemu"; wait "$qemu" 2>/dev/null; qemu=
echo "all $checks checks passed"
