# Containers to survive with: two without a client, and one whose client waits for its exit code. Owns what "untouched" means.

IMAGE=docker.io/library/guest:latest
RUNTIME=io.containerd.embed.v1
# Emulated, nothing is quick.
PATIENCE=60

# fails COMMAND...: since the shell does not end at `! COMMAND`.
fails() {
    if "$@"; then return 1; fi
}

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
    [ "$(grep -c RUNNING /run/before)" = 2 ]
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

# Name, pid, state and start time of each.
identities() {
    local tasks id pid state
    tasks=$(ctr task ls)
    for id in "$@"; do
        read -r pid state < <(awk -v id="$id" '$1 == id { print $2, $3 }' <<<"$tasks")
        echo "$id $pid $state $(cut -d ' ' -f 22 "/proc/$pid/stat")"
    done
}

lost_connections() {
    journalctl --quiet --no-pager --unit=containerd.service | grep -c 'shim disconnected' || true
}

# The same processes, and containerd says that they run.
containers_run_on() {
    identities $(cut -d ' ' -f 1 /run/before) | diff /run/before -
}

# And containerd has not noticed anything.
containers_are_untouched() {
    containers_run_on
    lost_connections | diff /run/lost -
}

exec_works() {
    [ "$(ctr task exec --exec-id "exec$RANDOM" one echo hello)" = hello ]
}

is_stopped() {
    ctr task ls | grep "^$1 .*STOPPED"
}

# delete_expecting CODE ID: which ctr tells by a warning.
delete_expecting() {
    ctr task delete "$2" 2>&1 | grep "task $2 exit with non-zero exit code $1"
    ctr container delete "$2"
}

codes_of_detached_arrive() {
    local id
    for id in one two; do
        ctr task kill --signal TERM $id
    done
    for id in one two; do
        until_true is_stopped $id
        delete_expecting 3 $id
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
    # A bundle whose removal has failed is removed by the next containerd.
    systemctl restart containerd
    for id in $(ctr task ls --quiet); do ctr task delete --force "$id"; done
    for id in $(ctr container ls --quiet); do ctr container delete "$id"; done
}
