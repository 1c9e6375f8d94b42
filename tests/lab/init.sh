#!/bin/busybox sh
# PID 1 of a lab guest: gets it ready, runs /lab/command, hands back what came of it, switches off.
#
# Three virtio ports lead out: 1 the command's stdout, 2 its stderr, 3 the result. The result is "begin",
# "status N", a cpio archive of the files that the command wrote, "end". The console stays the kernel's.
export PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin
result=/dev/vport0p3

/bin/busybox mount -t proc proc /proc
/bin/busybox --install -s /bin
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/shm /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
mount -t devpts devpts /dev/pts
ln -s /proc/self/fd /dev/fd
ln -s /proc/self/fd/0 /dev/stdin
ln -s /proc/self/fd/1 /dev/stdout
ln -s /proc/self/fd/2 /dev/stderr
ip link set lo up

for module in /lab/modules/*.ko; do
    [ -f "$module" ] && { insmod "$module" || echo "lab: $module does not load"; }
done

# The host announces its ports one by one after the driver is there, and a port opens after its file comes.
patience=400
for port in /dev/vport0p1 /dev/vport0p2 $result; do
    until [ -c $port ] && (: > $port) 2> /dev/null; do
        patience=$((patience - 1))
        [ $patience -gt 0 ] || { echo "lab: $port does not open"; poweroff -f; }
        sleep 0.02
    done
done
exec 3> $result
echo begin >&3

# Plain pipes for the command: a port can be opened only once, and /dev/stdout has to work as usual.
mkfifo /run/out /run/err
cat /run/out > /dev/vport0p1 &
out=$!
cat /run/err > /dev/vport0p2 &
err=$!

# Everything that the lab brought is dated 1970-01-01 00:00:00.
touch -d @1 /run/lab-brought
cd /lab/project || poweroff -f
sh /lab/command < /dev/null > /run/out 2> /run/err 3>&-
status=$?

# What the command left running would hold its pipes open for ever.
for process in /proc/[0-9]*; do
    process=${process#/proc/}
    case $process in
        1 | "$out" | "$err") ;;
        *) kill -9 "$process" 2> /dev/null ;;
    esac
done
wait "$out" "$err"

echo "status $status" >&3
find . \( -name __pycache__ -o -name .pytest_cache -o -name .hypothesis \) -prune \
    -o -type f -newer /run/lab-brought -print0 | cpio -0 -o -H newc >&3
echo end >&3
# A write to a port returns when it is queued, and switching off drops the queue: where the host is too busy to read,
# that would be the end of the result. The queue has 128 places and is served in order; so when 256 more writes have
# found a place, everything before them has gone out.
left=256
while [ $left -gt 0 ]; do
    echo >&3
    left=$((left - 1))
done
exec 3>&-
poweroff -f
