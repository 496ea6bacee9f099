# The package: what its scripts do at installation, upgrade and removal.

is_installed() {
    [ "$(dpkg-query --show --showformat='${Version}' embedshim)" = "$(dpkg-deb --field "$1" Version)" ]
}

man_pages_and_completions_are_installed() {
    local page
    for page in embedshimd embedshimd-{config,inspect,keep,metrics,probe,ps,report,serve,status,upgrade,watch}; do
        [ "$(zcat "/usr/share/man/man8/$page.8.gz" | grep -c '^.SH "EXIT STATUS"')" = 1 ]
    done
    bash -n /usr/share/bash-completion/completions/embedshimd
    [ -s /usr/share/zsh/vendor-completions/_embedshimd ]
    [ -s /usr/share/fish/vendor_completions.d/embedshimd.fish ]
}

the_first_installation_starts_the_socket_alone() {
    dpkg --install old.deb
    systemctl is-enabled embedshimd.socket
    systemctl is-active embedshimd.socket
    [ "$(systemctl is-active embedshimd.service)" = inactive ]
    fails pgrep -x embedshimd
    [ "$(stat --format='%a %U' /run/embedshim /run/embedshim/shim.sock)" = $'700 root\n600 root' ]
    dpkg --verify embedshim
    man_pages_and_completions_are_installed
    # An older systemd warns of what it does not know, and of nothing else.
    systemd-analyze verify embedshimd.service embedshimd.socket >/run/warnings 2>&1
    [ "$(grep embedshim /run/warnings | grep -vc "Unknown key.*'FileDescriptorStorePreserve'")" = 0 ]
}

the_first_container_starts_the_service() {
    local pid
    systemctl stop embedshimd.service
    start_containers
    systemctl is-active embedshimd.service
    # No other daemon, no keeper.
    [ "$(pgrep embedshimd)" = "$(main_pid)" ]
    # As from containerd's own shims: a cgroup outside of the unit's, and what is inherited.
    pid=$(awk '$1 == "one" { print $2 }' /run/before)
    [ "$(cat /proc/$pid/cgroup)" = 0::/default/one ]
    [ "$(cat /proc/$pid/oom_score_adj)" = -998 ]
    [ "$(awk '/processes/ { print $3 }' /proc/$pid/limits)" = unlimited ]
    containers_are_untouched
    exec_works
    codes_arrive
}

operators_see_the_daemon_that_systemd_keeps() {
    start_containers
    embedshimd status >/run/status
    grep -q '^kept by *systemd$' /run/status
    [ "$(embedshimd ps | awk '$2 == "one" { print $4 }')" = running ]
    embedshimd metrics | grep -q '^embedshim_tasks{state="running"} [1-9]'
    # At the next sign of life.
    for _ in $(seq 120); do
        systemctl show -P StatusText embedshimd.service | grep -q 'serving; tasks: [1-9]' && break
        sleep 1
    done
    systemctl show -P StatusText embedshimd.service | grep -q 'serving; tasks: [1-9]'
    [ "$(stat --format='%a %U' /run/embedshim/admin.sock /run/embedshim/lives.json)" = $'600 root\n600 root' ]
    containers_are_untouched
    codes_arrive
}

an_upgrade_and_a_downgrade_are_not_noticed() {
    local package before
    start_containers
    for package in new.deb old.deb; do
        before=$(main_pid)
        dpkg --install $package
        is_installed $package
        [ "$(main_pid)" != "$before" ]
        # What runs is what is there.
        cmp "/proc/$(main_pid)/exe" /usr/bin/embedshimd
        [ "$(stat --dereference --format=%i "/proc/$(main_pid)/exe")" = "$(stat --format=%i /usr/bin/embedshimd)" ]
        containers_are_untouched
        exec_works
    done
    codes_arrive
}

removal_is_refused_while_containers_run() {
    start_containers
    fails dpkg --remove embedshim
    systemctl is-active embedshimd.socket
    containers_are_untouched
    codes_arrive
    is_installed old.deb
}

a_forced_removal_is_undone_by_a_new_installation() {
    start_detached
    systemctl stop containerd.service
    EMBEDSHIM_REMOVE_ANYWAY=1 dpkg --remove embedshim
    fails pgrep embedshimd
    dpkg --install old.deb
    systemctl start containerd.service
    containers_run_on
    exec_works
    codes_of_detached_arrive
}

removal_and_purge_leave_nothing() {
    dpkg --remove embedshim
    fails pgrep embedshimd
    [ ! -e /run/embedshim ]
    [ ! -e /sys/fs/bpf/embedshim ]
    [ -e /etc/embedshim/config.toml ]
    dpkg --purge embedshim
    [ ! -e /etc/embedshim ]
    [ -z "$(find /etc/systemd /lib/systemd /var/lib/systemd /usr/bin -name '*embedshim*' -o -name '*shim-embed*')" ]
    # And again.
    dpkg --install new.deb
    run_container --rm $IMAGE again true
}
