#!/bin/sh
# Installs embedshim on a node of a Kubernetes cluster and tells its containerd of it, or takes both
# back. Runs on the node, or in a privileged pod with the node's root directory mounted. Owns
# containerd's configuration and the order of steps; what is installed where is install.sh's.
#
# Each change is a transaction: before the first step, every file that it will write is saved in
# PREFIX/deploy/change. While that directory is there, the change is not done: this run undoes it
# when it fails, and the next one if this one is killed.
set -eu
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
LC_ALL=C
export PATH LC_ALL
umask 022

usage() {
    cat << 'END'
usage: deploy.sh [OPTION...] install | remove | status

  install        install or upgrade the programs and units, add the runtime handler "embedshim" to
                 containerd's configuration, and restart containerd if that has changed
  remove         the reverse; refused while there are containers or pods of embedshim
  status         say whether the node is as "install" leaves it; changes nothing

  --host DIR     where the node's root directory is; without it /
  --prefix DIR   the folder of embedshim on the node, whose name is "embedshim"; without it
                 /opt/embedshim
  --unit NAME    containerd's unit; without it containerd.service
  --config FILE  containerd's configuration; without it that of the running containerd
  --stay         do not end after "install" or "remove" until SIGTERM, as a DaemonSet needs it

exit codes: 0 done, or installed; 1 it failed, and everything is as it was; 2 the command line is
wrong; 3 this node cannot, nothing was changed; 4 containerd's configuration does not allow it,
everything is as it was; 5 in use: "remove" is refused; 6 status: not installed; 7 status: installed,
but not as "install" leaves it; 8 it failed, and what was changed could not be undone
END
}

HANDLER=embedshim
BEGIN="# embedshim-deploy: begin; 'deploy.sh remove' takes this out"
END="# embedshim-deploy: end"
SCRATCH=/run/embedshim-deploy

say() {
    echo "deploy.sh: $*"
}

# fail CODE MESSAGE
fail() {
    verdict=$1
    shift
    echo "deploy.sh: $*" >&2
    exit "$verdict"
}

same() {
    [ -f "$1" ] && [ -f "$2" ] && cmp -s "$1" "$2"
}

