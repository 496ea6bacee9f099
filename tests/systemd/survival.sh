# What an operator or an accident does to the daemon, to containerd and to systemd, under running containers.

main_pid() {
    systemctl show --property=MainPID --value embedshimd.service
}

systemd_version() {
    systemctl --version | awk 'NR == 1 { print $2 }'
}

is_served_by_another() {
    local now
    now=$(main_pid)
    [ "$now" != "$1" ] && [ "$now" != 0 ] && systemctl --quiet is-active embedshimd.service
}

# kill_ten_times OPTION...: of systemctl kill.
kill_ten_times() {
    local round before
    start_containers
    for round in $(seq 10); do
        before=$(main_pid)
        systemctl kill "$@" embedshimd.service
        until_true is_served_by_another "$before"
        containers_run_on
    done
    containers_are_untouched
    exec_works
    codes_arrive
}

an_operator_kills_everything_ten_times() {
    kill_ten_times --signal=KILL
}

the_main_process_is_killed_ten_times() {
    kill_ten_times --kill-who=main --signal=KILL
}

systemctl_restart_is_not_noticed() {
    local round
    start_containers
    for round in 1 2 3; do
        systemctl restart embedshimd.service
        containers_are_untouched
        exec_works
    done
    codes_arrive
}

replace_daemon() {
    local before
    before=$(main_pid)
    systemctl kill --kill-who=main --signal="$1" embedshimd.service
    until_true is_served_by_another "$before"
}

lines_to() {
    seq "$1" | sed 's/^/line /'
}

# Of a client with pipes and of one with a terminal: every line once and in order.
streams_are_whole_over_every_kind_of_end() {
    local last=150 count plain terminal signal code
    count="i=0; while [ \$i -lt $last ]; do i=\$((i+1)); echo line \$i; sleep 0.2; done; exit 7"
    run_container --rm $IMAGE plain sh -c "$count" </dev/null >/run/plain.out 2>/run/plain.err &
    plain=$!
    # Its own input stays open.
    sleep 1000 | script --quiet --return --flush --command \
        "ctr run --tty --rm --snapshotter native --runtime $RUNTIME $IMAGE terminal sh -c '$count'" /dev/null >/run/terminal.out 2>&1 &
    terminal=$!
    until_true grep -q "line 5" /run/plain.out
    until_true grep -q "line 5" /run/terminal.out
    for signal in KILL TERM HUP KILL; do
        replace_daemon $signal
    done
    systemctl restart embedshimd.service
    code=0
    wait $plain || code=$?
    [ $code = 7 ]
    lines_to $last | diff /run/plain.out -
    until_true grep -q "line $last" /run/terminal.out
    tr -d '\r' </run/terminal.out | grep '^line' | diff <(lines_to $last) -
    pkill -f 'sleep 1000'
    wait $terminal || true
}

stored() {
    systemctl show --property=NFileDescriptorStore --value embedshimd.service
}

# Three entries each: a connection, and the pair of sockets that holds the descriptors of three streams.
thirty_containers_keep_their_streams() {
    local before ids id
    before=$(stored)
    ids=$(seq -f 'many%g' 30)
    for id in $ids; do
        run_container --detach $IMAGE "$id" guest until-term 3 </dev/null
    done
    identities $ids >/run/before
    [ "$(stored)" -eq $((before + 90)) ]
    lost_connections >/run/lost
    replace_daemon KILL
    containers_are_untouched
    [ "$(stored)" -eq $((before + 90)) ]
    for id in $ids; do
        ctr task kill --signal TERM "$id"
    done
    for id in $ids; do
        until_true is_stopped "$id"
        delete_expecting 3 "$id"
    done
}

# crowd STATE_DIRECTORY STORE_PID COMMAND: 1,667 containers with three streams each, made by an OCI runtime of the tests. The
# command replaces the daemon.
crowd() {
    mkdir /run/crowd
    prlimit --nofile=100000:100000 ./crowd replace --state-dir "$1" --store "$2" --command "$3" \
        --directory /run/crowd --runtime /checks/echo_runtime --containers 1667 --descriptors 20000 |
        sed --unbuffered 's/^/=== /' | tee /dev/ttyS0
    # Their inputs have ended with their client, and so have they.
    rm -r /run/crowd
}

twenty_thousand_descriptors_outlive_a_daemon_of_systemd() {
    systemctl start embedshimd.service
    crowd /run/embedshim 1 "PATIENCE=300; $(declare -f main_pid is_served_by_another until_true replace_daemon); replace_daemon KILL"
}

