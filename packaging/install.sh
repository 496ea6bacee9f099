#!/bin/sh
# Installs embedshim from the directory that this script is in, replaces an installed version under running containers, or removes it.
# For systems without its Debian package. Run as root; does nothing twice.
set -eu

usage() {
    cat <<'END'
usage: install.sh [--prefix DIR] [--no-systemd] [--remove | --list | --containers]

  --prefix DIR   where bin/ and share/ are; without it /usr/local. containerd looks for
                 containerd-shim-embed-v1 in its PATH
  --no-systemd   install no units: the first container starts a keeper instead
  --remove       remove what was installed there; refused while there are containers of embedshim,
                 unless EMBEDSHIM_REMOVE_ANYWAY=1 is in the environment
  --list         print the path of each file that an installation writes, and change nothing
  --containers   print how many containers and pods of embedshim are there

An installed version is replaced, and a daemon that runs as well: containers run on.
EMBEDSHIM_STATE_DIR names another state directory than /run/embedshim.
END
}

fail() {
    echo "install.sh: $1" >&2
    exit 1
}

PREFIX=/usr/local
STATE=${EMBEDSHIM_STATE_DIR:-/run/embedshim}
CONFIG=${EMBEDSHIM_CONFIG:-/etc/embedshim/config.toml}
UNITS=/etc/systemd/system
action=install
systemd=
[ -d /run/systemd/system ] && systemd=yes
while [ $# -gt 0 ]; do
    case $1 in
        --prefix) [ $# -ge 2 ] || { usage >&2; exit 2; }; PREFIX=$2; shift ;;
        --no-systemd) systemd= ;;
        --remove|--list|--containers) action=${1#--} ;;
        --help|-h) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
    shift