# A path that needs no quotes in a unit, in TOML and in a list of one path a line.
check_path() {
    case $2 in
        *[!A-Za-z0-9/._-]*|*/../*|*/..) fail 2 "$1 has a character that it may not have: $2" ;;
        /*) ;;
        *) fail 2 "$1 must be an absolute path: $2" ;;
    esac
}

# Fails unless only root can write the directory, and those above it. Its links are resolved.
check_trusted() {
    trusted=$(readlink -f -- "$1") || fail 3 "$1 cannot be resolved"
    while :; do
        [ -d "$trusted" ] || fail 3 "$trusted is not a directory"
        owner=$(stat -c %u -- "$trusted")
        mode=$(stat -c %a -- "$trusted")
        [ "$owner" = 0 ] || fail 3 "$trusted is not root's"
        [ $((0$mode & 022)) = 0 ] || fail 3 "others than root can write $trusted"
        [ "$trusted" != / ] || break
        trusted=$(dirname "$trusted")
    done
}

# --- From a container to its node

# Runs this script among the node's mounts, with the node's programs. It is read from the standard
# input, so that it needs no file there.
on_node() {
    nsenter -t 1 -m -- /bin/sh -s -- "$@" < "$0"
}

# from_container COMMAND
from_container() {
    [ "$(stat -L -c %d:%i /proc/1/root/)" = "$(stat -L -c %d:%i "$HOST/")" ] ||
        fail 3 "$HOST is not the root directory of process 1: the pod needs hostPID and the volume"
    archive=$(cd "$(dirname "$0")/.." && pwd)
    if [ "$1" = status ]; then
        digest=$(sha256sum < "$archive/SHA256SUMS")
        set -- --digest "${digest%% *}" "$1"
    else
        stage=$(on_node --prefix "$PREFIX" stage)
        what=.
        [ "$1" != remove ] || what=install.sh
        tar -C "$archive" -cf - "$what" | nsenter -t 1 -m -- tar -C "$stage" -xof -
        set -- --source "$stage" "$1"
    fi
    [ -z "$CONFIG" ] || set -- --config "$CONFIG" "$@"
    # A pod that is deleted waits for what goes on.
    trap : HUP INT TERM
    on_node --prefix "$PREFIX" --unit "$UNIT" "$@" &
    while :; do
        code=0
        wait $! || code=$?
        kill -0 $! 2> /dev/null || break
    done
    trap - HUP INT TERM
}

# The folder of this script, which only root can write.
own_folder() {
    above=$PREFIX
    while [ ! -e "$above" ] && [ ! -L "$above" ]; do
        above=$(dirname "$above")
    done
    check_trusted "$above"
    for name in bin share share/embedshim deploy; do
        [ ! -L "$PREFIX/$name" ] || fail 3 "$PREFIX/$name is a symbolic link"
    done
    mkdir -p "$DEPLOY"
    chmod 700 "$DEPLOY"
}

# A directory for the archive, which "install" removes.
stage() {
    own_folder
    mktemp -d "$DEPLOY/stage.XXXXXX"
}

# --- What the node is

# A property of a unit.
property() {
    systemctl show --property="$1" --value "$2"
}

check_node() {
    [ "$(property LoadState "$UNIT")" = loaded ] || fail 3 "there is no unit $UNIT; k3s and others have a containerd of their own"
    systemctl --quiet is-active "$UNIT" || fail 3 "$UNIT is not active"
    case $(property KillMode "$UNIT") in
        process|none) ;;
        *) fail 3 "$UNIT has another KillMode= than process: a restart would kill what runs" ;;
    esac
    { [ "$MAJOR" -ge 2 ] || [ "$MINOR" -ge 6 ]; } || fail 3 "containerd $MAJOR.$MINOR is older than 1.6"
    find_config "$(property MainPID "$UNIT")"
}

# The program that the unit executes, unless that is a wrapper of another kind.
find_containerd() {
    CONTAINERD=$(property ExecStart "$UNIT" | sed -n 's/^{ path=\([^ ;]*\) ;.*/\1/p' | head -n 1)
    case $("${CONTAINERD:-false}" --version 2> /dev/null) in
        containerd\ *) ;;
        *) CONTAINERD=$(command -v containerd) || fail 3 "there is no containerd in $PATH" ;;
    esac
    MINOR=$("$CONTAINERD" --version | awk '{ sub(/^v/, "", $3); print $3 }')
    MAJOR=${MINOR%%.*}
    MINOR=${MINOR#*.}
    MINOR=${MINOR%%.*}
    case $MAJOR$MINOR in
        *[!0-9]*|'') fail 3 "the version of $CONTAINERD is not understood: $("$CONTAINERD" --version)" ;;
    esac
}

# Resolves CONFIG, which is that of the process, or the default.
find_config() {
    if [ -z "$CONFIG" ]; then
        CONFIG=$(tr '\0' '\n' < "/proc/$1/cmdline" | awk '
            next_is_it { print; exit }
            $0 == "-c" || $0 == "--config" || $0 == "-config" { next_is_it = 1 }
            sub(/^--?c(onfig)?=/, "") { print; exit }')
        CONFIG=${CONFIG:-/etc/containerd/config.toml}
    fi
    if [ -e "$CONFIG" ] || [ -L "$CONFIG" ]; then
        CONFIG=$(readlink -f -- "$CONFIG") || fail 3 "$CONFIG cannot be resolved"
        [ -f "$CONFIG" ] || fail 3 "$CONFIG is not a file"
    fi
    check_path "containerd's configuration" "$CONFIG"
}

# The files of another installation would be in the way.
check_no_other() {
    other=$(property FragmentPath embedshimd.service)
    [ -z "$other" ] || grep -qxF "$other" "$MANIFEST" 2> /dev/null ||
        fail 3 "embedshim is installed already, with $other, but not below $PREFIX; remove it first"
}

check_programs() {
    "$SOURCE/bin/embedshimd" --version > /dev/null 2>&1 ||
        fail 3 "$SOURCE/bin/embedshimd does not run on this node, a $(uname -m) (or its directory is mounted noexec)"
    code=0
    "$SOURCE/bin/embedshimd" probe > "$WORK/probe" 2>&1 || code=$?
    case $code in
        0) ;;
        7) say "exits can be lost while the daemon is down: run embedshimd probe on this node" ;;
        *)
            cat "$WORK/probe" >&2
            fail 3 "no exit monitor can run on this kernel"
            ;;
    esac
}