# keeper_has_another DAEMON: which serves.
keeper_has_another() {
    local now
    now=$(sed -n 's/^daemon //p' /run/kept/keeper.lock)
    [ -n "$now" ] && [ "$now" != "$1" ] && [ "$now" = "$(head -n 1 /run/kept/lock)" ]
}

replace_kept_daemon() {
    local before
    before=$(head -n 1 /run/kept/lock)
    kill -KILL "$before"
    until_true keeper_has_another "$before"
}

twenty_thousand_descriptors_outlive_a_daemon_of_the_keeper() {
    mkdir -m 0700 /run/kept
    prlimit --nofile=100000:100000 embedshimd keep --detached --state-dir /run/kept </dev/null &>/run/kept/embedshimd.log &
    until_true keeper_has_another 0
    crowd /run/kept "$(head -n 1 /run/kept/keeper.lock)" \
        "PATIENCE=300; $(declare -f keeper_has_another until_true replace_kept_daemon); replace_kept_daemon"
    kill -TERM "$(head -n 1 /run/kept/keeper.lock)"
}

systemd_itself_is_reloaded_and_executed_anew() {
    local what before
    start_containers
    for what in daemon-reload daemon-reexec; do
        systemctl $what
        before=$(main_pid)
        systemctl kill --kill-who=main --signal=KILL embedshimd.service
        until_true is_served_by_another "$before"
        containers_are_untouched
    done
    exec_works
    codes_arrive
}

has_restarted_often() {
    [ "$(systemctl show --property=NRestarts --value embedshimd.service)" -ge $(($1 + 5)) ]
}

a_mistake_in_the_configuration_costs_nothing() {
    local restarts
    start_containers
    cp /etc/embedshim/config.toml /run/config.toml
    echo 'nonsense = 1' >>/etc/embedshim/config.toml
    restarts=$(systemctl show --property=NRestarts --value embedshimd.service)
    systemctl kill --kill-who=main --signal=KILL embedshimd.service
    until_true has_restarted_often "$restarts"
    systemctl is-active embedshimd.socket
    cp /run/config.toml /etc/embedshim/config.toml
    until_true systemctl --quiet is-active embedshimd.service
    containers_are_untouched
    exec_works
    codes_arrive
}

containerd_restarts_while_the_daemon_is_killed() {
    local round restart
    start_detached
    for round in 1 2 3; do
        systemctl restart containerd.service &
        restart=$!
        systemctl kill --signal=KILL embedshimd.service
        wait $restart
        containers_run_on
    done
    exec_works
    codes_of_detached_arrive
}

both_are_stopped_while_a_container_ends() {
    local pid
    run_container --detach $IMAGE nine guest until-term 9
    start_detached
    pid=$(identities nine | cut -d ' ' -f 2)
    systemctl stop containerd.service embedshimd.service embedshimd.socket
    fails pgrep embedshimd
    kill -TERM "$pid"
    until_true test ! -e "/proc/$pid"
    systemctl start embedshimd.socket
    systemctl start containerd.service
    # By containerd, which looks for its containers.
    systemctl is-active embedshimd.service
    is_stopped nine
    delete_expecting 9 nine
    containers_run_on
    codes_of_detached_arrive
}

# Ahead, back and to where it was, each time with another daemon.
the_clock_may_be_set() {
    local seconds before
    start_containers
    for seconds in 7200 -14400 7200; do
        date --set="@$(($(date +%s) + seconds))"
        before=$(main_pid)
        systemctl kill --kill-who=main --signal=KILL embedshimd.service
        until_true is_served_by_another "$before"
        containers_are_untouched
    done
    exec_works
    codes_arrive
}

# systemd refuses to start it beside a daemon; it comes back with the next one.
the_socket_unit_can_be_stopped_alone() {
    start_containers
    systemctl stop embedshimd.socket
    run_container --rm $IMAGE another true
    systemctl restart embedshimd.service
    systemctl is-active embedshimd.socket
    containers_run_on
    exec_works
    codes_arrive
}

stop_does_what_the_manual_says() {
    start_containers
    systemctl stop embedshimd.service
    if [ "$(systemd_version)" -ge 254 ]; then
        # The store is kept; no client has noticed.
        [ "$(systemctl show --property=NFileDescriptorStore --value embedshimd.service)" -gt 0 ]
        systemctl start embedshimd.service
        containers_are_untouched
        exec_works
        codes_arrive
    else
        # The store is closed: containerd gives up what it has lost, and destroys it.
        until_true test -s /run/client.code
        [ "$(cat /run/client.code)" != 7 ]
        [ "$(lost_connections)" -gt "$(cat /run/lost)" ]
    fi
}
