# Containers to survive with: two without a client, and one whose client waits for its exit code. Owns what "untouched" means.

IMAGE=docker.io/library/guest:latest
RUNTIME=io.containerd.embed.v1
# Emulated, nothing is quick.
PATIENCE=60

# until_true COMMAND...: waits until it succeeds.
until_true() {
    local deadline=$((SECONDS + PATIENCE))
    until "$@"; do
        [ $SECONDS -lt $deadline ] || return 1
        sleep 0.1
    done
} 2>/dev/null

run_container() {
    ctr run --snapshotter native --runtime $RUNTIME "$@"
}

start_detached() {
    for id in one two; do
        run_container --detach $IMAGE $id guest until-term 3
    done
    identities one two >/run/before
    lost_connections >/run/lost
}

start_containers() {
    rm -f /run/client.code
    (
        code=0
        run_container --rm $IMAGE client guest until-term 7 </dev/null >/run/client.out 2>&1 || code=$?
        echo $code >/run/client.code
    ) &
    start_detached
    until_true is_ready
    identities one two client >/run/before
}

is_ready() {
    grep -q ready /run/client.out
}

# Name, state, pid and start time of each.
identities() {
    local id pid state
    for id in "$@"; do
        read -r pid state < <(ctr task ls | awk -v id="$id" '$1 == id { print $2, $3 }')
        echo "$id $state $pid $(cut -d ' ' -f 22 "/proc/$pid/stat")"
    done
}

lost_connections() {
    journalctl --quiet --no-pager --unit=containerd.service --grep='shim disconnected' | wc -l
}

containers_are_untouched() {
    local ids
    ids=$(cut -d ' ' -f 1 /run/before)
    grep -q RUNNING /run/before
    identities $ids | diff /run/before -
    lost_connections | diff /run/lost -
}

exec_works() {
    [ "$(ctr task exec --exec-id "exec$RANDOM" one echo hello)" = hello ]
}

is_stopped() {
    ctr task ls | grep -q "^$1 .*STOPPED"
}

codes_of_detached_arrive() {
    local id code
    for id in one two; do
        ctr task kill --signal TERM $id
        until_true is_stopped $id
        code=0
        ctr task delete $id || code=$?
        [ $code = 3 ]
        ctr container delete $id
    done
}

codes_arrive() {
    ctr task kill --signal TERM client
    until_true test -s /run/client.code
    [ "$(cat /run/client.code)" = 7 ]
    codes_of_detached_arrive
}

# Whatever a failed check has left.
remove_containers() {
    local id
    systemctl start containerd
    for id in $(ctr task ls --quiet); do ctr task delete --force "$id"; done
    for id in $(ctr container ls --quiet); do ctr container delete "$id"; done
}