count_containers() {
    "$SOURCE/install.sh" --prefix "$PREFIX" --containers
}

# --- containerd's configuration

# The version of a configuration that has none yet.
newest_version() {
    if [ "$MAJOR" -ge 2 ]; then echo 3; else echo 2; fi
}

# dump FILE INTO: what containerd makes of a configuration; of none, if there is no such file.
dump() {
    file=$1
    if [ ! -e "$file" ]; then
        file=$WORK/none.toml
        echo "version = $(newest_version)" > "$file"
    fi
    "$CONTAINERD" --config "$file" config dump > "$2" 2> "$WORK/complaint"
}

# A value at the top of a TOML file, above its first table.
top_value() {
    awk -v name="$1" '
        /^[ \t]*\[/ { exit }
        { line = $0; sub(/^[ \t]*/, "", line) }
        index(line, name) == 1 && substr(line, length(name) + 1) ~ /^[ \t]*=/ { inside = 1; sub(/^[^=]*=/, "", line) }
        inside { sub(/#.*/, "", line); print line; if (line !~ /\[/ && !open || line ~ /\]/) exit; open = 1 }
    ' "$2" | tr -d ' \t'
}

# A directory of which containerd 2 reads every file. Without a configuration it reads none, not even
# the one that it names as its default.
imported_directory() {
    [ -e "$CONFIG" ] || return 0
    top_value imports "$CONFIG" | tr ',' '\n' | tr -d "\"'[]" | sed -n 's#^\(/[A-Za-z0-9/._-]*\)/\*\.toml$#\1#p' | head -n 1
}

# The section of our handler has our launcher.
has_handler() {
    awk -v header="containerd[.]runtimes[.]$HANDLER\\\\][ \t]*\$" -v path="$PREFIX/bin/containerd-shim-embed-v1" '
        /^[ \t]*\[/ { inside = $0 ~ header }
        inside && $1 == "runtime_path" && index($3, path) == 2 && length($3) == length(path) + 2 { found = 1 }
        END { exit !found }
    ' "$1"
}

has_name() {
    grep -q "containerd[.]runtimes[.]$HANDLER\\]" "$1"
}

# lost BEFORE AFTER: the lines of one dump that are not in the same table of the other.
lost() {
    awk '
        FNR == 1 { file++; table = "" }
        /^[ \t]*\[/ { table = $0 }
        /^[ \t]*$/ || /^imports = / { next }
        file == 1 { after[table "\n" $0] = 1; next }
        !((table "\n" $0) in after) { print }
    ' "$2" "$1"
}

# What the node's own handler says to runc.
options_of_runc() {
    awk '
        /^[ \t]*\[/ { inside = /containerd[.]runtimes[.]runc[.]options\][ \t]*$/ }
        inside && /^[ \t]*(SystemdCgroup = (true|false)|BinaryName = ["\047][A-Za-z0-9\/._-]+["\047])$/ {
            sub(/^[ \t]*/, "  "); print
        }
    ' "$1"
}

# The socket of the API; its table is a plugin's from version 4 of the configuration (containerd 2.3) on.
address_of() {
    awk '
        /^[ \t]*\[/ { inside = $1 == "[grpc]" || /io[.]containerd[.]server[.]v1[.]grpc["\047]\][ \t]*$/ }
        inside && $1 == "address" { gsub(/["\047]/, "", $3); print $3 }
    ' "$1"
}

# The default handler, as a table: with any handler in the file, containerd 1 has no default one.
table_of_runc() {
    awk -v table="plugins.\"$PLUGIN\".containerd.runtimes.runc" '
        /^[ \t]*\[/ {
            inside = match($0, /containerd[.]runtimes[.]runc([.]options)?\][ \t]*$/)
            if (inside) print "[" table ($0 ~ /options\]/ ? ".options" : "") "]"
            next
        }
        inside && NF { sub(/^[ \t]*/, "  "); print }
    ' "$1"
}

block() {
    table="plugins.\"$PLUGIN\".containerd.runtimes.$HANDLER"
    echo "$BEGIN"
    echo "[$table]"
    echo '  runtime_type = "io.containerd.runc.v2"'
    echo "  runtime_path = \"$PREFIX/bin/containerd-shim-embed-v1\""
    echo "[$table.options]"
    options_of_runc "$WORK/before"
    [ -z "$with_runc" ] || table_of_runc "$WORK/before"
    echo "$END"
}

without_block() {
    awk -v begin="$BEGIN" -v end="$END" '
        $0 == begin { inside = 1 }
        !inside { print }
        $0 == end { inside = 0 }
    ' "$1"
}

block_of() {
    awk -v begin="$BEGIN" -v end="$END" '
        $0 == begin { inside = 1 }
        inside { print }
        $0 == end { inside = 0 }
    ' "$1"
}

has_block() {
    [ -f "$1" ] && grep -qxF "$BEGIN" "$1"
}

# Asks containerd what it is told, and refuses what cannot be changed without a loss.
read_config() {
    dump "$CONFIG" "$WORK/before" || {
        cat "$WORK/complaint" >&2
        fail 4 "containerd does not understand its configuration as it is, $CONFIG"
    }
    ADDRESS=$(address_of "$WORK/before")
    if grep '^disabled_plugins = ' "$WORK/before" | grep -qE "[\"'](cri|io\.containerd\.(grpc\.v1\.cri|cri\.v1\.runtime))[\"']"; then
        fail 3 "the CRI is disabled in $CONFIG: kubelet does not use this containerd"
    fi
    version=
    [ ! -e "$CONFIG" ] || version=$(top_value version "$CONFIG")
    if [ -z "$version" ]; then
        [ ! -e "$CONFIG" ] || ! grep -qE '^[^#]*[^#[:space:]]' "$CONFIG" ||
            fail 4 "$CONFIG has no version, so 1; containerd config migrate makes a newer one"
        version=$(newest_version)
    fi
    case $version in
        2) PLUGIN=io.containerd.grpc.v1.cri ;;
        [3-9]) PLUGIN=io.containerd.cri.v1.runtime ;;
        *) fail 4 "$CONFIG has version $version; containerd config migrate makes a newer one" ;;
    esac
}

# The file that has our block, and whether the whole file is ours. Before containerd 2, which merges
# tables, a file of its own would take the place of all that is said to the CRI.
choose_target() {
    TARGET=$(recorded target)
    # It stays where it is.
    if [ -z "$TARGET" ] || ! has_block "$TARGET"; then
        TARGET=$CONFIG
        directory=
        [ "$MAJOR" -lt 2 ] || directory=$(imported_directory)
        [ -z "$directory" ] || TARGET=$directory/embedshim.toml
    fi
    MODE=edit
    if [ ! -e "$TARGET" ] || { [ "$(recorded mode)" = own ] && same "$TARGET" "$DEPLOY/config.after"; }; then
        MODE=own
    fi
}

is_config_current() {
    has_handler "$WORK/before" || return 1
    # Without marks, another hand has written it.
    has_block "$TARGET" || return 0
    block_of "$TARGET" > "$WORK/is"
    with_runc=$(grep 'runtimes[.]runc\]' "$WORK/is") || :
    block > "$WORK/block"
    same "$WORK/is" "$WORK/block"
}

# Writes what TARGET is to be beside it, with the rights that it has.
draft_config() {
    rm -rf "$TARGET.embedshim-new"
    [ ! -e "$TARGET" ] || cp -p "$TARGET" "$TARGET.embedshim-new"
    cat "$1" > "$TARGET.embedshim-new"
}

# Whether containerd sees our handler in the file, and nothing else has changed. If not, sets
# `reason`, and writes what is to be said of it to `lost`.
is_accepted() {
    reason="containerd would not understand its configuration with the handler $HANDLER in $TARGET"
    dump "$1" "$WORK/after" || {
        cp "$WORK/complaint" "$WORK/lost"
        return 1
    }
    : > "$WORK/lost"
    reason="containerd does not see the handler $HANDLER in $TARGET"
    has_handler "$WORK/after" || return 1
    reason="with the handler $HANDLER in $TARGET, the configuration would lose what is above"
    lost "$WORK/without-handler" "$WORK/after" > "$WORK/lost"
    [ ! -s "$WORK/lost" ]
}

# Puts it in place if containerd accepts it. The main file is tried before, any other after that.
put_config() {
    {
        cat "$WORK/base"
        # A last line without its end.
        [ -z "$(tail -c 1 "$WORK/base")" ] || echo
        grep -q '^[^#]*=' "$WORK/base" || echo "version = $version"
        block
    } > "$WORK/new"
    draft_config "$WORK/new"
    if [ "$TARGET" = "$CONFIG" ]; then
        is_accepted "$TARGET.embedshim-new" || return 1
    fi
    mv -f "$TARGET.embedshim-new" "$TARGET" || fail 1 "$TARGET cannot be written"
    is_accepted "$CONFIG"
}

change_config() {
    mkdir -p "$(dirname "$TARGET")"
    check_trusted "$(dirname "$TARGET")"
    if [ "$MODE" = own ]; then
        : > "$WORK/base"
    elif same "$TARGET" "$DEPLOY/config.after"; then
        cp "$DEPLOY/config.before" "$WORK/base"
    elif has_block "$TARGET"; then
        without_block "$TARGET" > "$WORK/base"
    else
        cat "$TARGET" > "$WORK/base"
    fi
    # What another version of this script has written is no loss.
    awk -v header="containerd[.]runtimes[.]${HANDLER}[].]" '
        /^[ \t]*\[/ { inside = $0 ~ header }
        !inside { print }
    ' "$WORK/before" > "$WORK/without-handler"
    with_runc=
    if ! put_config; then
        with_runc=yes
        put_config || {
            cat "$WORK/lost" >&2
            fail 4 "$reason"
        }
    fi
    cp "$WORK/base" "$DEPLOY/config.before"
    cp "$WORK/new" "$DEPLOY/config.after"
}

# Takes out what this script has put in.
change_config_back() {
    if same "$TARGET" "$DEPLOY/config.after"; then
        cp "$DEPLOY/config.before" "$WORK/new"
    else
        without_block "$TARGET" > "$WORK/new"
        MODE=edit
    fi
    if [ "$MODE" = own ]; then
        rm -f "$TARGET"
    else
        draft_config "$WORK/new"
        mv -f "$TARGET.embedshim-new" "$TARGET"
    fi
    dump "$CONFIG" "$WORK/after" || {
        cat "$WORK/complaint" >&2
        fail 4 "containerd would not understand its configuration without the handler $HANDLER"
    }
    ! has_name "$WORK/after" ||
        fail 4 "the configuration has a handler $HANDLER that this script has not written; take it out first"
}

# --- containerd itself

answers() {
    systemctl --quiet is-active "$UNIT" || return 1
    [ -S "$ADDRESS" ] || return 1
    command -v ctr > /dev/null || return 0
    timeout 30 ctr --address "$ADDRESS" version > /dev/null 2>&1
}

# What a containerd could not load.
failed_plugins() {
    command -v ctr > /dev/null || return 0
    timeout 60 ctr --address "$ADDRESS" plugins ls 2> /dev/null | awk '$NF == "error" { print $1, $2 }' | sort
}

restart_containerd() {
    systemctl reset-failed "$UNIT" 2> /dev/null || :
    timeout 240 systemctl restart "$UNIT" || return 1
    for _ in $(seq 120); do
        ! answers || return 0
        sleep 0.5
    done
    return 1
}

# The running one has another configuration.
renew_containerd() {
    failed_plugins > "$WORK/failed-before"
    : > "$CHANGE/restarted"
    restart_containerd || fail 1 "$UNIT does not come back with the changed configuration"
    failed_plugins > "$WORK/failed-after"
    awk 'FNR == NR { before[$0] = 1; next } !($0 in before)' "$WORK/failed-before" "$WORK/failed-after" > "$WORK/failed"
    [ ! -s "$WORK/failed" ] || {
        cat "$WORK/failed" >&2
        fail 1 "containerd does not load the plugins above with the changed configuration"
    }
    say "$UNIT was restarted"
}

# --- Transactions

# Each file that a change can write, after its kind.
paths() {
    echo "config $TARGET"
    for name in record sums config.before config.after; do
        echo "record $DEPLOY/$name"
    done
    : > "$WORK/list"
    [ ! -d "$SOURCE/bin" ] || "$SOURCE/install.sh" --prefix "$PREFIX" --list > "$WORK/list"
    [ ! -e "$MANIFEST" ] || cat "$MANIFEST" >> "$WORK/list"
    echo "$MANIFEST" >> "$WORK/list"
    sort -u "$WORK/list" | sed 's/^/program /'
}

begin() {
    rm -rf "$CHANGE.new"
    mkdir "$CHANGE.new"
    paths > "$CHANGE.new/paths"
    number=0
    while read -r kind path; do
        check_path "a file of embedshim" "$path"
        number=$((number + 1))
        state=absent
        if [ -f "$path" ]; then
            cp -p "$path" "$CHANGE.new/$number"
            state=there
        fi
        echo "$number $kind $state $path" >> "$CHANGE.new/list"
    done < "$CHANGE.new/paths"
    [ -d "$(dirname "$TARGET")" ] || dirname "$TARGET" > "$CHANGE.new/made"
    echo "$CONFIG" > "$CHANGE.new/config"
    ! systemctl --quiet is-enabled embedshimd.socket 2> /dev/null || : > "$CHANGE.new/was-enabled"
    ! systemctl --quiet is-active embedshimd.socket || : > "$CHANGE.new/was-active"
    # These alone: a node has other things to write.
    find "$CHANGE.new" -exec sync {} +
    mv "$CHANGE.new" "$CHANGE"
    sync "$DEPLOY"
    is_changing=yes
}

commit() {
    while read -r _ path; do
        [ ! -e "$path" ] || sync "$path" "$(dirname "$path")"
    done < "$CHANGE/paths"
    mv "$CHANGE" "$CHANGE.done"
    sync "$DEPLOY"
    is_changing=
    rm -rf "$CHANGE.done"
}

# restore KIND: its files are as they were. Sets `trouble` if one is not.
restore() {
    while read -r number kind state path; do
        [ "$kind" = "$1" ] || continue
        for draft in "$path.new" "$path.embedshim-new"; do
            [ ! -e "$draft" ] || rm -f "$draft"
        done
        if [ "$state" = there ]; then
            ! same "$CHANGE/$number" "$path" || continue
            mkdir -p "$(dirname "$path")"
            { cp -p "$CHANGE/$number" "$path.new" && mv -f "$path.new" "$path"; } || trouble=yes
        else
            [ ! -e "$path" ] || rm -f "$path" || trouble=yes
        fi
    done < "$CHANGE/list"
}

# Everything is as it was before `begin`. Fails if it is not.
undo() {
    trouble=
    say "undoing a change that was not finished"
    restore config
    CONFIG=$(cat "$CHANGE/config")
    ! dump "$CONFIG" "$WORK/restored" || ADDRESS=$(address_of "$WORK/restored")
    if [ -e "$CHANGE/restarted" ]; then
        restart_containerd || trouble=yes
    fi
    [ ! -s "$CHANGE/made" ] || rmdir "$(cat "$CHANGE/made")" 2> /dev/null
    if grep -qF " program there $PREFIX/bin/embedshimd" "$CHANGE/list"; then
        restore record
        restore program
        systemctl daemon-reload || trouble=yes
        reinstate_units
    elif [ "$(count_containers)" != 0 ]; then
        # They need the programs; the next installation takes them as they are.
        say "the programs stay, since there are containers of embedshim"
    else
        # It stops and disables the units, too.
        [ ! -e "$MANIFEST" ] || "$SOURCE/install.sh" --prefix "$PREFIX" --remove > /dev/null || trouble=yes
        rm -f "$MANIFEST.unit"
        restore record
        restore program
        rmdir /etc/embedshim 2> /dev/null
        systemctl daemon-reload || trouble=yes
    fi
    if [ -n "$trouble" ]; then
        echo "deploy.sh: not all of it could be undone; what was there before is in $CHANGE" >&2
        return 1
    fi
    commit
    say "everything is as it was"
}

reinstate_units() {
    [ ! -e "$CHANGE/was-enabled" ] || systemctl --quiet enable embedshimd.socket || trouble=yes
    [ ! -e "$CHANGE/was-active" ] || systemctl start embedshimd.socket || trouble=yes
    pid=$(property MainPID embedshimd.service)
    [ "$pid" != 0 ] || return 0
    same "/proc/$pid/exe" "$PREFIX/bin/embedshimd" && return 0
    systemctl kill --kill-who=main --signal=HUP embedshimd.service || trouble=yes
    for _ in $(seq 300); do
        now=$(property MainPID embedshimd.service)
        [ "$now" = "$pid" ] || [ "$now" = 0 ] || ! systemctl --quiet is-active embedshimd.service || return 0
        sleep 0.2
    done
    trouble=yes
}

# What an earlier run has not come to an end with.
recover() {
    rm -rf "$CHANGE.new" "$CHANGE.done"
    find "$SCRATCH" -mindepth 1 -maxdepth 1 -mmin +60 -exec rm -rf {} +
    find "$DEPLOY" -maxdepth 1 -name 'stage.*' -mmin +60 -exec rm -rf {} +
    [ -d "$CHANGE" ] || return 0
    set +e
    undo || fail 8 "the change of an earlier run could not be undone"
    set -e
}

# At every end: an unfinished change is undone.
# shellcheck disable=SC2317  # it is reached by the trap
finish() {
    code=$?
    trap - EXIT
    trap '' HUP INT TERM
    set +e
    if [ "$code" != 0 ] && [ -z "$verdict" ]; then
        echo "deploy.sh: stopped: a command has failed, or a signal came" >&2
        code=1
    fi
    [ -z "$is_changing" ] || undo || code=8
    case $SOURCE in "$DEPLOY"/stage.*) rm -rf "$SOURCE" ;; esac
    # Where nothing is installed, not even empty folders are left.
    if [ "$COMMAND" != status ] && [ ! -e "$RECORD" ] && [ ! -e "$MANIFEST" ] && [ ! -e "$CHANGE" ]; then
        find "$PREFIX" -depth -type d -exec rmdir {} + 2> /dev/null
    fi
    [ -z "$WORK" ] || rm -rf "$WORK"
    exec 9<&-
    [ "$code" != 0 ] || stay
    exit "$code"
}

# What a DaemonSet's pod does when it is done.
stay() {
    [ -n "$STAY" ] || return 0
    trap 'exit 0' HUP INT TERM
    while :; do
        sleep 3600 &
        wait $!
    done
}

# --- The commands

recorded() {
    [ ! -e "$RECORD" ] || sed -n "s/^$1=//p" "$RECORD"
}

are_programs_current() {
    [ "$(recorded digest)" = "$DIGEST" ] && sha256sum -c "$DEPLOY/sums" > /dev/null 2>&1 &&
        systemctl --quiet is-enabled embedshimd.socket &&
        { systemctl --quiet is-active embedshimd.socket || systemctl --quiet is-active embedshimd.service; }
}

record() {
    xargs sha256sum < "$MANIFEST" > "$DEPLOY/sums"
    {
        echo "digest=$DIGEST"
        echo "mode=$MODE"
        echo "target=$TARGET"
        [ ! -s "$CHANGE/made" ] || echo "made=$(cat "$CHANGE/made")"
    } > "$RECORD.new"
    mv -f "$RECORD.new" "$RECORD"
}

install() {
    check_node
    read_config
    choose_target
    renew_programs=
    renew_config=
    are_programs_current || renew_programs=yes
    is_config_current || renew_config=yes
    if [ -z "$renew_programs$renew_config" ]; then
        say "nothing to do"
        return
    fi
    check_no_other
    [ -z "$renew_config" ] || has_block "$TARGET" || ! has_name "$WORK/before" ||
        fail 4 "the configuration has a handler $HANDLER that is not of this script; take it out first"
    [ -z "$renew_programs" ] || check_programs
    made=$(recorded made)
    begin
    [ -z "$made" ] || echo "$made" > "$CHANGE/made"
    [ -z "$renew_programs" ] || "$SOURCE/install.sh" --prefix "$PREFIX" || fail 1 "install.sh has failed"
    if [ -n "$renew_config" ]; then
        change_config
        renew_containerd
    fi
    record
    commit
    say "installed: $("$PREFIX/bin/embedshimd" --version), handler $HANDLER in $TARGET"
}

remove() {
    if [ ! -e "$RECORD" ] && [ ! -e "$MANIFEST" ]; then
        say "not installed"
        return
    fi
    refuse_in_use
    check_node
    read_config
    MODE=$(recorded mode)
    TARGET=$(recorded target)
    TARGET=${TARGET:-$CONFIG}
    made=$(recorded made)
    has_block "$TARGET" || ! has_handler "$WORK/before" ||
        fail 4 "the handler $HANDLER in the configuration is not of this script; take it out first"
    begin
    if has_block "$TARGET"; then
        change_config_back
        renew_containerd
        # No pod can come any more.
        refuse_in_use
    fi
    [ ! -e "$MANIFEST" ] || "$SOURCE/install.sh" --prefix "$PREFIX" --remove || fail 1 "install.sh has failed"
    commit
    [ -z "$made" ] || rmdir "$made" 2> /dev/null || :
    rm -f "$RECORD" "$DEPLOY/sums" "$DEPLOY/config.before" "$DEPLOY/config.after"
}

refuse_in_use() {
    count=$(count_containers)
    [ "$count" = 0 ] || fail 5 "$count containers or pods of embedshim are there; delete them first"
}

status() {
    if [ -d "$CHANGE" ]; then fail 7 "a change is under way, or was cut short: run install again"; fi
    [ -e "$RECORD" ] || fail 6 "not installed"
    [ "$(recorded digest)" = "$DIGEST" ] || fail 7 "another version is installed"
    are_programs_current || fail 7 "files or units are not as they were installed"
    check_node
    read_config
    has_handler "$WORK/before" || fail 7 "containerd's configuration has no handler $HANDLER"
    say "installed: $("$PREFIX/bin/embedshimd" --version), handler $HANDLER in $(recorded target)"
}

main() {
    HOST=/ PREFIX=/opt/embedshim UNIT=containerd.service CONFIG='' SOURCE='' DIGEST='' COMMAND='' STAY=''
    WORK='' ADDRESS=/run/containerd/containerd.sock is_changing='' verdict=''
    while [ $# -gt 0 ]; do
        case $1 in
            --host|--prefix|--unit|--config|--source|--digest) [ $# -ge 2 ] || { usage >&2; exit 2; } ;;
        esac
        case $1 in
            --host) HOST=$2; shift ;;
            --prefix) PREFIX=$2; shift ;;
            --unit) UNIT=$2; shift ;;
            --config) CONFIG=$2; shift ;;
            # Only for itself: where the archive is on the node, and its digest.
            --source) SOURCE=$2; shift ;;
            --digest) DIGEST=$2; shift ;;
            --stay) STAY=yes ;;
            --help|-h) usage; exit 0 ;;
            install|remove|status|stage) [ -z "$COMMAND" ] || { usage >&2; exit 2; }; COMMAND=$1 ;;
            *) usage >&2; exit 2 ;;
        esac
        shift
    done
    [ -n "$COMMAND" ] || { usage >&2; exit 2; }
    [ "$(id -u)" = 0 ] || fail 3 "run this as root"
    check_path --host "$HOST"
    check_path --prefix "$PREFIX"
    case $PREFIX in */embedshim) ;; *) fail 2 "--prefix must be a folder called embedshim: all of it is ours" ;; esac
    case $UNIT in *[!A-Za-z0-9@._-]*|-*) fail 2 "--unit is no name of a unit: $UNIT" ;; esac
    [ -z "$CONFIG" ] || check_path --config "$CONFIG"
    DEPLOY=$PREFIX/deploy
    if [ "$HOST" = / ]; then
        on_this_node
    else
        from_container "$COMMAND"
        [ "$code" != 0 ] || stay
        exit "$code"
    fi
}

