# The first process of a node that is made of this machine's files: its mounts are its own, and what
# it writes is in the directory $1. The programs of a containerd are in $2.
set -eu
upper=$1
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs /run
mount -t bpf bpf /sys/fs/bpf
for directory in /etc /opt /usr/local /var/lib; do
    mkdir -p "$upper$directory" "$upper.work$directory"
    mount -t overlay -o "lowerdir=$directory,upperdir=$upper$directory,workdir=$upper.work$directory" overlay "$directory"
done
mkdir -p /run/systemd/system /run/stand-in /usr/local/bin
rm -rf /etc/containerd /etc/embedshim /etc/systemd/system/embedshimd.* /opt/embedshim
mkdir -p /etc/containerd /etc/systemd/system
for name in containerd ctr; do
    ln -sf "$2/$name" /usr/local/bin/
done
install -m 755 "$3/systemctl.sh" /usr/local/bin/systemctl
# What changes files can be killed before it does, with all of its session.
for name in cp mv rm; do
    printf '#!/bin/sh\nPATH=/usr/bin:/bin\n. /run/stand-in/step\nexec %s "$@"\n' "$name" > "/usr/local/bin/$name"
    chmod 755 "/usr/local/bin/$name"
done
cat > /run/stand-in/step << 'END'
count=$(($(cat /run/stand-in/count 2> /dev/null || echo 0) + 1))
echo "$count" > /run/stand-in/count
[ "$count" != "$(cat /run/stand-in/kill-at 2> /dev/null)" ] || pkill -KILL -s 0
END
echo ready
exec sleep infinity