done
case $PREFIX in /*) ;; *) fail "--prefix must be an absolute path" ;; esac
here=$(cd "$(dirname "$0")" && pwd)
[ "$(id -u)" = 0 ] || fail "run this as root"
MANIFEST=$PREFIX/share/embedshim/installed

# Replaces a file in one step: a program that runs keeps its old one.
put() {
    mkdir -p "$(dirname "$2")"
    cp "$1" "$2.new"
    chmod "$3" "$2.new"
    mv -f "$2.new" "$2"
    echo "$2" >> "$MANIFEST.new"
}

is_running() {
    code=0
    "$PREFIX/bin/embedshimd" status --state-dir "$STATE" > /dev/null 2>&1 || code=$?
    [ $code = 0 ] || [ $code = 8 ]
}

is_managed() {
    [ -n "$systemd" ] && [ -e "$UNITS/embedshimd.service" ] && systemctl --quiet is-active embedshimd.service
}

main_pid() {
    systemctl show --property=MainPID --value embedshimd.service
}

# Replaces the daemon of systemd, and waits until another one serves: a minute.
replace_managed() {
    before=$(main_pid)
    systemctl kill --kill-who=main --signal=HUP embedshimd.service
    for _ in $(seq 300); do
        now=$(main_pid)
        if [ "$now" != "$before" ] && [ "$now" != 0 ] && systemctl --quiet is-active embedshimd.service; then
            echo "replaced: systemd has started the new daemon"
            return
        fi
        sleep 0.2
    done
    fail "the new daemon does not serve; containers run on, but look at: journalctl -u embedshimd.service"
}

# Records of containers, and of pods without a pause container.
count_containers() {
    find "$STATE/tasks" "$STATE/sandboxes" -name '*.json' 2> /dev/null | wc -l
}

# The files of the archive that have their place below the prefix.
archived() {
    (cd "$here" && find bin share -type f | sort)
}

list_all() {
    archived | sed "s#^#$PREFIX/#"
    if [ -n "$systemd" ]; then
        echo "$UNITS/embedshimd.service"
        echo "$UNITS/embedshimd.socket"
    fi
    echo "$MANIFEST"
    echo "$CONFIG"
}

install_all() {
    (cd "$here" && sha256sum --check --quiet SHA256SUMS) || fail "the files are not those of the checksums"
    # Of another architecture, or linked to a newer C library: the installed ones are better.
    for program in "$here"/bin/*; do
        "$program" --version > /dev/null 2>&1 || fail "$program does not run on this machine, a $(uname -m) (or its directory is mounted noexec)"
    done
    was_running=
    [ -x "$PREFIX/bin/embedshimd" ] && is_running && was_running=yes
    mkdir -p "$PREFIX/share/embedshim"
    : > "$MANIFEST.new"
    archived | while read -r file; do
        case $file in bin/*) mode=755 ;; *) mode=644 ;; esac
        put "$here/$file" "$PREFIX/$file" "$mode"
    done
    if [ ! -e "$CONFIG" ]; then
        mkdir -p "$(dirname "$CONFIG")"
        cp "$here/config.toml" "$CONFIG"
        chmod 644 "$CONFIG"
    fi
    if [ -n "$systemd" ]; then
        for unit in embedshimd.service embedshimd.socket; do
            sed "s#/usr/bin/#$PREFIX/bin/#; s#/usr/share/#$PREFIX/share/#" "$here/systemd/$unit" > "$MANIFEST.unit"
            put "$MANIFEST.unit" "$UNITS/$unit" 644
            rm -f "$MANIFEST.unit"
        done
    fi
    mv -f "$MANIFEST.new" "$MANIFEST"
    if [ -n "$systemd" ]; then
        systemctl daemon-reload
        systemctl enable --quiet embedshimd.socket
    fi
    if is_managed; then
        replace_managed
    elif [ -n "$was_running" ]; then
        "$PREFIX/bin/embedshimd" upgrade --state-dir "$STATE"
    elif [ -n "$systemd" ]; then
        systemctl start embedshimd.socket
        echo "installed: the first container starts the daemon"
    else
        echo "installed: the first container starts the daemon, by a containerd with $PREFIX/bin in its PATH"
    fi
}

remove_all() {
    [ -e "$MANIFEST" ] || fail "nothing is installed in $PREFIX"
    count=$(count_containers)
    if [ "$count" -gt 0 ] && [ "${EMBEDSHIM_REMOVE_ANYWAY:-}" != 1 ]; then
        fail "$count containers or pods of embedshim are there; delete them first, or set EMBEDSHIM_REMOVE_ANYWAY=1"
    fi
    if [ -n "$systemd" ] && [ -e "$UNITS/embedshimd.socket" ]; then
        # In one transaction: a connection between the two would start the daemon again.
        systemctl stop embedshimd.socket embedshimd.service
        systemctl disable --quiet embedshimd.socket
    elif is_running && [ -e "$STATE/keeper.lock" ]; then
        keeper=$(head -n 1 "$STATE/keeper.lock")
        # SIGTERM ends keeper and daemon.
        kill -TERM "$keeper"
        for _ in $(seq 200); do
            is_running || break
            sleep 0.1
        done
    fi
    # The list itself is on no list.
    while read -r file; do
        rm -f "$file"
    done < "$MANIFEST"
    rm -f "$MANIFEST"
    rmdir "$PREFIX/share/embedshim" 2> /dev/null || true
    [ -z "$systemd" ] || systemctl daemon-reload
    if [ "$count" = 0 ] && [ "$STATE" = /run/embedshim ]; then
        umount /run/embedshim/pods 2> /dev/null || true
        # The BPF program ends with its pins.
        rm -rf /run/embedshim /sys/fs/bpf/embedshim/run-embedshim
        rmdir /sys/fs/bpf/embedshim 2> /dev/null || true
    fi
    echo "removed; $CONFIG stays"
}

case $action in
    install) install_all ;;
    remove) remove_all ;;
    list) list_all ;;
    containers) count_containers ;;
esac