on_this_node() {
    [ -n "$SOURCE" ] || [ "$COMMAND" = stage ] || [ -n "$DIGEST" ] || SOURCE=$(cd "$(dirname "$0")/.." && pwd)
    exec < /dev/null
    RECORD=$DEPLOY/record
    CHANGE=$DEPLOY/change
    MANIFEST=$PREFIX/share/embedshim/installed
    if [ "$COMMAND" = stage ]; then
        stage
        exit
    fi
    trap finish EXIT
    trap 'exit 1' HUP INT TERM
    [ -d "$SCRATCH" ] || mkdir -m 700 "$SCRATCH"
    WORK=$(mktemp -d "$SCRATCH/XXXXXX")
    if [ -z "$DIGEST" ] && [ -e "$SOURCE/SHA256SUMS" ]; then
        DIGEST=$(sha256sum < "$SOURCE/SHA256SUMS")
        DIGEST=${DIGEST%% *}
    fi
    [ -d /run/systemd/system ] || fail 3 "systemd is not the first process of this node"
    find_containerd
    if [ "$COMMAND" = status ]; then
        status
        exit
    fi
    exec 9< "$SCRATCH"
    flock -w 300 9 || fail 1 "another deploy.sh is at work on this node"
    own_folder
    recover
    case $COMMAND in
        install) install ;;
        remove) remove ;;
    esac
    exit
}

main "$@"
