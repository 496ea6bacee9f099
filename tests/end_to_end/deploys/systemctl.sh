#!/bin/sh
# Stands in for systemctl on a node without systemd: containerd is a real one, the units of
# embedshim are files that say what was asked for.
PATH=/usr/local/bin:/usr/bin:/bin
state=/run/stand-in

# A killed one stays a zombie: the node's first process does not wait for it.
is_alive() {
    pid=$(cat $state/containerd.pid 2> /dev/null) && grep -q '^State:.[^Z]' "/proc/$pid/status" 2> /dev/null
}

restart_containerd() {
    . $state/step
    echo restarted >> $state/restarts
    if is_alive; then
        kill -KILL "$pid"
        while is_alive; do sleep 0.05; done
    fi
    # A containerd that does not start with our handler, or not without.
    has=without
    ! grep -qrF embedshim /etc/containerd || has=with
    if [ "$(cat $state/fails 2> /dev/null)" = $has ]; then return 1; fi
    setsid containerd > $state/containerd.log 2>&1 < /dev/null 9<&- &
    echo $! > $state/containerd.pid
    for _ in $(seq 200); do
        is_alive || return 1
        ! timeout 5 ctr version > /dev/null 2>&1 || return 0
        sleep 0.1
    done
    return 1
}

case "$*" in
    "show --property=LoadState --value containerd.service") echo loaded ;;
    "show --property=KillMode --value containerd.service") cat $state/kill-mode 2> /dev/null || echo process ;;
    "show --property=ExecStart --value containerd.service")
        echo "{ path=/usr/local/bin/containerd ; argv[]=/usr/local/bin/containerd ; ignore_errors=no ; pid=0 }"
        ;;
    "show --property=MainPID --value containerd.service") cat $state/containerd.pid ;;
    "show --property=MainPID --value embedshimd.service") echo 0 ;;
    "show --property=FragmentPath --value embedshimd.service")
        ls /etc/systemd/system/embedshimd.service 2> /dev/null || :
        ;;
    "--quiet is-active containerd.service") is_alive ;;
    "--quiet is-active embedshimd.socket") [ -e $state/active ] ;;
    "--quiet is-active embedshimd.service") false ;;
    "--quiet is-enabled embedshimd.socket" | "is-enabled embedshimd.socket") [ -e $state/enabled ] ;;
    "enable --quiet embedshimd.socket" | "--quiet enable embedshimd.socket") . $state/step && : > $state/enabled ;;
    "disable --quiet embedshimd.socket" | "--quiet disable embedshimd.socket") . $state/step && rm -f $state/enabled ;;
    "start embedshimd.socket") . $state/step && : > $state/active ;;
    "stop embedshimd.socket embedshimd.service") . $state/step && rm -f $state/active ;;
    "restart containerd.service") restart_containerd ;;
    daemon-reload | "reset-failed containerd.service") ;;
    *)
        echo "the stand-in of systemctl does not know: $*" >&2
        exit 1
        ;;
esac
